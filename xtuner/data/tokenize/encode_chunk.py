"""Encodes a chunk of records to lines of a `.bin`, in a worker process."""

import hashlib
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from xtuner.data.format.writer import Block, format_line
from xtuner.data.format.zeros import count_unlearned
from xtuner.data.tokenize.encode_record import Document, get_encoder
from xtuner.data.tokenize.read_chunks import Chunk, Mistake
from xtuner.data.tokenize.tokenize_settings import CHATS, TokenizeSettings

MAX_MISTAKES = 20  # shown; then tokenizing stops


@dataclass
class Result:
    job: int
    train: Block = field(default_factory=Block)
    valid: Block = field(default_factory=Block)
    mistakes: list[tuple[int, str]] = field(default_factory=list)  # (line, message)
    stats: Counter[str] = field(default_factory=Counter)


def encode_chunk(chunk: Chunk) -> Result:
    """Mistakes are collected, not raised; at most `MAX_MISTAKES` of them."""
    result = Result(chunk.job)
    settings = chunk.settings
    encode = get_encoder(settings)

    def complain(line: int, message: str) -> None:
        result.mistakes.append((line, message))

    for line, text in chunk.records(complain):
        if len(result.mistakes) >= MAX_MISTAKES:
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
        block = result.valid if is_valid(written, settings) else result.train
        block.add(written, len(document.tokens))
    return result


def is_valid(line: bytes, settings: TokenizeSettings) -> bool:
    """Whether a document belongs to the valid split. Decided by its contents and the seed, so that duplicates stay
    together."""
    if not settings.valid_fraction:
        return False
    digest = hashlib.blake2b(line, digest_size=8, key=str(settings.seed).encode()).digest()
    return int.from_bytes(digest, "big") < settings.valid_fraction * 2**64


def _count(document: Document, settings: TokenizeSettings, stats: Counter[str]) -> None:
    stats["cut"] += document.cut
    if 0 in document.tokens:
        stats["zeros"] += count_unlearned(np.array(document.tokens), np.array([0, len(document.tokens)]))
    if settings.format in CHATS and max(document.tokens[1:], default=0) <= 0:
        stats["unlearned"] += 1
