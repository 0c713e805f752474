"""Chat templates: how a conversation is written as text for a chat model."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

# A tool turn is the model's call of a tool ("function" is a synonym); the tool's answer is an environment turn.
CALLS = ("tool", "function")
ANSWERS = ("assistant", "thought")
ROLES = ("system", "user", "environment", *ANSWERS, *CALLS)


class Message(NamedTuple):
    """One message. `loss` None: as the previous message of its turn; the first one is learned if the model wrote it."""

    role: str
    content: str
    name: str = ""
    loss: bool | None = None


class Piece(NamedTuple):
    """A part of a conversation: text, or a mark, which is the name of a special token."""

    text: str
    learned: bool = False
    is_mark: bool = False


class ChatFormat(ABC):
    """How conversations are written. A model stops at any of `stop_words`."""

    name: str  # in settings and options
    stop_words: tuple[str, ...]
    marks: tuple[str, ...]  # names of the special tokens in it
    roles: tuple[str, ...]  # that `pieces` knows
    writes_begin = False  # whether `pieces` include the begin token, if a text has one
    has_turns = True  # False: texts are continued

    @abstractmethod
    def pieces(self, messages: Iterable[Message]) -> Iterator[Piece]:
        """Pieces of a conversation. Contents and ends of answers are learned."""

    @abstractmethod
    def prompt_of(self, messages: Iterable[Message]) -> str:
        """The text of a conversation up to the beginning of the model's next answer."""

    @property
    def turn_marks(self) -> list[str]:
        """The marks of ordinary turns, without which no conversation can be written."""
        return []

    def prompt(self, user: str, system: str = "") -> str:
        """The text up to the beginning of the model's first answer."""
        return self.prompt_of([*([Message("system", system)] if system else []), Message("user", user)])


@dataclass(frozen=True)
class ChatTemplate(ChatFormat):
    """`{text}` is replaced by a turn's content.

    A template with other turns, such as calls of tools, is a subclass that overrides `pieces` and `jinja`.
    """

    system: str
    user: str
    assistant_begin: str
    assistant_end: str
    stop_words: tuple[str, ...]
    name: str = ""  # in settings and options
    marks: tuple[str, ...] = ()  # names of the special tokens in it
    roles: tuple[str, ...] = ("system", "user", "assistant")  # that `pieces` knows

    def prompt_of(self, messages: Iterable[Message]) -> str:
        return "".join(piece.text for piece in self.pieces(messages)) + self.assistant_begin

    @property
    def has_turns(self) -> bool:  # type: ignore[override]  # a constant of other kinds
        return bool(self.assistant_begin or self.marks)

    @property
    def turn_marks(self) -> list[str]:
        return [mark for mark in self.marks if mark in self.prompt("", "-") + self.assistant_end]

    def pieces(self, messages: Iterable[Message]) -> Iterator[Piece]:
        for role, content, _, loss in messages:
            before, _, after = self._turn(role).partition("{text}")
            learned = role == "assistant" and loss is not False
            yield from self._cut(before, learned=False)
            yield Piece(content, learned)
            yield from self._cut(after, learned)

    def jinja(self) -> str:
        """The template in the form of `tokenizer_config.json`, with the begin token."""
        turns = ""
        for role in ("system", "user", "assistant"):
            before, _, after = self._turn(role).partition("{text}")
            word = "elif" if turns else "if"
            turns += f"{{% {word} message['role'] == '{role}' %}}{{{{ {before!r} + message['content'] + {after!r} }}}}"
        answer = f"{{% if add_generation_prompt %}}{{{{ {self.assistant_begin!r} }}}}{{% endif %}}"
        return "{{ bos_token }}{% for message in messages %}" + turns + "{% endif %}{% endfor %}" + answer

    def _turn(self, role: str) -> str:
        answer = self.assistant_begin + "{text}" + self.assistant_end
        return {"system": self.system, "user": self.user, "assistant": answer}[role]

    def _cut(self, text: str, learned: bool) -> Iterator[Piece]:
        """A text of the template itself, split at its marks."""
        longest_first = "|".join(re.escape(mark) for mark in sorted(self.marks, key=len, reverse=True))
        parts = re.split(f"({longest_first})", text) if self.marks else [text]
        yield from (Piece(part, learned, part in self.marks) for part in parts if part)


PLAIN = ChatTemplate(
    system="{text}\n", user="{text}", assistant_begin="", assistant_end="\n", stop_words=(), name="plain"
)
