"""Mistral 7B and Nemo: Llama's tensor names, no biases, heads of a width of their own (Nemo)."""

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

from xtuner.core.errors import ConfigError
from xtuner.core.foreign_inputs import short_repr
from xtuner.families.base import Released
from xtuner.families.chat import ChatTemplate, Message, Piece
from xtuner.families.hf_config import FIELDS, Reader, read_network, read_tied, write_network
from xtuner.families.llama import ROPES, Llama
from xtuner.families.network import DecoderConfig
from xtuner.families.qwen2 import KINDS


class MistralChat(ChatTemplate):
    """Of tokenizers from v0.3 on. A system prompt is the beginning of the next user's turn."""

    def pieces(self, messages: Iterable[Message]) -> Iterator[Piece]:
        return super().pieces(_without_system(messages))

    def jinja(self) -> str:
        return (
            "{{ bos_token }}{% set ns = namespace(system='') %}{% for message in messages %}"
            "{% if message['role'] == 'system' %}{% set ns.system = message['content'] + '\\n\\n' %}"
            "{% elif message['role'] == 'user' %}{{ '[INST]' + ns.system + message['content'] + '[/INST]' }}"
            "{% set ns.system = '' %}{% else %}{{ message['content'] + '</s>' }}{% endif %}{% endfor %}"
        )


def _without_system(messages: Iterable[Message]) -> Iterator[Message]:
    system = ""
    for message in messages:
        if message.role == "system":
            system = message.content + "\n\n"
            continue
        if message.role == "user":
            message, system = message._replace(content=system + message.content), ""
        yield message


MISTRAL_CHAT = MistralChat(
    system="",
    user="[INST]{text}[/INST]",
    assistant_begin="",
    assistant_end="</s>",
    stop_words=("</s>",),
    name="mistral",
    marks=("[INST]", "[/INST]", "</s>"),
)


def _mistral(vocabulary: int, hidden: int, layers: int, **more: Any) -> dict[str, Any]:
    return dict(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=14336, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=32768, rms_norm_eps=1e-5,
        rope_theta=1e6, bos_token_id=1, eos_token_id=2, sliding_window=None,
    ) | more  # fmt: skip


class Mistral(Llama):
    name = "mistral"
    architecture = "MistralForCausalLM"
    tags = ("mistral",)
    chat = MISTRAL_CHAT
    other_chats: tuple[ChatTemplate, ...] = ()
    tiktoken = None
    fields = FIELDS | {"sliding_window", "tie_word_embeddings"}
    defaults: ClassVar = {"sliding_window": None, "num_key_value_heads": None}
    released: ClassVar = (
        Released("mistralai/Mistral-7B-v0.1", _mistral(32000, 4096, 32, rope_theta=10000.0, sliding_window=4096)),
        Released("mistralai/Mistral-7B-v0.3", _mistral(32768, 4096, 32)),
        Released("mistralai/Mistral-Nemo-Base-2407", _mistral(131072, 5120, 40, max_position_embeddings=131072)),
    )

    def read_config(self, read: Reader) -> DecoderConfig:
        read = read.with_defaults(num_key_value_heads=8, max_position_embeddings=131072, sliding_window=4096)
        window, kinds = read.window("sliding_window"), read.hf.get("layer_types")
        if kinds is not None and kinds != [KINDS[window is not None]] * read.size("num_hidden_layers"):
            raise ConfigError(
                f"layer_types = {short_repr(kinds)} contradicts sliding_window = {window}",
                where=f"{read.where}layer_types",
                why="all layers of this family have the same window, or none",
                do="copy the model's own config.json there again; windows in some layers are another model_type",
            )
        return read_network(read, ropes=ROPES, sliding_window=window, **read_tied(read))

    def write_config(self, c: DecoderConfig, dtype: str) -> dict[str, Any]:
        own = {
            "biases in attention": c.attention_bias,
            "windows in some layers": c.num_windows not in (0, c.num_layers),
        }
        self.require_expressible(own)
        return {
            "architectures": [self.architecture],
            "model_type": self.name,
            "attention_dropout": 0.0,
            "head_dim": c.head_dim,
            "sliding_window": c.sliding_window,
            **write_network(c, dtype, expresses=("rope_scaling", "tie_word_embeddings", "sliding_window")),
        }


MISTRAL = Mistral()
