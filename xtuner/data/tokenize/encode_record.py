"""Encodes one record to signed tokens, by format."""

import json
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any, NamedTuple

from xtuner.core.errors import ConfigError, DataError
from xtuner.core.foreign_inputs import short_repr
from xtuner.data.chat_template import find_template
from xtuner.data.tokenize import alpaca_records, chat_records
from xtuner.data.tokenize.read_chunks import Mistake
from xtuner.data.tokenize.tokenize_settings import CHATS, INTERNEVO, TokenizeSettings
from xtuner.data.tokenizer import Tokenizer, load_tokenizer
from xtuner.data.tokenizer_template import TOKENIZER, require_template


class Document(NamedTuple):
    """Signed tokens; `cut`: whether some were removed because of `max_length`."""

    tokens: list[int]
    cut: bool = False


Encoder = Callable[[str], Document | None]  # None for a record without text; raises Mistake


@lru_cache
def get_encoder(settings: TokenizeSettings) -> Encoder:
    """The function that encodes the text of a record. Raises: ConfigError if the tokenizer lacks a required token."""
    tokenizer = _tokenizer(settings.tokenizer)
    _check(tokenizer, settings)
    encode = _chat_document if settings.format in CHATS else _text_document
    return partial(encode, tokenizer=tokenizer, settings=settings)


def clear_caches() -> None:
    """Load tokenizers again: their files may have changed."""
    get_encoder.cache_clear()
    _tokenizer.cache_clear()


@lru_cache
def _tokenizer(name: str) -> Tokenizer:
    return load_tokenizer(name)


def _check(tokenizer: Tokenizer, settings: TokenizeSettings) -> None:
    for option, needed, has in (
        ("--add-bos", settings.add_bos, tokenizer.bos_id),
        ("--add-eos", settings.add_eos, tokenizer.eos_id),
    ):
        if needed and has is None:
            kind = option[-3:]
            do = f"omit it with --no-add-{kind}, or set {kind}_token in tokenizer_config.json"
            raise ConfigError(f"the tokenizer has no {kind} token", where=str(tokenizer.folder), do=do)
    needs = find_template(settings.template).marks if settings.template not in ("", INTERNEVO, TOKENIZER) else ()
    missing = [name for name in (*needs, *settings.allow_special) if name not in tokenizer.special]
    if missing:
        raise ConfigError(
            f"the tokenizer has no special token {', '.join(missing)}",
            where=str(tokenizer.folder),
            why="spelt in ordinary pieces, models and servers would not recognise it",
            do="use a chat model's tokenizer, or list it in added_tokens_decoder of tokenizer_config.json",
        )
    if settings.template == INTERNEVO and tokenizer.vocab_size <= alpaca_records.INTERNEVO_END:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids; the internevo template uses {alpaca_records.INTERNEVO_END}",
            where=str(tokenizer.folder),
            do="use InternLM2's tokenizer, or --template internlm2_chat",
        )


def _text_document(record: str, tokenizer: Tokenizer, settings: TokenizeSettings) -> Document | None:
    text = _text(record, settings)
    if not text.strip():
        return None
    ids = _encoded(partial(tokenizer.encode_plain, text, settings.allow_special))
    begin, end = _ends(tokenizer, settings)
    return Document([*begin, *ids, *end])


def _text(record: str, settings: TokenizeSettings) -> str:
    if settings.format == "txt":
        return record.strip()
    value = parse(record)
    if settings.whole_record:
        return record if settings.format == "jsonl" else json.dumps(value)
    if isinstance(value, str):
        return value
    key = settings.text_key
    if not isinstance(value, dict):
        raise Mistake(f"a record is a {type(value).__name__}, neither an object with the key {key!r} nor a text")
    if key not in value:
        has = ", ".join(map(short_repr, list(value)[:8])) or "none"
        raise Mistake(f"no key {key!r} (select another with --text-key); the record has {has}")
    if not isinstance(value[key], str):
        raise Mistake(f"the value of {key!r} is a {type(value[key]).__name__}, not a text")
    return str(value[key])


def _chat_document(record: str, tokenizer: Tokenizer, settings: TokenizeSettings) -> Document | None:
    value = parse(record)
    limit = settings.max_length
    begin, end = _ends(tokenizer, settings)
    if settings.template == INTERNEVO:
        body = _encoded(partial(alpaca_records.encode_internevo, value, tokenizer, settings.allow_special))
        keep = len(body) if limit is None else limit - len(begin) - len(end)  # the end token is never cut
        return Document([*begin, *body[:keep], *end], cut=keep < len(body))
    template = require_template(tokenizer) if settings.template == TOKENIZER else find_template(settings.template)
    if settings.format == "alpaca":
        messages = alpaca_records.read_messages(value)
    else:
        messages = chat_records.read_messages(value, template.roles)
    try:
        pieces = list(template.pieces(messages))
    except DataError as e:
        raise Mistake(f"{e.what}. Another template can be chosen with --template") from None
    body = _encoded(partial(chat_records.encode_conversation, pieces, tokenizer, settings.allow_special))
    if begin and body[:1] in ([begin[0]], [-begin[0]]):
        begin = []  # the template has written it
    tokens = [*begin, *body, *end]
    return Document(tokens[:limit], cut=limit is not None and len(tokens) > limit)


def _ends(tokenizer: Tokenizer, settings: TokenizeSettings) -> Iterator[list[int]]:
    """The begin token and the end token, each as a list that is empty if the settings omit it."""
    for wanted, token in ((settings.add_bos, tokenizer.bos_id), (settings.add_eos, tokenizer.eos_id)):
        yield [token] if wanted and token is not None else []


def parse(record: str) -> Any:
    try:
        return json.loads(record)
    except json.JSONDecodeError as e:
        raise Mistake(f"not JSON: {e.msg}, character {e.pos}") from None
    except RecursionError:
        raise Mistake("nested too deeply") from None
    except ValueError as e:  # a number with thousands of digits
        raise Mistake(f"not readable: {e}") from None


def _encoded(encode: Callable[[], list[int]]) -> list[int]:
    """The ids. Half a surrogate pair, which JSON allows and UTF-8 does not, raises Mistake."""
    try:
        return encode()
    except (RuntimeError, UnicodeError, TypeError) as e:
        raise Mistake(f"the text cannot be encoded, possibly half a surrogate pair such as \\ud800: {e}") from None
