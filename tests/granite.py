"""IBM's Granite as a user would add it: one file outside the package. The family that test_custom_family.py trains.

A config that imports this file can say `model = dict(type=from_scratch, family="granite", …)`. Conversations become
data by `xtuner data tokenize --template granite.CHAT`.
"""

from typing import Any, ClassVar

from xtuner.families import register
from xtuner.families.base import ModelFamily, Stored
from xtuner.families.chat import ChatTemplate
from xtuner.families.hf_config import FIELDS, Reader, read_network, write_network
from xtuner.families.network import DecoderConfig

START, ROLE, END = MARKS = ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>")
CHAT = ChatTemplate(
    system=f"{START}system{ROLE}{{text}}{END}\n",
    user=f"{START}user{ROLE}{{text}}{END}\n",
    assistant_begin=f"{START}assistant{ROLE}",
    assistant_end=f"{END}\n",
    stop_words=(END,),
    name="granite_chat",
    marks=MARKS,
)
SCALES = ("embedding_multiplier", "logits_scaling", "residual_multiplier")  # of which we compute 1 only


class Granite(ModelFamily):
    name = "granite"
    architecture = "GraniteForCausalLM"
    tags = ("granite", "test")
    chat = CHAT
    fields = FIELDS | {"attention_bias"}
    defaults: ClassVar = {"rms_norm_eps": 1e-5}
    names: ClassVar = {
        "tok_embeddings": "embed_tokens",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w3": "mlp.up_proj",
        "feed_forward.w2": "mlp.down_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "output": "lm_head",
    }

    def read_config(self, read: Reader) -> DecoderConfig:
        for key in SCALES:
            read.only(key, (1, 1.0), 1.0)
        network = read_network(read, attention_bias=read.only("attention_bias", (True, False), False))
        read.only("attention_multiplier", (network.head_dim**-0.5,), network.head_dim**-0.5)
        return network

    def write_config(self, c: DecoderConfig, dtype: str) -> dict[str, Any]:
        own = {"attention_bias": c.attention_bias, "mlp_bias": False, "head_dim": c.head_dim}
        scales = {**dict.fromkeys(SCALES, 1.0), "attention_multiplier": c.head_dim**-0.5}
        return {
            "architectures": [self.architecture],
            "model_type": self.name,
            **own,
            **scales,
            **write_network(c, dtype),
        }

    def stored(self, name: str, c: DecoderConfig) -> tuple[Stored, ...]:
        if ".wqkv." in name:  # a kv head's rows: those of its queries, then of its key, then of its value
            heads, size = c.num_heads // c.num_kv_heads, c.head_dim
            rows = {"q": (0, heads), "k": (heads, heads + 1), "v": (heads + 1, heads + 2)}
            where = name.replace("attention.wqkv", "self_attn.{}_proj")
            return tuple(Stored(where.format(n), c.num_kv_heads, a * size, b * size) for n, (a, b) in rows.items())
        for ours, theirs in self.names.items():
            name = name.replace(f"{ours}.", f"{theirs}.")
        return (Stored(name),)


GRANITE = register(Granite())
