"""Reads input files as chunks of records with bounded memory. A worker processes one chunk at a time."""

import codecs
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from xtuner.data.tokenize.tokenize_settings import TokenizeSettings

CHUNK = 1 << 20  # bytes
LARGEST_RECORD = 1 << 28  # characters of one record of a JSON list
BOM = codecs.BOM_UTF8
_BLANKS = re.compile(r"[ \t\n\r]*")


class Mistake(Exception):
    """A mistake in the input, on `line` (0: on the line of the record)."""

    def __init__(self, message: str, line: int = 0) -> None:
        super().__init__(message)
        self.message, self.line = message, line


@dataclass(frozen=True)
class Chunk:
    """Lines (`data`, which begins with line `first`) or records of a JSON list (`items`: line, text)."""

    job: int
    settings: TokenizeSettings
    first: int = 1
    data: bytes = b""
    items: list[tuple[int, str]] = field(default_factory=list)
    mistakes: list[tuple[int, str]] = field(default_factory=list)

    def records(self, complain: Callable[[int, str], None]) -> Iterator[tuple[int, str]]:
        """(line, text) of each record that is not blank. A line keeps its `\\n`; `\\r\\n` becomes `\\n`."""
        for line, message in self.mistakes:
            complain(line, message)
        yield from self.items
        if not self.data:
            return
        lines = self.data.split(b"\n")  # not splitlines: U+2028, form feeds etc. belong to the text
        for number, raw in enumerate(lines, self.first):
            try:
                text = raw.decode()
            except UnicodeDecodeError as e:
                complain(number, f"not UTF-8: byte {raw[e.start]:#04x} at byte {e.start} of the line")
                continue
            if text.strip():
                is_last = number == self.first + len(lines) - 1
                yield number, text.removesuffix("\r") + ("" if is_last else "\n")


class Hashed:
    """A file read in blocks, with the sha256 of what has been read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest = file, hashlib.sha256()

    def read(self, size: int) -> bytes:
        return self._hash(self._file.read(size))

    def rest_of_line(self) -> bytes:
        return self._hash(self._file.readline())

    def sha256(self) -> str:
        return self._digest.hexdigest()

    def _hash(self, data: bytes) -> bytes:
        self._digest.update(data)
        return data


def line_chunks(file: Hashed) -> Iterator[tuple[int, bytes]]:
    """(number of the first line, complete lines), about `CHUNK` bytes each."""
    first = 1
    data = file.read(CHUNK)
    while data:
        if not data.endswith(b"\n"):
            data += file.rest_of_line()
        yield first, data.removeprefix(BOM) if first == 1 else data
        first += data.count(b"\n")
        data = file.read(CHUNK)


def item_chunks(file: Hashed) -> Iterator[list[tuple[int, str]]]:
    """The records of a JSON list as (line, JSON text), about `CHUNK` characters together. Raises: Mistake."""
    items: list[tuple[int, str]] = []
    size = 0
    for line, text in JsonList(file).items():
        items.append((line, text))
        size += len(text)
        if size >= CHUNK:
            yield items
            items, size = [], 0
    yield items


class JsonList:
    """Splits a JSON list into its records; one record and one block are in memory."""

    def __init__(self, file: Hashed) -> None:
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._text, self._at, self._line = "", 0, 1
        self._ended = False

    def items(self) -> Iterator[tuple[int, str]]:
        if self._next() != "[":
            raise Mistake("not a list of records: it does not begin with [ (one record per line is jsonl)", self._line)
        self._advance(1)
        if self._next() == "]":
            self._advance(1)
        else:
            yield from self._records()
        if self._next():
            raise Mistake("text after the end of the list", self._line)

    def _records(self) -> Iterator[tuple[int, str]]:
        while True:
            self._next()
            line, length = self._line, self._length()
            yield line, self._text[self._at : self._at + length]
            self._advance(length)
            mark = self._next()
            if mark not in (",", "]"):
                raise Mistake("the list is cut short" if not mark else "no comma between two records", self._line)
            self._advance(1)
            if mark == "]":
                return

    def _next(self) -> str:
        """Advance to the next character that is not blank, and return it; empty at the end of the file."""
        while True:
            blanks = _BLANKS.match(self._text, self._at)
            assert blanks is not None
            self._advance(blanks.end() - self._at)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def _length(self) -> int:
        """Number of characters of the record at the current position."""
        scan = json.JSONDecoder().raw_decode
        while True:
            try:
                _, end = scan(self._text, self._at)
                if end < len(self._text) or self._ended:
                    return end - self._at
            except RecursionError:
                raise Mistake("nested too deeply", self._line) from None
            except json.JSONDecodeError as e:
                if self._ended or len(self._text) - self._at > LARGEST_RECORD:
                    lines = self._text.count("\n", self._at, e.pos)
                    raise Mistake(f"not JSON: {e.msg}", self._line + lines) from None
            except ValueError as e:  # a number with thousands of digits
                raise Mistake(f"not readable: {e}", self._line) from None
            self._more()

    def _advance(self, length: int) -> None:
        self._line += self._text.count("\n", self._at, self._at + length)
        self._at += length

    def _more(self) -> bool:
        """Read the next block and drop the text before the current position. False at the end of the file."""
        self._text, self._at = self._text[self._at :], 0
        data = self._file.read(max(CHUNK, len(self._text)))  # doubling: a long record is scanned a few times only
        try:
            self._text += self._decode(data, final=not data)
        except UnicodeDecodeError as e:
            line = self._line + self._text.count("\n") + e.object[: e.start].count(b"\n")
            raise Mistake(f"not UTF-8: byte {e.object[e.start]:#04x}", line) from None
        self._ended = not data
        return not self._ended


def read_chunks(path: Path, job: int, settings: TokenizeSettings, done: Callable[[str], None]) -> Iterator[Chunk]:
    """All chunks of a file, at least one; then `done(sha256 of the file)`."""
    with open(path, "rb") as opened:
        file = Hashed(opened)
        yield Chunk(job, settings)  # also for a file without lines
        if is_json_list(path, settings.format):
            try:
                for items in item_chunks(file):
                    yield Chunk(job, settings, items=items)
            except Mistake as e:
                yield Chunk(job, settings, mistakes=[(e.line, e.message)])
        else:
            for first, data in line_chunks(file):
                yield Chunk(job, settings, first, data)
        done(file.sha256())


def is_json_list(path: Path, kind: str) -> bool:
    """Whether the file is one JSON list instead of one record per line."""
    return kind == "json" or (path.suffix == ".json" and kind in ("auto", "alpaca", "chat"))


def first_record(path: Path) -> str:
    """Text of the first record; empty if it cannot be read."""
    with open(path, "rb") as opened:
        file = Hashed(opened)
        if is_json_list(path, "auto"):
            try:
                return next((text for _, text in JsonList(file).items()), "")
            except Mistake:
                return ""
        for first, data in line_chunks(file):
            for _, text in Chunk(0, TokenizeSettings(""), first, data).records(lambda line, message: None):
                return text
    return ""
