"""Scans all lines of a byte range of a `.bin` in one pass, for `xtuner data` check, stats and cache.

The lines that begin in a range belong to it, so that several processes share one large file. Ranges are read in blocks
of a few MB: memory depends neither on the size of the file nor on that of a line.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from xtuner.core.errors import DataError
from xtuner.core.system.malloc import keep_freed
from xtuner.data.format.parse_tokens import HEADS, Int64s, parse_line, parse_lines, parse_list
from xtuner.data.format.text_reader import MAX_ODD_LINE
from xtuner.data.format.zeros import count_unlearned

RANGE = 2**25  # bytes
BLOCK = 2**22  # bytes read at a time
MAX_PROBLEMS = 5  # reported per byte range


class ByteRange(NamedTuple):
    path: Path
    begin: int
    end: int


def split_file(path: Path, size: int) -> list[ByteRange]:
    return [ByteRange(path, at, min(at + RANGE, size)) for at in range(0, max(size, 1), RANGE)]


@dataclass
class ScanResult:
    """Result of scanning a byte range."""

    rows: list[npt.NDArray[np.int64]] = field(default_factory=list)  # [n, 2]: offset of the line, tokens
    documents: int = 0
    tokens: int = 0
    learned: int = 0
    zeros: int = 0  # tokens of id 0 that only `learn_zero` learns
    largest: int = -1
    too_large: tuple[int, int] | None = None  # (offset of its line, id) of the first id outside the vocabulary
    problems: list[tuple[int, str]] = field(default_factory=list)  # (byte offset, message) of the first ones
    num_problems: int = 0
    digest: bytes = b""

    def table(self) -> npt.NDArray[np.int64]:
        return np.concatenate(self.rows) if self.rows else np.zeros((0, 2), np.int64)


class Scanner:
    """Scans one byte range.

    Args:
        vocab_size: larger or equal ids are reported; None for no limit.
        take: called with the signed tokens of all lines, in order.
    """

    def __init__(
        self, part: ByteRange, vocab_size: int | None = None, take: Callable[[Int64s], None] | None = None
    ) -> None:
        keep_freed()
        self.part, self.vocab_size, self.take = part, vocab_size, take
        self.found = ScanResult()
        self._digest = hashlib.sha256()

    def run(self) -> ScanResult:
        """Raises: OSError."""
        fd = os.open(self.part.path, os.O_RDONLY)
        try:
            begin = self.part.begin
            at = self._skip(fd, begin - 1, digest=False, end=self.part.end) if begin else 0
            while at < self.part.end and (block := os.pread(fd, BLOCK, at)):
                at = self._block(fd, at, block)
        finally:
            os.close(fd)
        self.found.digest = self._digest.digest()
        return self.found

    def _block(self, fd: int, at: int, block: bytes) -> int:
        """Scan the complete lines at the beginning of a block. Returns the offset of the next line."""
        stop = block.rfind(b"\n") + 1
        if not stop and len(block) < BLOCK:
            stop = len(block)  # the file's end
        if not stop:
            return self._long(fd, at)
        if at + stop > self.part.end:
            last = block.find(b"\n", self.part.end - 1 - at) + 1
            stop = last or stop
        block = block[:stop]
        self._digest.update(block)
        lines = block.split(b"\n")
        if not lines[-1]:
            lines.pop()
        self._lines(at, lines)
        return at + stop

    def _lines(self, at: int, lines: list[bytes]) -> None:
        offsets = at + np.concatenate(([0], np.cumsum([len(line) + 1 for line in lines])))[:-1]
        found = parse_lines(lines)
        if found is not None:
            self._add(offsets, np.array(found[1], np.int64), found[0])
            return
        for offset, line in zip(offsets.tolist(), lines, strict=True):
            if not line.strip():
                continue
            try:
                tokens = parse_line(line)
            except DataError as e:
                self._problem(offset, e.what)
                continue
            self._add(np.array([offset]), np.array([len(tokens)]), tokens)

    def _add(self, offsets: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], tokens: Int64s) -> None:
        found = self.found
        found.rows.append(np.stack((offsets, counts), axis=1))
        found.documents += len(offsets)
        self._tokens(int(offsets[0]), tokens, counts)
        if found.too_large and found.too_large[0] == offsets[0] and len(offsets) > 1:  # find the line of this id
            first = int(np.flatnonzero(np.abs(tokens) >= self.vocab_size)[0])
            line = int(np.searchsorted(np.cumsum(counts), first, side="right"))
            found.too_large = int(offsets[line]), found.too_large[1]

    def _tokens(self, offset: int, tokens: Int64s, counts: npt.NDArray[np.int64] | None = None) -> None:
        """Add tokens of documents with these counts; None for a part of one."""
        found = self.found
        if len(tokens):
            largest = max(int(tokens.max()), -int(tokens.min()))
            found.largest = max(found.largest, largest)
            if self.vocab_size is not None and largest >= self.vocab_size and found.too_large is None:
                found.too_large = offset, int(np.abs(tokens[np.abs(tokens) >= self.vocab_size][0]))
        found.tokens += len(tokens)
        found.learned += int(np.count_nonzero(tokens > 0))
        borders = np.concatenate(([0], np.cumsum([len(tokens)] if counts is None else counts)))
        found.zeros += count_unlearned(tokens, borders)
        if self.take:
            self.take(tokens)

    def _problem(self, offset: int, what: str) -> None:
        self.found.num_problems += 1
        if len(self.found.problems) < MAX_PROBLEMS:
            self.found.problems.append((offset, what))

    def _long(self, fd: int, at: int) -> int:
        """Scan a line longer than a block, in pieces. Returns the offset of the next line."""
        head = next((h for h in HEADS if os.pread(fd, len(h), at) == h), None)
        count = 0
        try:
            if head is None:
                raise _Odd
            for tokens in _pieces(fd, at + len(head)):
                self._tokens(at, tokens)
                count += len(tokens)
            self._row(at, count)
        except _Odd:
            self._odd(fd, at, count)
        return self._skip(fd, at)

    def _row(self, at: int, count: int) -> None:
        self.found.rows.append(np.array([[at, count]]))
        self.found.documents += 1

    def _odd(self, fd: int, at: int, done: int) -> None:
        """Scan a long line that is not in the usual form, if it is not too long. `done`: its tokens counted already."""
        end = self._skip(fd, at, digest=False)
        if end - at > MAX_ODD_LINE:
            self._problem(at, f"a line of {end - at:,} bytes is not in the usual form, and too long for another")
            return
        try:
            tokens = parse_line(os.pread(fd, end - at, at))
        except DataError as e:
            self._problem(at, e.what)
            return
        self._tokens(at, tokens[done:])
        self._row(at, len(tokens))

    def _skip(self, fd: int, at: int, digest: bool = True, end: float = math.inf) -> int:
        """Offset of the line after the one at `at`; some offset >= `end` if that line begins after `end`."""
        while at < end and (block := os.pread(fd, BLOCK, at)):
            part = block[: block.find(b"\n") + 1] or block
            if digest:
                self._digest.update(part)
            at += len(part)
            if part.endswith(b"\n"):
                break
        return at


class _Odd(Exception):
    """A line is not in the usual form."""


def _pieces(fd: int, at: int) -> Iterator[Int64s]:
    """Yield the tokens of a line in the usual form, from its first number on. Raises: _Odd for another form."""
    rest, begun = b"", False
    while True:
        block = os.pread(fd, BLOCK, at)
        at += len(block)
        text = rest + block
        end = text.find(b"]")
        cut = end if end >= 0 else text.rfind(b",")
        if cut < 0 or (not block and end < 0):
            raise _Odd
        piece = text[:cut]
        if begun:
            piece = piece.removeprefix(b",").removeprefix(b" ")
        tokens = parse_list(piece)
        if tokens is None:
            raise _Odd
        begun = True
        if end < 0:
            yield tokens
            rest = text[cut:]
            continue
        tail = (text[end + 1 :] + os.pread(fd, 3, at)).split(b"\n")[0]
        if tail.rstrip(b"\r") != b"}":
            raise _Odd
        yield tokens
        return
