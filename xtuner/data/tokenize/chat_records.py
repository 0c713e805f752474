"""Chat records: `{"messages": [{"role": …, "content": …}, …]}`, or the bare list."""

from collections.abc import Collection, Iterable
from typing import Any

from xtuner.core.errors import did_you_mean
from xtuner.core.foreign_inputs import short_repr
from xtuner.data.chat_template import Message, Piece
from xtuner.data.tokenize.read_chunks import Mistake
from xtuner.data.tokenizer import Tokenizer
from xtuner.families.chat import ROLES

# Keys of a format in which a tool message is the tool's answer. Mistaken for ours, the answer would be learned.
_OPENAI_KEYS = ("tool_calls", "tool_call_id", "function_call")


def read_messages(record: Any, roles: Collection[str] = ROLES) -> list[Message]:
    """Raises: Mistake, also for a role not in `roles`."""
    if isinstance(record, dict):
        if "messages" not in record:
            raise Mistake(f"no key 'messages'; the record has {', '.join(map(short_repr, list(record)[:8])) or 'none'}")
        record = record["messages"]
    if not isinstance(record, list):
        raise Mistake(f"the messages are a {type(record).__name__}, not a list")
    if not record:
        raise Mistake("a conversation without messages")
    return [_message(n, value, roles) for n, value in enumerate(record, 1)]


def _message(n: int, value: Any, roles: Collection[str]) -> Message:
    if not isinstance(value, dict):
        raise Mistake(f"message {n} is a {type(value).__name__}, not an object")
    for key in ("role", "content"):
        if key not in value:
            raise Mistake(f"message {n} has no {key!r}")
        if not isinstance(value[key], str):
            raise Mistake(f"message {n}: {key!r} is a {type(value[key]).__name__}, not a text")
    role, name, loss = value["role"], value.get("name"), value.get("loss")
    if role not in roles:
        known = ", ".join(roles)
        raise Mistake(
            f"message {n} has the unknown role {short_repr(role)}.{did_you_mean(role, list(roles))} Known: {known}"
        )
    foreign = [key for key in _OPENAI_KEYS if value.get(key)]
    if foreign:
        raise Mistake(
            f"message {n} has {foreign[0]!r}, OpenAI's form of tool use: write each call as a message of role tool, "
            "and the answer of the tool as one of role environment"
        )
    if not isinstance(name, str | None):
        raise Mistake(f"message {n}: 'name' is a {type(name).__name__}, not a text")
    if not isinstance(loss, bool | None):
        raise Mistake(f"message {n}: 'loss' is {short_repr(loss)}, neither true nor false")
    return Message(role, value["content"], name or "", loss)


def encode_conversation(pieces: Iterable[Piece], tokenizer: Tokenizer, allowed: Collection[str] = ()) -> list[int]:
    """Signed ids of a conversation.

    Text is encoded in runs. A run ends at a mark and where learning begins or ends, because a server, too, encodes the
    prompt before the first token of the answer exists.
    """
    tokens: list[int] = []
    run, is_learned = "", False

    def flush() -> None:
        nonlocal run
        ids = tokenizer.encode_plain(run, allowed) if run else []
        tokens.extend(ids if is_learned else [-i for i in ids])
        run = ""

    for text, learned, is_mark in pieces:
        if is_mark or learned != is_learned:
            flush()
            is_learned = learned
        if is_mark and text in tokenizer.special:
            tokens.append(tokenizer.special[text] if learned else -tokenizer.special[text])
        else:
            run += text  # also a tool's mark for which the tokenizer has no special token
    flush()
    return tokens
