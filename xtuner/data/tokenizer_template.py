"""The chat template in a tokenizer's folder: Jinja, rendered in the same sandbox and with the same names as in
transformers.

`chat_template.jinja`, or else `chat_template` of `tokenizer_config.json`, a text or a list of named ones.
"""

import datetime
import functools
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from xtuner.core.errors import ConfigError, DataError
from xtuner.core.files import read_json
from xtuner.core.foreign_inputs import read_regular, short, short_repr
from xtuner.data.tokenizer import ROLES, Tokenizer
from xtuner.families.chat import ChatFormat, Message, Piece

TOKENIZER = "tokenizer"  # its name in settings and options
FILE, SETTINGS = "chat_template.jinja", "tokenizer_config.json"
# What is not a part of a message's text for a template: its spaces at both ends, which many templates strip, and the
# tags by which they find the thoughts of an answer
_VISIBLE = re.compile(r"(\s*(?:</?think>\s*)+|^\s+|\s+$)")
_HIDDEN = re.compile("\ue000([0-9]+)\ue001")


@dataclass(frozen=True)
class TokenizerTemplate(ChatFormat):
    """`text` is the Jinja template of the file `where`; `names` are its variables, such as `bos_token`."""

    text: str
    where: str
    names: Mapping[str, str] = field(default_factory=dict)
    special: tuple[str, ...] = ()  # names of the tokenizer's special tokens
    stop_words: tuple[str, ...] = ()
    name: str = TOKENIZER
    marks: tuple[str, ...] = ()
    roles: tuple[str, ...] = ("system", "user", "assistant")
    writes_begin = True

    def prompt_of(self, messages: Iterable[Message]) -> str:
        return self._render([{"role": m.role, "content": m.content} for m in messages], prompt=True)

    def pieces(self, messages: Iterable[Message]) -> Iterator[Piece]:
        """An answer is learned from where a prompt would have ended, or else from its content on, to its end.

        Contents are hidden from the template, so that no text in them can become a mark.

        Raises: DataError if the template rejects the conversation, or changes contents.
        """
        messages = list(messages)
        hidden, parts = _hide(messages)
        text = self._render(hidden)
        if _show(text, parts) != self._render([{"role": m.role, "content": m.content} for m in messages]):
            raise DataError("the chat template changes texts of this conversation", where=self.where)
        learned = sorted(self._learned(text, hidden, messages))
        cuts = sorted({0, len(text), *(cut for span in learned for cut in span)})
        for begin, end in itertools.pairwise(cuts):
            is_learned = any(a <= begin < b for a, b in learned)
            for i, part in enumerate(_HIDDEN.split(text[begin:end])):
                if i % 2:
                    yield Piece(parts[int(part)], is_learned)
                else:
                    yield from (Piece(t, is_learned, t in self.special) for t in self._split(part) if t)

    def _split(self, text: str) -> list[str]:
        longest_first = "|".join(re.escape(name) for name in sorted(self.special, key=len, reverse=True))
        return re.split(f"({longest_first})", text) if self.special else [text]

    def _learned(
        self, text: str, hidden: Sequence[dict[str, str]], messages: Sequence[Message]
    ) -> Iterator[tuple[int, int]]:
        """(begin, end) in the rendered text of each answer that is learned."""
        for i, message in enumerate(messages):
            if message.role != "assistant" or message.loss is False:
                continue
            written = [m[0] for m in _HIDDEN.finditer(hidden[i]["content"])]
            own = [part for part in written if part in text]
            if own != written and all(m.role != "assistant" for m in messages[i + 1 :]):
                raise DataError("the chat template leaves out a part of the last answer", where=self.where)
            if not own:
                continue
            begin, after = text.index(own[0]), text.index(own[-1]) + len(own[-1])
            lead = hidden[i]["content"].partition(own[0])[0]
            begin -= len(lead) if text[:begin].endswith(lead) else 0
            rest = self._render(hidden[: i + 1]).rpartition(own[-1])[2]
            pairs = zip(text[after:], rest, strict=False)
            end = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            try:
                prompt = self._render(hidden[:i], prompt=True)
            except DataError:  # of a conversation that ends here
                prompt = text[:begin]
            yield (len(prompt) if text[:begin].startswith(prompt) else begin), after + end

    def _render(self, messages: Sequence[Mapping[str, str]], prompt: bool = False) -> str:
        try:
            return str(
                _compile(self.text).render(
                    messages=messages, tools=None, documents=None, add_generation_prompt=prompt, **self.names
                )
            )
        except Exception as e:  # from any expression of the template
            why = short(str(e) or type(e).__name__)
            raise DataError(
                f"the chat template rejects this conversation: {why}",
                where=self.where,
                do="choose another template, or a conversation that this one accepts",
            ) from None


FROM_TOKENIZER = TokenizerTemplate("", "")  # in a config, before the tokenizer is known


def read_template(tokenizer: Tokenizer) -> TokenizerTemplate | None:
    """The template in the tokenizer's folder, if any. Raises: ConfigError if it cannot be read."""
    found = _find_text(tokenizer.folder)
    if found is None:
        return None
    text, where = found
    try:
        _compile(text)
    except Exception as e:  # errors of syntax, and of constant expressions
        raise ConfigError(
            f"the chat template cannot be read: {short(str(e))}",
            where=where,
            do="copy the model's file there again, or remove the template there and choose another one",
        ) from None
    template = TokenizerTemplate(text, where, _names(tokenizer), tuple(tokenizer.special))
    return replace(template, stop_words=_stop_words(template))


def require_template(tokenizer: Tokenizer) -> TokenizerTemplate:
    """The template in the tokenizer's folder. Raises: ConfigError if there is none."""
    found = read_template(tokenizer)
    if found is None:
        raise ConfigError(
            f"the tokenizer has no chat template: neither {FILE} nor chat_template in {SETTINGS}",
            where=str(tokenizer.folder),
            do="give a chat model's tokenizer, or another template",
        )
    return found


def resolve_template(template: ChatFormat | None, tokenizer: Tokenizer, family: ChatFormat | None) -> ChatFormat | None:
    """`template`; for `FROM_TOKENIZER`, the one in the tokenizer's folder, else that of the model's family."""
    if not (isinstance(template, TokenizerTemplate) and not template.text):
        return template
    own = read_template(tokenizer)
    if own is None:
        return family
    return replace(own, stop_words=(*own.stop_words, *template.stop_words))


def is_same(template: TokenizerTemplate, other: ChatFormat) -> bool:
    """Whether `other` writes ordinary conversations as the template, apart from a begin token."""
    talk = [Message(role, f"{role}'s text") for role in ("system", "user", "assistant", "user", "assistant")]
    begin = template.names.get("bos_token", "")
    for messages in (talk, talk[1:]):
        try:
            found = ["".join(p.text for p in template.pieces(messages)), template.prompt_of(messages[:-1])]
        except DataError:
            return False
        wanted = ["".join(p.text for p in other.pieces(messages)), other.prompt_of(messages[:-1])]
        if [text.removeprefix(begin) for text in found] != wanted:
            return False
    return True


def _find_text(folder: Path) -> tuple[str, str] | None:
    """(template, file and key)"""
    path = folder / FILE
    if os.path.isfile(path):
        try:
            return read_regular(path).decode(), str(path)
        except UnicodeDecodeError:
            raise ConfigError("the chat template is not UTF-8", where=str(path)) from None
    path = folder / SETTINGS
    settings = read_json(path) if os.path.isfile(path) else {}
    text = settings.get("chat_template") if isinstance(settings, dict) else None
    where = f"{path}: chat_template"
    if isinstance(text, list):
        named = {t.get("name"): t.get("template") for t in text if isinstance(t, dict)}
        if "default" not in named:
            names = ", ".join(map(short_repr, named)) or "none"
            what = f"there are several chat templates and none is named 'default': {names}"
            raise ConfigError(what, where=where, do="name the one for ordinary conversations 'default'")
        text = named["default"]
    if text is not None and not isinstance(text, str):
        what = f"chat_template = {short_repr(text)} is not a text"
        raise ConfigError(what, where=where, do="copy the model's file there again")
    return (text, where) if text else None


def _names(tokenizer: Tokenizer) -> dict[str, str]:
    """The variables of special tokens: those that the tokenizer's settings name."""
    found: dict[str, str] = {}
    for file in ("special_tokens_map.json", SETTINGS):
        path = tokenizer.folder / file
        settings = read_json(path) if os.path.isfile(path) else {}
        for role in ROLES if isinstance(settings, dict) else ():
            token = settings.get(f"{role}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                found[f"{role}_token"] = token
    return found


def _hide(messages: Sequence[Message]) -> tuple[list[dict[str, str]], list[str]]:
    """(messages whose texts are replaced by the numbers of hidden parts, these parts)"""
    parts: list[str] = []

    def hide(text: str) -> str:
        parts.append(text)
        return f"\ue000{len(parts) - 1}\ue001"

    hidden = []
    for role, content, _, _ in messages:
        split = _VISIBLE.split(content) if role == "assistant" else re.split(r"(^\s+|\s+$)", content)
        text = "".join(part if i % 2 or not part else hide(part) for i, part in enumerate(split))
        hidden.append({"role": role, "content": text})
    return hidden, parts


def _show(text: str, parts: Sequence[str]) -> str:
    return _HIDDEN.sub(lambda match: parts[int(match[1])], text)


def _stop_words(template: TokenizerTemplate) -> tuple[str, ...]:
    """The special token that ends an answer."""
    try:
        pieces = list(template.pieces([Message("user", "-"), Message("assistant", "answer")]))
    except DataError:
        return ()
    at = max((i for i, piece in enumerate(pieces) if piece.text.endswith("answer")), default=len(pieces))
    return tuple(piece.text for piece in pieces[at + 1 :] if piece.is_mark)[:1]


@functools.lru_cache(maxsize=8)
def _compile(text: str) -> Any:
    """The template in jinja2's sandbox, with transformers' options, filters and functions."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %} … {% endgeneration %}` marks answers for other tools; its contents are written."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def reject(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = reject
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(text)
