"""Tiny random models of the shipped families, by their classes in transformers: every combination of features that a
released model has. Tokenizers in the form of their own."""

import json
from pathlib import Path
from typing import Any

import torch

from helpers.paths import TOKENIZER_TEXT
from xtuner.families import FAMILIES

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
    "qwen2 with wide heads": ("Qwen2", dict(head_dim=16, max_window_layers=2)),
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


QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")


def write_tokenizer(folder: Path, marks: tuple[str, ...], plain: tuple[str, ...] = (), **config: object) -> Path:
    """A byte-level BPE whose id 0 is "!". `plain`: marks that are added tokens, but not special ones."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TOKENIZER_TEXT.read_text().splitlines(), trainer)
    tokenizer.add_special_tokens([AddedToken(m, special=True, normalized=False) for m in marks if m not in plain])
    tokenizer.add_tokens([AddedToken(m, special=False, normalized=False) for m in plain])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_model(folder: Path, config: object, family: str) -> None:
    from safetensors.torch import save_file

    from xtuner.model.decoder import CausalLM
    from xtuner.model.weights import split_for_family

    form = FAMILIES[family]
    state = CausalLM(config).state_dict()  # type: ignore[arg-type]
    parts = {k: t for n, w in state.items() for k, t in split_for_family(n, w, form, config).items()}  # type: ignore[arg-type]
    folder.mkdir()
    save_file({k: t.contiguous() * 0 + 0.01 for k, t in parts.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(form.write_config(config, "float32")))  # type: ignore[arg-type]
