"""A chunk → lines of a `.bin`: what a worker process does."""

import hashlib
from collections import Counter
from dataclasses import dataclass, field

from xtuner.data.format.writer import Block, format_line
from xtuner.data.tokenize.read import Chunk, Mistake
from xtuner.data.tokenize.records import Document, encoder
from xtuner.data.tokenize.settings import CHATS, Settings

MISTAKES = 20  # as many are shown; then we stop


@dataclass
class Result:
    job: int
    train: Block = field(default_factory=Block)
    valid: Block = field(default_factory=Block)
    mistakes: list[tuple[int, str]] = field(default_factory=list)  # (line, message)
    stats: Counter[str] = field(default_factory=Counter)


def encode_chunk(chunk: Chunk) -> Result:
    """Mistakes are collected, not raised; at most `MISTAKES` of them."""
    result = Result(chunk.job)
    settings = chunk.settings
    encode = encoder(settings)

    def complain(line: int, message: str) -> None:
        result.mistakes.append((line, message))

    for line, text in chunk.records(complain):
        if len(result.mistakes) >= MISTAKES:
            break
        try:
            document = encode(text)
        except Mistake as e:
            complain(line + max(e.line - 1, 0), e.message)
            continue
        result.stats["records"] += 1
        if document is None:
            result.stats["empty"] += 1
            continue
        _count(document, settings, result.stats)
        written = format_line(document.tokens)
        part = result.valid if is_valid(written, settings) else result.train
        part.add(written, len(document.tokens))
    return result


def is_valid(line: bytes, settings: Settings) -> bool:
    """Whether a document goes to the valid part. Its contents and the seed decide, so equal ones stay together."""
    if not settings.valid_fraction:
        return False
    digest = hashlib.blake2b(line, digest_size=8, key=str(settings.seed).encode()).digest()
    return int.from_bytes(digest, "big") < settings.valid_fraction * 2**64


def _count(document: Document, settings: Settings, stats: Counter[str]) -> None:
    stats["cut"] += document.cut
    stats["zeros"] += document.tokens.count(0)
    if settings.format in CHATS and max(document.tokens[1:], default=0) <= 0:
        stats["unlearned"] += 1
