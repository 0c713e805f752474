"""Reads tokens of parts of documents from the text of a `.bin`, located by the rows of its meta.

A pack contains parts of some dozens of documents. Their lines are read one by one and parsed together. A document
longer than `LONG` tokens is never read completely: its commas are counted once per block of bytes, after which each
pack reads only the blocks that it needs.
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
from xtuner.core.remote.path import RangeFile, pread_any
from xtuner.core.remote.store import ChangedObjectError
from xtuner.data.format.bin_file import BinFile, read_line
from xtuner.data.format.meta import NpyHeader
from xtuner.data.format.parse_tokens import HEADS, Int64s, parse_line, parse_lines, parse_list
from xtuner.data.format.zeros import find_learned

LONG = 2**15  # tokens
BLOCK = 2**18  # bytes of a long line between two entries of its comma index
MAX_ODD_LINE = 2**26  # bytes; a longer line must be in the usual form (parse_tokens.py)
_TWO_ROWS = struct.Struct("<4q")
_TAIL = (b"}", b"}\n", b"}\r\n")


class Span(NamedTuple):
    """Tokens `start` to `stop` of the document in this row of the meta, which has `length` tokens."""

    row: int
    start: int
    stop: int
    length: int


class SpanArrays(NamedTuple):
    """n spans as arrays [n]; the last span is not empty."""

    rows: npt.NDArray[np.uint32]
    starts: Int64s
    stops: Int64s
    lengths: Int64s

    def as_list(self) -> list[Span]:
        return list(map(Span, *(array.tolist() for array in self)))


class MetaRows:
    """Reads single rows of a meta: (byte offset, token count, byte offset of the next row's line or -1)."""

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
    """Index of a long document in the usual form: `commas[i]` commas precede byte `bytes[i]`. For a document in any
    other form its `tokens` instead."""

    end: int = 0  # byte offset of the closing bracket
    commas: list[int] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    tokens: Int64s | None = None

    @property
    def nbytes(self) -> int:
        return 64 * len(self.commas) + (0 if self.tokens is None else self.tokens.nbytes)


class LongLines:
    """Indexes of the long documents read last.

    `held` is replaced, never modified: threads need no lock, and at worst lose an entry. Bounded, because in a corpus
    of books every line is a long document.
    """

    MAX_LINES = 512
    MAX_BYTES = 2**26  # of all entries; a single one may be larger

    def __init__(self) -> None:
        self.held: dict[Any, LongLine] = {}

    def find(self, key: Any) -> LongLine | None:
        return self.held.get(key)

    def add(self, key: Any, line: LongLine) -> None:
        held, size = {key: line}, line.nbytes
        for other, entry in self.held.items():
            size += entry.nbytes
            if size <= self.MAX_BYTES and len(held) < self.MAX_LINES and other != key:
                held[other] = entry
        self.held = held


class SpanReader:
    """Reads spans of one file's documents from its text; see `Reader` in packing/document_source.py."""

    id_offset = 0  # the format cannot mark id 0 as learned

    def __init__(self, file: BinFile, long: LongLines) -> None:
        self.file = file
        self.long = long
        self._rows: MetaRows | None = None

    def read(self, span_arrays: SpanArrays, vocab_size: int | None = None) -> tuple[Int64s, int | None]:
        """(signed tokens of the spans end to end, the token after the last one in its document or None).

        All spans except the first and the last are complete documents. Raises: DataError if a line contradicts the
        format or the meta, an id is not below `vocab_size`, or a file changed since it was examined.
        """
        spans = [span for span in span_arrays.as_list() if span.start < span.stop]
        try:
            parts = self._parts(spans, vocab_size)
        except ChangedObjectError:
            raise self.file.changed_error(self.file.path, "the object is not the one that was listed") from None
        except FileNotFoundError:
            raise DataError(f"{self.file.name} has been removed", where=str(self.file.path)) from None
        except DataError:
            self.file.check_unchanged()  # if the file changed during the run, report that instead
            raise
        continues = spans[-1].stop < spans[-1].length
        tokens = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return (tokens[:-1], int(tokens[-1])) if continues else (tokens, None)

    def _parts(self, spans: list[Span], vocab_size: int | None) -> list[Int64s]:
        with self.file.open() as text, self.file.open_meta() as meta:
            if self._rows is None:
                self._rows = MetaRows(meta, self.file)
            rows = [self._row(meta, span) for span in spans]
            if isinstance(text, RangeFile):
                short = zip(rows, spans, strict=True)
                text.load(sorted((at, at + size) for (at, size), span in short if size and span.length <= LONG))
            parts = []
            ends = (0, len(spans) - 1)  # spans between are complete documents, read together with their neighbours
            for is_long, group in groupby(range(len(spans)), lambda i: i in ends and spans[i].length > LONG):
                numbers = list(group)
                if is_long:
                    parts += [self._read_long(text, rows[i], spans[i], vocab_size) for i in numbers]
                else:
                    taken = slice(numbers[0], numbers[-1] + 1)
                    parts.append(self._read_short(text, rows[taken], spans[taken], vocab_size))
            return parts

    def _row(self, meta: BinaryIO, span: Span) -> tuple[int, int]:
        """(byte offset, bytes up to the next row's line or 0 if unknown)."""
        assert self._rows is not None
        offset, length, after = self._rows.read(meta, span.row)
        if length != span.length or offset < 0:
            raise self.file.changed_error(
                self.file.path, f"row {span.row} of its meta says {length}, not {span.length}"
            )
        size = after - offset
        return offset, size if 0 < size <= 64 + 16 * length else 0

    def _read_short(
        self, text: BinaryIO, rows: list[tuple[int, int]], spans: Sequence[Span], vocab_size: int | None
    ) -> Int64s:
        """The documents parsed together, cut to the spans plus the token after the last."""
        lines = []
        for (offset, size), span in zip(rows, spans, strict=True):
            line = pread_any(text, size, offset) if size else b""
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

    def _read_long(self, text: BinaryIO, row: tuple[int, int], span: Span, vocab_size: int | None) -> Int64s:
        """A span of a long document, plus the token after it if there is one."""
        offset, key = row[0], (self.file.name, span.row)
        line = self.long.find(key)
        if line is None:
            line = self._index_line(text, offset, span)
            self.long.add(key, line)
        stop = min(span.stop + 1, span.length)
        if line.tokens is not None:
            tokens = line.tokens[span.start : stop]
        else:
            tokens = self._read_indexed(text, line, span.row, span.start, stop, f"{self.file.path}:{offset}")
        if len(tokens) != stop - span.start:
            raise self._content_error(span.row)
        self.file.check_ids(tokens, f"{self.file.path}:{offset} (document {span.row})", vocab_size)
        return tokens

    def _content_error(self, row: int) -> DataError:
        return self.file.changed_error(self.file.path, f"document {row} has other contents than before")

    def _index_line(self, text: BinaryIO, offset: int, span: Span) -> LongLine:
        """Read a long line once to count its commas. Raises: DataError if it does not have `span.length` tokens."""
        head = next((h for h in HEADS if pread_any(text, len(h), offset) == h), None)
        where = f"{self.file.path}:{offset}"
        line, at, commas = LongLine(), offset + len(head or b""), 0
        while head and (block := pread_any(text, BLOCK, at)):
            line.commas.append(commas)
            line.bytes.append(at)
            end = block.find(b"]")
            whole = np.frombuffer(block, np.uint8)[: end if end >= 0 else None]
            commas += int(np.count_nonzero(whole == ord(",")))
            if b"\n" in (block if end < 0 else block[:end]):
                break
            if end >= 0:
                line.end = at + end
                rest = pread_any(text, 3, line.end + 1)
                if rest in _TAIL or rest.startswith(b"}\n"):
                    if commas + 1 != span.length:
                        raise self.file.count_error(commas + 1, span.length, f"{where} (document {span.row})")
                    return line
                break
            at += len(block)
        raw = read_line(text, offset, span.length, MAX_ODD_LINE)
        if len(raw) > MAX_ODD_LINE:
            raise DataError(
                f"a line of more than {MAX_ODD_LINE:,} bytes is not in the usual form",
                where=where,
                why='a line of this size is read in parts, which needs the form {"tokens": [1, -2, 3]}',
                do="write the file again with `xtuner data tokenize`",
            )
        tokens = parse_line(raw, where=where)
        self.file.check_document(tokens, span.row, offset, span.length)
        return LongLine(tokens=tokens)

    def _read_indexed(self, text: BinaryIO, line: LongLine, row: int, start: int, stop: int, where: str) -> Int64s:
        """Tokens `start` to `stop` of an indexed line: n commas precede token n."""
        first = max(bisect.bisect_left(line.commas, start) - 1, 0)
        last = bisect.bisect_left(line.commas, stop)  # the first block that begins after the comma before token `stop`
        end = line.bytes[last] if last < len(line.bytes) else line.end
        raw = pread_any(text, end - line.bytes[first], line.bytes[first])
        commas = np.flatnonzero(np.frombuffer(raw, np.uint8) == ord(","))
        before, behind = start - line.commas[first] - 1, stop - line.commas[first] - 1
        if before >= len(commas):
            raise self._content_error(row)
        begin = int(commas[before]) + 1 if start else 0
        part = raw[begin : int(commas[behind]) if behind < len(commas) else len(raw)]
        part = part.removeprefix(b" ") if start else part
        tokens = parse_list(part)
        if tokens is None:
            return parse_line(HEADS[0] + part + b"]}", where=where)  # raises the appropriate error
        return tokens


class ZeroReader:
    """Another reader of a file, with `learn_zero` (zeros.py)."""

    id_offset = 1  # so that id 0 has a sign

    def __init__(self, reader: Any) -> None:
        self.reader = reader

    def read(self, span_arrays: SpanArrays, vocab_size: int | None = None) -> tuple[Int64s, int | None]:
        """See `Reader.read`."""
        signed, following = self.reader.read(span_arrays, vocab_size)
        lengths = span_arrays.stops - span_arrays.starts
        borders = np.concatenate(([0], np.cumsum(lengths)))
        if following is not None:  # the next token of the last fragment's document
            signed = np.append(signed, np.asarray(following, signed.dtype))
            borders[-1] += 1
        ids = np.abs(signed) + 1
        signed = np.where(find_learned(signed, borders), ids, -ids)
        return (signed, None) if following is None else (signed[:-1], int(signed[-1]))
