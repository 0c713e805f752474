"""Llama and models with its tensor names: q, k and v are separate. InternLM2 models can be exported in this form."""

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from xtuner.families.base import ModelFamily, Stored
from xtuner.families.hf_config import FIELDS, Reader, read_network, write_network
from xtuner.families.internlm2 import INTERNLM2
from xtuner.families.network import DecoderConfig


class Llama(ModelFamily):
    name = "llama"
    architecture = "LlamaForCausalLM"
    tags = ("llama",)
    chat = INTERNLM2.chat
    fields = FIELDS | {"attention_bias"}
    # decoder's name → Llama's; inside a layer, the part after `model.layers.N.`
    names: ClassVar[Mapping[str, str]] = {
        "model.tok_embeddings.weight": "model.embed_tokens.weight",
        "model.norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
        "attention.wo.weight": "self_attn.o_proj.weight",
        "attention.wo.bias": "self_attn.o_proj.bias",
        "feed_forward.w1.weight": "mlp.gate_proj.weight",
        "feed_forward.w3.weight": "mlp.up_proj.weight",
        "feed_forward.w2.weight": "mlp.down_proj.weight",
        "attention_norm.weight": "input_layernorm.weight",
        "ffn_norm.weight": "post_attention_layernorm.weight",
    }
    qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

    def read_config(self, read: Reader) -> DecoderConfig:
        return read_network(read, attention_bias=read.only("attention_bias", (True, False), False))

    def write_config(self, c: DecoderConfig, dtype: str) -> dict[str, Any]:
        return {
            "architectures": [self.architecture],
            "model_type": self.name,
            "attention_bias": c.attention_bias,
            "mlp_bias": False,
            "head_dim": c.head_dim,
            **write_network(c, dtype),
        }

    def stored(self, name: str, c: DecoderConfig) -> tuple[Stored, ...]:
        in_layer = re.fullmatch(r"(model\.layers\.\d+\.)(.+)", name)
        layer, rest = in_layer.groups() if in_layer else ("", name)
        matrix, _, kind = rest.rpartition(".")
        if matrix != "attention.wqkv":
            return (Stored(layer + self.names[rest]),)
        q = c.num_heads // c.num_kv_heads * c.head_dim  # rows of the group of one kv head: its q heads, then k, then v
        borders = (0, q, q + c.head_dim, q + 2 * c.head_dim)
        parts = zip(self.qkv, borders, borders[1:], strict=False)
        return tuple(Stored(f"{layer}{part}.{kind}", c.num_kv_heads, begin, end) for part, begin, end in parts)


LLAMA = Llama()
