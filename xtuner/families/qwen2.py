"""Qwen2 and Qwen2.5: Llama's tensor names, biases of q, k and v alone."""

from typing import Any, ClassVar

from xtuner.core.errors import ConfigError
from xtuner.core.foreign_inputs import short_repr
from xtuner.families.base import Released, Tiktoken
from xtuner.families.chat import ChatTemplate
from xtuner.families.hf_config import FIELDS, Reader, read_network, read_tied, write_network
from xtuner.families.llama import DEEPSEEK_CHAT, ROPES, Llama, split_words
from xtuner.families.network import DecoderConfig

CHATML = ChatTemplate(
    system="<|im_start|>system\n{text}<|im_end|>\n",
    user="<|im_start|>user\n{text}<|im_end|>\n",
    assistant_begin="<|im_start|>assistant\n",
    assistant_end="<|im_end|>\n",
    stop_words=("<|im_end|>", "<|endoftext|>"),
    name="qwen_chat",
    marks=("<|im_start|>", "<|im_end|>"),
)
KINDS = ("full_attention", "sliding_attention")
CLASS_DEFAULTS: dict[str, Any] = dict(  # values of transformers' class where a config.json omits them
    num_key_value_heads=32,
    max_position_embeddings=32768,
    bos_token_id=None,
    eos_token_id=None,
    sliding_window=4096,
)

_TIED = dict(tie_word_embeddings=True, max_position_embeddings=32768)


def _qwen2(vocabulary: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return dict(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=131072, rms_norm_eps=1e-6,
        rope_theta=1e6, bos_token_id=151643, eos_token_id=151643,
    )  # fmt: skip


class Qwen2(Llama):
    name = "qwen2"
    architecture = "Qwen2ForCausalLM"
    tags = ("qwen2",)
    chat = CHATML
    other_chats: tuple[ChatTemplate, ...] = (DEEPSEEK_CHAT,)
    tiktoken: Tiktoken | None = Tiktoken(
        "qwen.tiktoken",
        split_words(r"\p{N}"),
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))),
        begin="",
        end="<|endoftext|>",
        nfc=True,
    )
    fields = FIELDS | {"tie_word_embeddings"}
    defaults: ClassVar = {"pad_token_id": None, "num_key_value_heads": None, "rope_theta": 1e6}
    released: ClassVar = (
        Released("Qwen/Qwen2.5-0.5B", _qwen2(151936, 896, 4864, 24, 14, 2) | _TIED),
        Released("Qwen/Qwen2.5-1.5B", _qwen2(151936, 1536, 8960, 28, 12, 2) | _TIED),
        Released("Qwen/Qwen2.5-3B", _qwen2(151936, 2048, 11008, 36, 16, 2) | _TIED),
        Released("Qwen/Qwen2.5-7B", _qwen2(152064, 3584, 18944, 28, 28, 4)),
        Released("Qwen/Qwen2.5-14B", _qwen2(152064, 5120, 13824, 48, 40, 8) | dict(rms_norm_eps=1e-5)),
        Released("Qwen/Qwen2.5-32B", _qwen2(152064, 5120, 27648, 64, 40, 8) | dict(rms_norm_eps=1e-5)),
        Released("Qwen/Qwen2.5-72B", _qwen2(152064, 8192, 29568, 80, 64, 8) | dict(rms_norm_eps=1e-5)),
        Released("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", _qwen2(151936, 1536, 8960, 28, 12, 2)
                 | dict(rope_theta=10000.0, bos_token_id=151646)),
        Released("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", _qwen2(152064, 3584, 18944, 28, 28, 4)
                 | dict(rope_theta=10000.0, bos_token_id=151646)),
        Released("deepseek-ai/DeepSeek-R1-Distill-Qwen-14B", _qwen2(152064, 5120, 13824, 48, 40, 8)
                 | dict(rms_norm_eps=1e-5)),
        Released("deepseek-ai/DeepSeek-R1-Distill-Qwen-32B", _qwen2(152064, 5120, 27648, 64, 40, 8)
                 | dict(rms_norm_eps=1e-5)),
    )  # fmt: skip

    def read_config(self, read: Reader) -> DecoderConfig:
        read = read.with_defaults(**CLASS_DEFAULTS)
        return read_network(read, ropes=ROPES, qkv_bias=True, **read_windows(read), **read_tied(read))

    def write_config(self, c: DecoderConfig, dtype: str) -> dict[str, Any]:
        self.require_expressible({
            "no biases of q, k and v": not c.qkv_bias,
            "a bias of attention's output": c.output_bias,
        })  # fmt: skip
        return {
            "architectures": [self.architecture],
            "model_type": self.name,
            "attention_dropout": 0.0,
            **({"head_dim": c.head_dim} if c.query_width != c.hidden_size else {}),  # read by newer code alone
            **write_windows(c),
            **write_network(c, dtype, expresses=("rope_scaling", "tie_word_embeddings", "qkv_bias", "sliding_window")),
        }

    def not_served(self, c: DecoderConfig) -> list[str]:
        wide = c.query_width != c.hidden_size
        return [f"heads of {c.head_dim}, which is not hidden_size / num_attention_heads"] if wide else []


def read_windows(read: Reader) -> dict[str, Any]:
    """The fields of `DecoderConfig` for sliding windows. Raises: ConfigError for fields that contradict each other."""
    layers, kinds = read.size("num_hidden_layers"), read.hf.get("layer_types")
    slides = read.flag("use_sliding_window")
    window = read.window("sliding_window") if slides else None  # the value of an unused one is anything, such as 0
    if kinds is None:
        first = read.hf.get("max_window_layers", 28)
        if type(first) is not int:
            raise read.wrong("max_window_layers", f"max_window_layers = {short_repr(first)} is not a number of layers")
        slide = [slides and window is not None and i >= first for i in range(layers)]
    elif not isinstance(kinds, list):
        raise read.wrong("layer_types", f"layer_types = {short_repr(kinds)} is not a list")
    else:
        read.require_equal("num_hidden_layers", layers, "the number of layer_types", len(kinds))
        other = next((kind for kind in kinds if kind not in KINDS), None)
        if other is not None:
            raise ConfigError(
                f"layers with {short_repr(other)} are not supported",
                where=f"{read.where}layer_types",
                why=f"the decoder has layers with {' and '.join(KINDS)}",
            )
        slide = [kind == KINDS[1] for kind in kinds]
        if any(slide):
            read.require_equal("use_sliding_window", slides, "layer_types", True)
            read.require_equal("sliding_window", window is not None, "layer_types", True)
    if not any(slide):
        return {}
    return {"sliding_window": window, "sliding_layers": None if all(slide) else tuple(slide)}


def write_windows(c: DecoderConfig) -> dict[str, Any]:
    """The fields that `read_windows` reads. Older code reads `max_window_layers`: windows in the last layers."""
    slide = [c.window(layer) is not None for layer in range(c.num_layers)]
    return {
        "use_sliding_window": any(slide),
        "sliding_window": c.sliding_window,
        "max_window_layers": slide.index(True) if any(slide) else c.num_layers,
        "layer_types": [KINDS[is_window] for is_window in slide],
    }


QWEN2 = Qwen2()
