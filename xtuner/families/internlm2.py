"""InternLM2. The decoder uses the names of this family, so that each tensor is stored unchanged."""

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

from xtuner.families.base import ModelFamily, Released, Stored
from xtuner.families.chat import ANSWERS, CALLS, ROLES, ChatTemplate, Message, Piece
from xtuner.families.hf_config import FIELDS, Reader, read_network, write_network
from xtuner.families.network import DecoderConfig

_NAME_MARKS = {"plugin": "<|plugin|>", "interpreter": "<|interpreter|>"}
MARKS = ("<|im_start|>", "<|im_end|>", "<|action_start|>", "<|action_end|>", *_NAME_MARKS.values())
_BY_ID = (*_NAME_MARKS.values(), *reversed(MARKS[:4]))  # the last ids of its tokenizer.model


class InternLM2Chat(ChatTemplate):
    """Adds names of speakers, thoughts, calls of tools and their answers."""

    def pieces(self, messages: Iterable[Message]) -> Iterator[Piece]:
        """The model's turn is an assistant or thought message with the calls that follow it. Its contents, calls and
        end are learned, everything else is not:

            <|im_start|>assistant\\n CONTENT <|action_start|><|plugin|>\\n CALL <|action_end|>\\n <|im_end|>\\n
                                    └──────────────────────── learned ─────────────────────────────────┘
        """
        is_open = learned = False
        for message in messages:
            is_call = message.role in CALLS
            if is_open and not is_call:
                yield from _end(learned)
                is_open = False
            if message.role in ANSWERS or (is_call and not is_open):
                yield from _begin("assistant", "" if is_call else message.name)
                is_open = learned = True
            if not is_open:
                yield from _begin(message.role, message.name)
                yield Piece(message.content)
                yield from _end(learned=False)
                continue
            if message.loss is not None:
                learned = message.loss
            if is_call:
                yield Piece("<|action_start|>", learned, is_mark=True)
                yield _name(message.name, learned)
                yield Piece("\n", learned)
            yield Piece(message.content, learned)
            if is_call:
                yield Piece("<|action_end|>", learned, is_mark=True)
                yield Piece("\n", learned)
        if is_open:
            yield from _end(learned)

    def jinja(self) -> str:
        return (
            "{{ bos_token }}{% for message in messages %}"
            "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
        )


def _begin(role: str, name: str) -> Iterator[Piece]:
    yield Piece("<|im_start|>", is_mark=True)
    yield Piece(role)
    if name:
        yield Piece(" name=")
        yield _name(name, learned=False)
    yield Piece("\n")


def _end(learned: bool) -> Iterator[Piece]:
    yield Piece("<|im_end|>", learned, is_mark=True)
    yield Piece("\n", learned)


def _name(name: str, learned: bool) -> Piece:
    return Piece(_NAME_MARKS.get(name, name), learned, is_mark=name in _NAME_MARKS)


def _internlm2(layers: int, hidden: int, inner: int, heads: int, **more: Any) -> dict[str, Any]:
    return dict(
        vocab_size=92544, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=8, max_position_embeddings=32768,
    ) | more  # fmt: skip


class InternLM2(ModelFamily):
    name = "internlm2"
    architecture = "InternLM2ForCausalLM"
    loads_as = "llama"
    tags = ("internlm2",)
    chat: ChatTemplate = InternLM2Chat(
        system="<|im_start|>system\n{text}<|im_end|>\n",
        user="<|im_start|>user\n{text}<|im_end|>\n",
        assistant_begin="<|im_start|>assistant\n",
        assistant_end="<|im_end|>\n",
        stop_words=("<|im_end|>",),
        name="internlm2_chat",
        marks=MARKS[:4],
        roles=ROLES,
    )
    auto_map: ClassVar = {
        "AutoConfig": "configuration_internlm2.InternLM2Config",
        "AutoModel": "modeling_internlm2.InternLM2Model",
        "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
    }
    unnamed_tokens: ClassVar = {92538 + i: (f"[UNUSED_TOKEN_{141 + i}]", name) for i, name in enumerate(_BY_ID)}
    released = (
        Released("internlm/internlm2-1_8b", _internlm2(24, 2048, 8192, 16)),
        Released("internlm/internlm2-7b", _internlm2(32, 4096, 14336, 32)),
        Released("internlm/internlm2-20b", _internlm2(48, 6144, 16384, 48)),
        Released(
            "internlm/internlm2_5-7b-chat-1m",
            _internlm2(32, 4096, 14336, 32, rope_theta=5e7, max_position_embeddings=262144)
            | dict(rope_scaling=dict(type="dynamic", factor=2.5)),
        ),
    )
    fields = FIELDS | {"bias"}
    defaults: ClassVar = {"bias": False, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "pad_token_id": 2}

    def read_config(self, read: Reader) -> DecoderConfig:
        return read_network(read, attention_bias=read.only("bias", (True, False), True))

    def write_config(self, c: DecoderConfig, dtype: str) -> dict[str, Any]:
        return {  # no auto_map: the .py files it would name are not exported
            "architectures": [self.architecture],
            "model_type": self.name,
            "bias": c.attention_bias,
            "attn_implementation": "eager",
            **({} if c.head_dim * c.num_heads == c.hidden_size else {"head_dim": c.head_dim}),  # as the originals
            **write_network(c, dtype),
        }

    def stored(self, name: str, c: DecoderConfig) -> tuple[Stored, ...]:
        return (Stored(name),)

    def not_served(self, c: DecoderConfig) -> list[str]:
        found = {
            f"heads of {c.head_dim}, which is not hidden_size / num_attention_heads": c.head_dim * c.num_heads
            != c.hidden_size,
            "biases in attention": c.attention_bias,
        }
        return [text for text, is_there in found.items() if is_there]


INTERNLM2 = InternLM2()
