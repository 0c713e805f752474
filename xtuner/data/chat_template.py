"""How a conversation is written as text for a chat model."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

# A tool turn is the model's call of a tool ("function" is the same); what the tool answers is an environment turn.
CALLS = ("tool", "function")
ANSWERS = ("assistant", "thought")
ROLES = ("system", "user", "environment", *ANSWERS, *CALLS)
_NAME_MARKS = {"plugin": "<|plugin|>", "interpreter": "<|interpreter|>"}


class Message(NamedTuple):
    """One message. `loss` None: learned if it is the model's own, and as the message before it in the same turn."""

    role: str
    content: str
    name: str = ""
    loss: bool | None = None


class Piece(NamedTuple):
    """A part of a conversation: a text, or a mark, which is the name of a special token."""

    text: str
    learned: bool = False
    is_mark: bool = False


@dataclass(frozen=True)
class ChatTemplate:
    """`{text}` stands for a turn's content. A model stops at any of `stop_words`."""

    system: str
    user: str
    assistant_begin: str
    assistant_end: str
    stop_words: tuple[str, ...]

    def prompt(self, user: str, system: str = "") -> str:
        """The text after which the model answers."""
        opening = self.system.format(text=system) if system else ""
        return opening + self.user.format(text=user) + self.assistant_begin


PROMPT_TEMPLATE = SimpleNamespace(
    internlm2_chat=ChatTemplate(
        system="<|im_start|>system\n{text}<|im_end|>\n",
        user="<|im_start|>user\n{text}<|im_end|>\n",
        assistant_begin="<|im_start|>assistant\n",
        assistant_end="<|im_end|>\n",
        stop_words=("<|im_end|>",),
    ),
    plain=ChatTemplate(system="{text}\n", user="{text}", assistant_begin="", assistant_end="\n", stop_words=()),
)

INTERNLM2_MARKS = ("<|im_start|>", "<|im_end|>", "<|action_start|>", "<|action_end|>", *_NAME_MARKS.values())


def internlm2_chat(messages: Iterable[Message]) -> Iterator[Piece]:
    """The pieces of a conversation, without the begin token.

    The model's turn is an assistant or thought message and the calls that follow it; its contents, its calls and its
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
