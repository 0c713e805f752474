"""Tiny random models of the shipped families, by their classes in transformers: every combination of features that a
released model has."""

from typing import Any

import torch

SHAPE = dict(
    vocab_size=131, hidden_size=48, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.1, bos_token_id=1, eos_token_id=2,
    pad_token_id=None,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16,
)  # fmt: skip
YARN = dict(
    rope_type="yarn", rope_theta=1e6, factor=4.0, original_max_position_embeddings=16, beta_fast=32.0, beta_slow=1.0
)  # fmt: skip
LINEAR = dict(rope_type="linear", rope_theta=1e4, factor=4.0)
DYNAMIC = dict(rope_type="dynamic", rope_theta=5e7, factor=6.0)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama 2": ("Llama", {}),
    "llama 3.1": ("Llama", dict(rope_parameters=LLAMA3)),
    "llama 3.2": ("Llama", dict(rope_parameters=LLAMA3, tie_word_embeddings=True, head_dim=16)),
    "llama 2 for long texts": ("Llama", dict(rope_parameters=LINEAR)),
    "llama with biases": ("Llama", dict(attention_bias=True, mlp_bias=True)),
    "internlm3": ("InternLM3", dict(rope_parameters=DYNAMIC, head_dim=12, pad_token_id=2)),
    "internlm3 with biases": ("InternLM3", dict(attention_bias=True, mlp_bias=True, head_dim=12)),
    "mistral": ("Mistral", dict(sliding_window=None)),
    "mistral v0.1": ("Mistral", dict(sliding_window=9)),
    "nemo": ("Mistral", dict(sliding_window=None, head_dim=16)),
    "qwen2": ("Qwen2", dict(max_window_layers=2, tie_word_embeddings=True)),
    "qwen2.5 1M": ("Qwen2", dict(rope_parameters=YARN, max_window_layers=2)),
    "qwen2.5 7B": ("Qwen2", dict(use_sliding_window=False, sliding_window=9, max_window_layers=2)),
    "qwen2 with windows": ("Qwen2", dict(use_sliding_window=True, sliding_window=9, max_window_layers=1)),
    "qwen3": ("Qwen3", dict(head_dim=16, max_window_layers=2, tie_word_embeddings=True)),
    "qwen3 8B": ("Qwen3", dict(head_dim=16, max_window_layers=2)),
    "qwen3 with biases": ("Qwen3", dict(head_dim=16, max_window_layers=2, attention_bias=True, rope_parameters=YARN)),
}


def make_theirs(name: str) -> Any:
    """The model of a case, with norms and biases that are random too."""
    import transformers

    family, fields = CASES[name]
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **fields})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    return model
