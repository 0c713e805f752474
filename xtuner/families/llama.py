"""Llama and models with its tensor names: q, k and v are separate. InternLM2 models can be exported in this form."""

import re
from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any, ClassVar

from xtuner.families.base import ModelFamily, Released, Stored, Tiktoken
from xtuner.families.chat import ChatTemplate
from xtuner.families.hf_config import FIELDS, Reader, read_network, read_tied, write_network
from xtuner.families.internlm2 import INTERNLM2
from xtuner.families.network import DecoderConfig

ROPES = ("linear", "dynamic", "llama3", "yarn")
_HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
LLAMA3_CHAT = ChatTemplate(
    system=_HEADER.format("system") + "{text}<|eot_id|>",
    user=_HEADER.format("user") + "{text}<|eot_id|>",
    assistant_begin=_HEADER.format("assistant"),
    assistant_end="<|eot_id|>",
    stop_words=("<|eot_id|>", "<|end_of_text|>"),
    name="llama3_chat",
    marks=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)
DEEPSEEK_CHAT = ChatTemplate(  # of DeepSeek-R1-Distill-Llama and -Qwen
    system="{text}",
    user="<｜User｜>{text}",
    assistant_begin="<｜Assistant｜>",
    assistant_end="<｜end▁of▁sentence｜>",
    stop_words=("<｜end▁of▁sentence｜>",),
    name="deepseek_r1_chat",
    marks=("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
)


def _tiktoken_special() -> Iterator[str]:
    """Special tokens of Llama 3.1 and later. Llama 3.0 has other names for those that chats do not use."""
    named = {
        0: "<|begin_of_text|>", 1: "<|end_of_text|>", 4: "<|finetune_right_pad_id|>", 6: "<|start_header_id|>",
        7: "<|end_header_id|>", 8: "<|eom_id|>", 9: "<|eot_id|>", 10: "<|python_tag|>",
    }  # fmt: skip
    reserved = count()
    yield from (named.get(i) or f"<|reserved_special_token_{next(reserved)}|>" for i in range(256))


_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split_words(digits: str) -> str:
    """The rule of byte-level tokenizers of Llama 3 and Qwen, which differ in digits."""
    return _ENGLISH + digits + _OTHERS


def _llama2(layers: int, hidden: int, inner: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return dict(
        vocab_size=32000, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=4096, rms_norm_eps=1e-5,
        rope_theta=10000.0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def _llama3(layers: int, hidden: int, inner: int, heads: int, kv_heads: int = 8, **more: Any) -> dict[str, Any]:
    return _llama2(layers, hidden, inner, heads, kv_heads) | dict(
        vocab_size=128256, max_position_embeddings=8192, rope_theta=500000.0, bos_token_id=128000, eos_token_id=128001,
        **more,
    )  # fmt: skip


def _llama31(factor: float, *sizes: int, **more: Any) -> dict[str, Any]:
    scaling = dict(
        rope_type="llama3", factor=factor, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )  # fmt: skip
    return _llama3(*sizes, rope_scaling=scaling, **more) | dict(max_position_embeddings=131072)


class Llama(ModelFamily):
    name = "llama"
    architecture = "LlamaForCausalLM"
    tags = ("llama",)
    chat = INTERNLM2.chat
    other_chats: tuple[ChatTemplate, ...] = (LLAMA3_CHAT, DEEPSEEK_CHAT)
    tiktoken: Tiktoken | None = Tiktoken(
        "tokenizer.model",
        split_words(r"\p{N}{1,3}"),
        tuple(_tiktoken_special()),
        "<|begin_of_text|>",
        "<|end_of_text|>",
    )
    fields = FIELDS | {"attention_bias", "mlp_bias", "tie_word_embeddings"}
    released: ClassVar[tuple[Released, ...]] = (
        Released("meta-llama/Llama-2-7b-hf", _llama2(32, 4096, 11008, 32, 32)),
        Released("meta-llama/Llama-2-13b-hf", _llama2(40, 5120, 13824, 40, 40)),
        Released("meta-llama/Llama-2-70b-hf", _llama2(80, 8192, 28672, 64, 8)),
        Released("meta-llama/Meta-Llama-3-8B", _llama3(32, 4096, 14336, 32)),
        Released("meta-llama/Meta-Llama-3-70B", _llama3(80, 8192, 28672, 64)),
        Released("meta-llama/Llama-3.1-8B", _llama31(8.0, 32, 4096, 14336, 32)),
        Released("meta-llama/Llama-3.2-1B", _llama31(32.0, 16, 2048, 8192, 32, head_dim=64, tie_word_embeddings=True)),
        Released("meta-llama/Llama-3.2-3B", _llama31(32.0, 28, 3072, 8192, 24, head_dim=128, tie_word_embeddings=True)),
        Released("meta-llama/Llama-3.1-70B", _llama31(8.0, 80, 8192, 28672, 64)),
        Released("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", _llama31(8.0, 32, 4096, 14336, 32)),
        Released("deepseek-ai/DeepSeek-R1-Distill-Llama-70B", _llama31(8.0, 80, 8192, 28672, 64)),
    )
    # decoder's name → Llama's; inside a layer, the part after `model.layers.N.`
    names: ClassVar[Mapping[str, str]] = {
        "model.tok_embeddings": "model.embed_tokens",
        "model.norm": "model.norm",
        "output": "lm_head",
        "attention.wo": "self_attn.o_proj",
        "attention.q_norm": "self_attn.q_norm",
        "attention.k_norm": "self_attn.k_norm",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w3": "mlp.up_proj",
        "feed_forward.w2": "mlp.down_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

    def read_config(self, read: Reader) -> DecoderConfig:
        bias, more = read.flag("attention_bias"), dict(mlp_bias=read.flag("mlp_bias"), **read_tied(read))
        return read_network(read, attention_bias=bias, ropes=ROPES, **more)

    def write_config(self, c: DecoderConfig, dtype: str) -> dict[str, Any]:
        return {
            "architectures": [self.architecture],
            "model_type": self.name,
            "attention_bias": c.attention_bias,
            "mlp_bias": c.mlp_bias,
            "head_dim": c.head_dim,
            **write_network(c, dtype, expresses=("rope_scaling", "tie_word_embeddings", "mlp_bias")),
        }

    def stored(self, name: str, c: DecoderConfig) -> tuple[Stored, ...]:
        in_layer = re.fullmatch(r"(model\.layers\.\d+\.)(.+)", name)
        layer, rest = in_layer.groups() if in_layer else ("", name)
        matrix, _, kind = rest.rpartition(".")
        if matrix != "attention.wqkv":
            return (Stored(f"{layer}{self.names[matrix]}.{kind}"),)
        q = c.num_heads // c.num_kv_heads * c.head_dim  # rows of the group of one kv head: its q heads, then k, then v
        borders = (0, q, q + c.head_dim, q + 2 * c.head_dim)
        parts = zip(self.qkv, borders, borders[1:], strict=False)
        return tuple(Stored(f"{layer}{part}.{kind}", c.num_kv_heads, begin, end) for part, begin, end in parts)


LLAMA = Llama()
