"""Reads documents whose tokens lie in a file as plain numbers: nothing is parsed or copied before they are needed.

Read with `pread`, as `.bin` files are: a file that is truncated while it is read gives an error, whereas a mapping of
it would end the process.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from xtuner.core.errors import DataError
from xtuner.data.format.document_file import DocumentFile, Signature
from xtuner.data.format.parse_tokens import Int64s
from xtuner.data.format.text_reader import SpanArrays
from xtuner.data.sources.columns import ID_OFFSET, Role, to_signed

BIT = "bit"  # type of a column of packed bools, the lowest bit first
LARGEST = 2**30  # bytes of one `pread`, which Linux limits to 2^31


class RawColumn(NamedTuple):
    """Values of one type: `part` is the number of their file among the parts of a `DocumentFile`."""

    part: int
    dtype: str

    @property
    def bits(self) -> int:
        return 1 if self.dtype == BIT else 8 * np.dtype(self.dtype).itemsize


class RawLayout(Protocol):
    """Where the tokens of a file lie."""

    @property
    def raw_columns(self) -> tuple[RawColumn, ...]:
        """Of the ids, and of labels or a mask if there are any."""

    @property
    def role(self) -> Role: ...

    def begins(self, rows: npt.NDArray[Any], fds: Sequence[int]) -> list[Int64s]:
        """For each column, the bit of its file at which each of these documents begins. `fds`: the open parts."""


class RawReader:
    """See `Reader` in packing/document_source.py."""

    id_offset = ID_OFFSET

    def __init__(self, file: DocumentFile, layout: RawLayout) -> None:
        self.file, self.layout = file, layout

    def read(self, span_arrays: SpanArrays, vocab_size: int | None = None) -> tuple[npt.NDArray[np.int32], int | None]:
        """See `Reader.read`."""
        rows, starts, stops, lengths = span_arrays
        counts = stops - starts
        continues = bool(stops[-1] < lengths[-1])
        counts[-1] += continues
        with self.open_parts() as fds:
            found = []
            begins = self.layout.begins(rows, fds)
            for column, begin in zip(self.layout.raw_columns, begins, strict=True):
                path = self.file.parts[column.part]
                found.append(read_values(fds[column.part], path, column, begin + starts * column.bits, counts))
        ends = np.cumsum(counts)

        def where(i: int) -> str:
            span = int(np.searchsorted(ends, i, side="right"))
            token = i - int(ends[span] - counts[span]) + int(starts[span])
            return f"{self.file.path}, document {rows[span]}, token {token}"

        signed = to_signed(found[0], found[1] if len(found) > 1 else None, self.layout.role, where)
        if vocab_size is not None and len(signed) and int(found[0].max()) >= vocab_size:
            i = int(np.flatnonzero(found[0] >= vocab_size)[0])
            self.file.check_ids(found[0][i : i + 1], where(i), vocab_size)
        return (signed[:-1], int(signed[-1])) if continues else (signed, None)

    @contextmanager
    def open_parts(self) -> Iterator[list[int]]:
        """Descriptors of all parts. Raises: DataError if one cannot be opened, or has changed since it was examined."""
        with ExitStack() as stack:
            fds = [stack.enter_context(self.file.open_part(part, None)).fileno() for part in self.file.parts]
            if self.file.facts:
                now = Signature.of([os.fstat(fd) for fd in fds])
                if now != self.file.facts.signature:
                    was = self.file.facts.signature
                    raise self.file.changed_error(
                        self.file.path, f"it had {was.size + was.meta_size:,} bytes and now has "
                        f"{now.size + now.meta_size:,}"
                    )  # fmt: skip
            yield fds


def read_values(fd: int, path: Any, column: RawColumn, begins: Int64s, counts: Int64s) -> npt.NDArray[Any]:
    """`counts` values each from these bits on, end to end. Raises: DataError if the file ends before."""
    if column.dtype == BIT:
        return _read_bits(fd, path, begins, counts)
    dtype = np.dtype(column.dtype)
    out = np.empty(int(counts.sum()), dtype)
    left = memoryview(out.view(np.uint8).data)
    begin = end = 0  # bytes that follow each other in the file are read at once
    for first, count in zip((begins // 8).tolist(), counts.tolist(), strict=True):
        if first != end and count:
            left = _fill(fd, path, left, begin, end)
            begin = end = first
        end += count * dtype.itemsize
    _fill(fd, path, left, begin, end)
    return out


def _fill(fd: int, path: Any, target: memoryview, begin: int, end: int) -> memoryview:
    """Read bytes `begin` to `end` of a file into a buffer. Returns the rest of it. Raises: DataError."""
    while begin < end:
        try:
            found = os.preadv(fd, [target[: min(end - begin, LARGEST)]], begin)
        except OSError as e:
            raise DataError(f"the file cannot be read: {e.strerror or e}", where=f"{path}:{begin}") from None
        if not found:
            raise DataError(
                "the file ends before its last document",
                where=f"{path}:{begin}",
                why="it is cut short, or its index belongs to another file",
                do="copy or write the file again",
            )
        target, begin = target[found:], begin + found
    return target


def _read_bits(fd: int, path: Any, begins: Int64s, counts: Int64s) -> npt.NDArray[np.bool_]:
    parts = [np.zeros(0, np.uint8)]
    for begin, count in zip(begins.tolist(), counts.tolist(), strict=True):
        if count:
            first, last = begin // 8, (begin + count + 7) // 8
            data = bytearray(last - first)
            _fill(fd, path, memoryview(data), first, last)
            bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
            parts.append(bits[begin % 8 : begin % 8 + count])
    return np.concatenate(parts).view(np.bool_)


def read_numbers(fd: int, path: Any, dtype: str, positions: Int64s, each: int = 1) -> npt.NDArray[Any]:
    """`each` consecutive numbers at each of these bytes, [n, each]."""
    column = RawColumn(0, dtype)
    found = read_values(fd, path, column, positions * 8, np.full(len(positions), each, np.int64))
    return found.reshape(len(positions), each)
