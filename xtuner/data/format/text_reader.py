"""Tokens of parts of documents, read from the text of a `.bin` by the rows of its meta.

A pack takes parts of some dozens of documents. Their lines are read one by one and parsed together. A document longer
than `LONG` is never read whole: where its commas stand is noted once, and each pack reads what it needs.
"""

import bisect
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from xtuner.core.errors import DataError
from xtuner.data.format.bin_file import BinFile, read_line
from xtuner.data.format.meta import NpyHeader
from xtuner.data.format.parse_tokens import HEADS, Int64s, parse_line, parse_lines, parse_list

LONG = 2**15  # tokens
BLOCK = 2**18  # bytes between two notes in a long line
ODD_LINE = 2**26  # bytes; a longer line has to be in the usual form
_TWO_ROWS = struct.Struct("<4q")
_TAIL = (b"}", b"}\n", b"}\r\n")


class Span(NamedTuple):
    """Tokens `start` to `stop` of a document: its row in the meta, of `length` tokens."""

    row: int
    start: int
    stop: int
    length: int


class SpanArrays(NamedTuple):
    """Spans as arrays [n], one entry each; the last one is not empty."""

    rows: npt.NDArray[np.uint32]
    starts: Int64s
    stops: Int64s
    lengths: Int64s

    def as_list(self) -> list[Span]:
        return list(map(Span, *(array.tolist() for array in self)))


class MetaRows:
    """Single rows of a meta, without the others: byte offset, token count, and where the next row's line begins."""

    def __init__(self, meta: BinaryIO, file: BinFile) -> None:
        header = NpyHeader.read(meta)
        self.dtype, self.begin = header.dtype, header.begin
        self.rows, self.columns = header.shape
        self.whole = file.full_table if header.by_column else None
        self.usual = self.dtype == np.dtype("<i8") and self.columns == 2

    def read(self, meta: BinaryIO, row: int) -> tuple[int, int, int]:
        if self.whole is not None:
            after = int(self.whole[0][row + 1]) if row + 1 < self.rows else -1
            return int(self.whole[0][row]), int(self.whole[1][row]), after
        size = self.columns * self.dtype.itemsize
        data = os.pread(meta.fileno(), size * min(self.rows - row, 2), self.begin + row * size)
        if len(data) < size:
            return -1, -1, -1
        if len(data) < 2 * size:  # the last row
            offset, length = self._unusual(data)
            return offset, length, -1
        offset, length, after, _ = _TWO_ROWS.unpack(data) if self.usual else self._unusual(data)
        return offset, length, after

    def _unusual(self, data: bytes) -> tuple[int, ...]:
        rows = np.frombuffer(data, self.dtype).reshape(-1, self.columns)
        return tuple(rows[:, [0, -1]].ravel().tolist())


@dataclass
class LongLine:
    """A long document in the usual form: after how many commas which byte stands. Or `tokens`, in any other form."""

    end: int = 0  # where the closing bracket stands
    commas: list[int] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    tokens: Int64s | None = None

    @property
    def nbytes(self) -> int:
        return 64 * len(self.commas) + (0 if self.tokens is None else self.tokens.nbytes)


class LongLines:
    """The notes of the last long documents that were read.

    `held` is replaced, never changed: threads need no lock, and at worst forget an entry. Bounded, since a corpus of
    books has a long document in every line.
    """

    MOST = 512
    MOST_BYTES = 2**26  # together; a single document may be larger

    def __init__(self) -> None:
        self.held: dict[Any, LongLine] = {}

    def find(self, key: Any) -> LongLine | None:
        return self.held.get(key)

    def keep(self, key: Any, line: LongLine) -> None:
        held, size = {key: line}, line.nbytes
        for other, entry in self.held.items():
            size += entry.nbytes
            if size <= self.MOST_BYTES and len(held) < self.MOST and other != key:
                held[other] = entry
        self.held = held


class SpanReader:
    """Reads spans of one file's documents from its text."""

    id_offset = 0  # of the format, in which id 0 is never learned

    def __init__(self, file: BinFile, long: LongLines) -> None:
        self.file = file
        self.long = long
        self._rows: MetaRows | None = None

    def read(self, span_arrays: SpanArrays, vocab_size: int | None = None) -> tuple[Int64s, int | None]:
        """Signed tokens of spans, end to end, and the token after the last one in its document.

        All but the first and the last span are whole documents. Raises: DataError if a line is not what the format and
        the meta say, an id is not below `vocab_size`, or a file is not what it was.
        """
        spans = [span for span in span_arrays.as_list() if span.start < span.stop]
        try:
            parts = self._parts(spans, vocab_size)
        except DataError:
            self.file.check_unchanged()  # if it has changed just now, that is what to say
            raise
        goes_on = spans[-1].stop < spans[-1].length
        tokens = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return (tokens[:-1], int(tokens[-1])) if goes_on else (tokens, None)

    def _parts(self, spans: list[Span], vocab_size: int | None) -> list[Int64s]:
        with self.file.open() as text, self.file.open_meta() as meta:
            if self._rows is None:
                self._rows = MetaRows(meta, self.file)
            rows = [self._row(meta, span) for span in spans]
            parts = []
            ends = (0, len(spans) - 1)  # those between are whole documents, and read with their neighbours
            for is_long, group in groupby(range(len(spans)), lambda i: i in ends and spans[i].length > LONG):
                numbers = list(group)
                if is_long:
                    parts += [self._part(text, rows[i], spans[i], vocab_size) for i in numbers]
                else:
                    taken = slice(numbers[0], numbers[-1] + 1)
                    parts.append(self._whole(text, rows[taken], spans[taken], vocab_size))
            return parts

    def _row(self, meta: BinaryIO, span: Span) -> tuple[int, int]:
        """(byte offset, bytes up to the next row's line, 0 if that is not known)."""
        assert self._rows is not None
        offset, length, after = self._rows.read(meta, span.row)
        if length != span.length or offset < 0:
            raise self.file.changed_error(
                self.file.path, f"row {span.row} of its meta says {length}, not {span.length}"
            )
        size = after - offset
        return offset, size if 0 < size <= 64 + 16 * length else 0

    def _whole(
        self, text: BinaryIO, rows: list[tuple[int, int]], spans: Sequence[Span], vocab_size: int | None
    ) -> Int64s:
        """The spans' documents parsed together, cut to the spans and the token after the last."""
        fd = text.fileno()
        lines = []
        for (offset, size), span in zip(rows, spans, strict=True):
            line = os.pread(fd, size, offset) if size else b""
            if not size or line.find(b"\n") != size - 1:
                line = read_line(text, offset, span.length)
            lines.append(line)
        tokens, counts = parse_lines(lines) or (None, [])
        if tokens is None or counts != [span.length for span in spans]:
            parts = []
            for line, (offset, _), span in zip(lines, rows, spans, strict=True):
                parts.append(parse_line(line, where=f"{self.file.path}:{offset}"))
                self.file.check_document(parts[-1], span.row, offset, span.length)
            tokens = np.concatenate(parts)
        if vocab_size is not None and max(int(tokens.max()), -int(tokens.min())) >= vocab_size:
            at = 0
            for (offset, _), span in zip(rows, spans, strict=True):
                document = tokens[at : at + span.length]
                self.file.check_document(document, span.row, offset, span.length, vocab_size)
                at += span.length
        last = spans[-1]
        return tokens[spans[0].start : len(tokens) - max(last.length - last.stop - 1, 0)]

    def _part(self, text: BinaryIO, row: tuple[int, int], span: Span, vocab_size: int | None) -> Int64s:
        """A span of a long document, and the token after it if there is one."""
        offset, key = row[0], (self.file.name, span.row)
        line = self.long.find(key)
        if line is None:
            line = self._note(text, offset, span)
            self.long.keep(key, line)
        stop = min(span.stop + 1, span.length)
        if line.tokens is not None:
            tokens = line.tokens[span.start : stop]
        else:
            tokens = self._cut(text, line, span.row, span.start, stop, f"{self.file.path}:{offset}")
        if len(tokens) != stop - span.start:
            raise self._content_error(span.row)
        self.file.check_ids(tokens, f"{self.file.path}:{offset} (document {span.row})", vocab_size)
        return tokens

    def _content_error(self, row: int) -> DataError:
        return self.file.changed_error(self.file.path, f"document {row} does not hold what it held")

    def _note(self, text: BinaryIO, offset: int, span: Span) -> LongLine:
        """Go through a long line once. Raises: DataError if it has not `span.length` tokens."""
        fd = text.fileno()
        head = next((h for h in HEADS if os.pread(fd, len(h), offset) == h), None)
        where = f"{self.file.path}:{offset}"
        line, at, commas = LongLine(), offset + len(head or b""), 0
        while head and (block := os.pread(fd, BLOCK, at)):
            line.commas.append(commas)
            line.bytes.append(at)
            end = block.find(b"]")
            whole = np.frombuffer(block, np.uint8)[: end if end >= 0 else None]
            commas += int(np.count_nonzero(whole == ord(",")))
            if b"\n" in (block if end < 0 else block[:end]):
                break
            if end >= 0:
                line.end = at + end
                rest = os.pread(fd, 3, line.end + 1)
                if rest in _TAIL or rest.startswith(b"}\n"):
                    if commas + 1 != span.length:
                        raise self.file.count_error(commas + 1, span.length, f"{where} (document {span.row})")
                    return line
                break
            at += len(block)
        raw = read_line(text, offset, span.length, ODD_LINE)
        if len(raw) > ODD_LINE:
            raise DataError(
                f"a line of more than {ODD_LINE:,} bytes is not in the usual form",
                where=where,
                why='a line of this size is read in parts, for which it must be {"tokens": [1, -2, 3]}',
                do="write the file again with `xtuner data tokenize`",
            )
        tokens = parse_line(raw, where=where)
        self.file.check_document(tokens, span.row, offset, span.length)
        return LongLine(tokens=tokens)

    def _cut(self, text: BinaryIO, line: LongLine, row: int, start: int, stop: int, where: str) -> Int64s:
        """Tokens `start` to `stop` of a line whose commas are known: the n-th comma stands before token n."""
        first = max(bisect.bisect_left(line.commas, start) - 1, 0)
        last = bisect.bisect_left(line.commas, stop)  # the first block that begins behind the comma we end at
        end = line.bytes[last] if last < len(line.bytes) else line.end
        raw = os.pread(text.fileno(), end - line.bytes[first], line.bytes[first])
        commas = np.flatnonzero(np.frombuffer(raw, np.uint8) == ord(","))
        before, behind = start - line.commas[first] - 1, stop - line.commas[first] - 1
        if before >= len(commas):
            raise self._content_error(row)
        begin = int(commas[before]) + 1 if start else 0
        part = raw[begin : int(commas[behind]) if behind < len(commas) else len(raw)]
        part = part.removeprefix(b" ") if start else part
        tokens = parse_list(part)
        if tokens is None:
            return parse_line(HEADS[0] + part + b"]}", where=where)  # says what is wrong
        return tokens
