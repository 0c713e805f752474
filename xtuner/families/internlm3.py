"""InternLM3: Llama's tensor names. Its own code and transformers 5 name the biases differently; both are read."""

from typing import Any, ClassVar

from xtuner.families.base import Released
from xtuner.families.chat import ChatTemplate
from xtuner.families.hf_config import FIELDS, Reader, read_network, read_tied, write_network
from xtuner.families.llama import ROPES, Llama
from xtuner.families.network import DecoderConfig


class InternLM3(Llama):
    name = "internlm3"
    architecture = "InternLM3ForCausalLM"
    other_architectures = ("LlamaForCausalLM",)  # transformers writes the class that computes it there
    tags = ("internlm3",)
    other_chats: tuple[ChatTemplate, ...] = ()  # InternLM2's marks
    tiktoken = None
    fields = FIELDS | {"qkv_bias", "bias", "tie_word_embeddings"}
    defaults: ClassVar = {"rms_norm_eps": 1e-5, "rope_theta": 5e7, "pad_token_id": 2, "num_key_value_heads": None}
    released: ClassVar = (
        Released("internlm/internlm3-8b-instruct", dict(
            vocab_size=128512, hidden_size=4096, intermediate_size=10240, num_hidden_layers=48, num_attention_heads=32,
            num_key_value_heads=2, head_dim=128, max_position_embeddings=32768, rms_norm_eps=1e-5, rope_theta=5e7,
            rope_scaling=dict(rope_type="dynamic", factor=6.0), bos_token_id=1, eos_token_id=2, pad_token_id=2,
        )),
    )  # fmt: skip

    def read_config(self, read: Reader) -> DecoderConfig:
        read = read.with_defaults(rms_norm_eps=1e-5, num_key_value_heads=2, max_position_embeddings=32768)
        qkv, other = read.flag("qkv_bias", "attention_bias"), read.flag("bias", "mlp_bias")
        return read_network(read, ropes=ROPES, qkv_bias=qkv, output_bias=other, mlp_bias=other, **read_tied(read))

    def write_config(self, c: DecoderConfig, dtype: str) -> dict[str, Any]:
        # transformers calls qkv_bias attention_bias; for it, as for the model's own code, `bias` is one of `wo` and MLP
        self.require_expressible(
            {"a bias of attention's output without biases in the MLP": c.output_bias != c.mlp_bias}
        )
        return {
            "architectures": [self.architecture],
            "model_type": self.name,
            "qkv_bias": c.qkv_bias,
            "bias": c.mlp_bias,
            "attention_dropout": 0.0,
            "head_dim": c.head_dim,
            **write_network(
                c, dtype, expresses=("rope_scaling", "tie_word_embeddings", "qkv_bias", "output_bias", "mlp_bias")
            ),
        }


INTERNLM3 = InternLM3()
