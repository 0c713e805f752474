"""Qwen3, dense: Llama's tensor names, norms of q and k, heads of a width of their own."""

from typing import Any, ClassVar

from xtuner.families.base import Released
from xtuner.families.chat import ChatTemplate
from xtuner.families.hf_config import FIELDS, Reader, read_network, read_tied, write_network
from xtuner.families.llama import DEEPSEEK_CHAT, ROPES, Llama
from xtuner.families.network import DecoderConfig
from xtuner.families.qwen2 import CHATML, CLASS_DEFAULTS, read_windows, write_windows

_TIED = dict(tie_word_embeddings=True)


def _qwen3(hidden: int, inner: int, layers: int, heads: int) -> dict[str, Any]:
    return dict(
        vocab_size=151936, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=8, head_dim=128, max_position_embeddings=40960,
        rms_norm_eps=1e-6, rope_theta=1e6, bos_token_id=151643, eos_token_id=151645,
    )  # fmt: skip


class Qwen3(Llama):
    name = "qwen3"
    architecture = "Qwen3ForCausalLM"
    tags = ("qwen3",)
    chat = CHATML
    other_chats: tuple[ChatTemplate, ...] = (DEEPSEEK_CHAT,)
    tiktoken = None
    fields = FIELDS | {"attention_bias", "tie_word_embeddings"}
    defaults: ClassVar = {"head_dim": 128, "rope_theta": 1e6, "pad_token_id": None, "num_key_value_heads": None}
    released: ClassVar[tuple[Released, ...]] = (
        Released("Qwen/Qwen3-0.6B", _qwen3(1024, 3072, 28, 16) | _TIED),
        Released("Qwen/Qwen3-1.7B", _qwen3(2048, 6144, 28, 16) | _TIED),
        Released("Qwen/Qwen3-4B", _qwen3(2560, 9728, 36, 32) | _TIED),
        Released("Qwen/Qwen3-8B", _qwen3(4096, 12288, 36, 32)),
        Released("Qwen/Qwen3-14B", _qwen3(5120, 17408, 40, 40)),
        Released("Qwen/Qwen3-32B", _qwen3(5120, 25600, 64, 64)),
    )

    def read_config(self, read: Reader) -> DecoderConfig:
        read = read.with_defaults(**CLASS_DEFAULTS, head_dim=128)
        own = dict(attention_bias=read.flag("attention_bias"), **read_windows(read), **read_tied(read))
        return read_network(read, ropes=ROPES, qk_norm=True, **own)

    def write_config(self, c: DecoderConfig, dtype: str) -> dict[str, Any]:
        self.require_expressible({"no norms of q and k": not c.qk_norm})
        return {
            "architectures": [self.architecture],
            "model_type": self.name,
            "attention_bias": c.attention_bias,
            "attention_dropout": 0.0,
            "head_dim": c.head_dim,
            **write_windows(c),
            **write_network(c, dtype, expresses=("rope_scaling", "tie_word_embeddings", "qk_norm", "sliding_window")),
        }


QWEN3 = Qwen3()
