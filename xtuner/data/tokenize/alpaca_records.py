"""Alpaca records: `{"instruction": …, "input": …, "output": …}`; the input may be empty or absent."""

from collections.abc import Collection
from typing import Any

from xtuner.core.foreign_inputs import short_repr
from xtuner.data.chat_template import Message
from xtuner.data.tokenize.read_chunks import Mistake
from xtuner.data.tokenizer import Tokenizer

INTERNEVO_END = 92542  # id of <|im_end|>, which that tool writes with any tokenizer
_INTERNEVO_NEWLINE = 13  # the byte piece <0x0A>


def read_messages(record: Any) -> list[Message]:
    """Raises: Mistake."""
    question, answer = _texts(record)
    return [Message("user", question), Message("assistant", answer)]


def encode_internevo(record: Any, tokenizer: Tokenizer, allowed: Collection[str] = ()) -> list[int]:
    """Signed ids as InternEvo's alpaca tool wrote them in 2024, without begin and end.

    For reproducing old data sets bit for bit. Marks are spelt in ordinary pieces, newlines are byte pieces, and an
    obsolete `<|Bot|>:` replaces the first eight characters of the answer's header.
    """
    question, answer = _texts(record)

    def encode_masked(text: str) -> list[int]:
        return [-i for i in tokenizer.encode_plain(text, allowed)]

    end = [INTERNEVO_END, _INTERNEVO_NEWLINE]
    prompt = encode_masked("<|im_start|>user\n" + question) + [-i for i in end] + encode_masked("<|Bot|>:")
    return prompt + tokenizer.encode_plain("<|im_start|>assistant\n"[8:] + answer, allowed) + end


def _texts(record: Any) -> tuple[str, str]:
    if not isinstance(record, dict):
        raise Mistake(f"a record is a {type(record).__name__}, not an object with instruction, input and output")
    for key in ("instruction", "output"):
        if key not in record:
            raise Mistake(f"no key {key!r}; the record has {', '.join(map(short_repr, list(record)[:8])) or 'none'}")
    extra = record.get("input") or ""
    for key, value in (("instruction", record["instruction"]), ("input", extra), ("output", record["output"])):
        if not isinstance(value, str):
            raise Mistake(f"the value of {key!r} is a {type(value).__name__}, not a text")
    question = record["instruction"]
    return (f"{question}\n{extra}" if extra else question), record["output"]
