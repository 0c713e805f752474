"""Arrow files with a column of ids, one document a row: IPC streams, as Hugging Face's `save_to_disk` writes them, and
IPC files (Feather).

Their tokens lie in the file as plain numbers. pyarrow says once where (20 to 60 bytes for each record batch); after
that they are read without it. A compressed file is decoded into a cache instead (decoded.py).
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from xtuner.core.errors import DataError, XTunerError
from xtuner.core.foreign_inputs import open_regular
from xtuner.data.format.parse_tokens import Int64s
from xtuner.data.sources.arrow_lists import choose_columns, decode_batch, import_pyarrow, require_unpadded, take_list
from xtuner.data.sources.columns import Role
from xtuner.data.sources.decoded import BlockReader, Decoded, DecodedFile, DecodedTokens, damaged
from xtuner.data.sources.raw_reader import BIT, RawColumn, RawReader, read_numbers

FILE_MAGIC = b"ARROW1"
END = b"\xff\xff\xff\xff\0\0\0\0"  # of a stream: one without it may be cut short between two batches
ROWS = 2**16  # of offsets, read at once


class Lists(NamedTuple):
    """Where a column of lists lies, for each of n batches."""

    dtype: str
    offset_type: str
    size: int  # of fixed-size lists; else -1
    offsets: Int64s  # byte of the file at which the offsets begin, [n]
    values: Int64s  # bit of the file at which the values begin, [n]


class Layout(NamedTuple):
    firsts: Int64s  # first row of each batch, and the number of rows, [n + 1]
    lists: tuple[Lists, ...]  # of ids, and of labels or a mask
    role: Role


@dataclass(frozen=True)
class ArrowFile(DecodedFile):
    @cached_property
    def layout(self) -> Layout | None:
        """None for a compressed file. Raises: DataError."""
        pa, where = import_pyarrow(), str(self.path)
        firsts = [0]
        places: list[list[tuple[int, int]]] = []
        with self._batches() as (schema, batches, base, size):
            chosen = choose_columns(pa, schema, self.columns, where)
            names = [n for n in (chosen.ids, chosen.learned) if n]
            for i, batch in enumerate(batches):
                if i == 0:
                    require_unpadded(batch, self.columns, chosen, where)
                if not self.facts:
                    for name in names:
                        batch.column(name).validate(full=True)  # offsets that lead elsewhere would be followed
                found = [_locate(pa, batch.column(name), base, size) for name in names]
                if None in found:
                    return None
                for name in names:  # nulls have no place in a mask of bits either
                    if batch.column(name).null_count or batch.column(name).values.null_count:
                        take_list(pa, batch.column(name), name, firsts[-1], where)
                places.append([place for place in found if place])
                firsts.append(firsts[-1] + len(batch))
        table = np.array(places, np.int64).reshape(len(places), len(names), 2)
        lists = []
        for i, name in enumerate(names):
            kind = schema.field(name).type
            dtype = BIT if pa.types.is_boolean(kind.value_type) else np.dtype(kind.value_type.to_pandas_dtype()).str
            width = "<i8" if pa.types.is_large_list(kind) else "<i4"
            fixed = kind.list_size if pa.types.is_fixed_size_list(kind) else -1
            lists.append(Lists(dtype, width, fixed, table[:, i, 0].copy(), table[:, i, 1].copy()))
        return Layout(np.array(firsts, np.int64), tuple(lists), chosen.role)

    @contextmanager
    def _batches(self) -> Iterator[tuple[Any, Iterator[Any], int, int]]:
        """(schema, record batches, address at which the file is mapped, its size)."""
        pa = import_pyarrow()
        with self.open() as f:  # reports one that cannot be opened
            magic, size = f.read(len(FILE_MAGIC)), os.fstat(f.fileno()).st_size
            ending = os.pread(f.fileno(), len(END), max(size - len(END), 0))
        if magic != FILE_MAGIC and ending != END:
            raise damaged(self.path, f":{size}", ValueError("the stream has no end"))
        row = 0
        try:
            with pa.memory_map(str(self.path)) as mapped:
                base = mapped.read_buffer().address if size else 0
                mapped.seek(0)
                reader = pa.ipc.open_file(mapped) if magic == FILE_MAGIC else pa.ipc.open_stream(mapped)

                def batches() -> Iterator[Any]:
                    nonlocal row
                    count = reader.num_record_batches if magic == FILE_MAGIC else None
                    for batch in map(reader.get_batch, range(count)) if count is not None else reader:
                        yield batch
                        row += len(batch)

                yield reader.schema, batches(), base, size
        except XTunerError:
            raise
        except Exception as e:  # pyarrow raises many kinds of errors for damaged data
            raise damaged(self.path, f", row {row}", e) from None

    def blocks(self) -> list[int]:
        """The file, as one block: a stream cannot be read from the middle."""
        return [0]

    def decode(self, block: int) -> Iterator[Decoded]:
        pa, row, where = import_pyarrow(), 0, str(self.path)
        with self._batches() as (schema, batches, _, _):
            chosen = choose_columns(pa, schema, self.columns, where)
            for batch in batches:
                if row == 0:
                    require_unpadded(batch, self.columns, chosen, where)
                yield decode_batch(pa, batch, chosen, row, where)
                row += len(batch)

    def block_bytes(self, block: int) -> int:
        return 4 * self.path.stat().st_size

    def describe(self, block: int, i: int) -> str:
        return f"{self.path}, row {i}"

    @cached_property
    def all_lengths(self) -> Int64s:
        if self.layout is None:
            return DecodedFile.all_lengths.func(self)  # type: ignore[attr-defined]
        with self.open() as f:
            found = [self._lengths(f.fileno(), part) for part in range(len(self.layout.lists))]
        for other in found[1:]:
            if len(differ := np.flatnonzero(other != found[0])):
                row = int(differ[0])
                raise DataError(
                    f"a document has {found[0][row]} ids and {other[row]} {self.layout.role}",
                    where=f"{self.path}, row {row}",
                )
        return found[0]

    def _lengths(self, fd: int, column: int) -> Int64s:
        """Tokens of each document, by one column."""
        assert self.layout is not None
        firsts, lists = self.layout.firsts, self.layout.lists[column]
        if lists.size >= 0:
            return np.full(int(firsts[-1]), lists.size, np.int64)
        parts = [np.zeros(0, np.int64)]
        for i, begin in enumerate(lists.offsets.tolist()):
            count = int(firsts[i + 1] - firsts[i])
            if count:
                offsets = read_numbers(fd, self.path, lists.offset_type, np.array([begin]), count + 1)[0]
                parts.append(np.diff(offsets.astype(np.int64)))
                if parts[-1].min() < 0 or offsets[0] < 0:
                    raise damaged(self.path, f":{begin}", ValueError("the offsets of a list decrease"))
        return np.concatenate(parts)

    def check(self) -> None:
        if self.layout is None:
            super().check()

    def identity(self) -> bytes:
        """sha256 over size, first and last 4 KiB of the file, lengths, role and min_length."""
        if self.facts:
            return self.facts.identity
        if self.layout is None:
            return super().identity()
        with open_regular(self.path) as f:
            size = os.fstat(f.fileno()).st_size
            ends = os.pread(f.fileno(), 4096, 0) + os.pread(f.fileno(), 4096, max(size - 4096, 0))
        head = f"arrow {size} {self.min_length} {self.layout.role} {[x.dtype for x in self.layout.lists]}\0"
        return hashlib.sha256(head.encode() + ends + self.all_lengths.data).digest()

    def make_reader(self) -> DecodedTokens | BlockReader | RawReader:  # type: ignore[override]
        self.check_unchanged()
        return super().make_reader() if self.layout is None else RawReader(self, self)

    @property
    def is_mapped(self) -> bool:
        return self.layout is not None

    @property
    def raw_columns(self) -> tuple[RawColumn, ...]:
        assert self.layout is not None
        return tuple(RawColumn(0, lists.dtype) for lists in self.layout.lists)

    @property
    def role(self) -> Role:
        return self.layout.role if self.layout else ""

    def begins(self, rows: npt.NDArray[Any], fds: Sequence[int]) -> list[Int64s]:
        """See `RawLayout.begins`."""
        assert self.layout is not None
        firsts = self.layout.firsts
        batch = np.searchsorted(firsts, rows, side="right") - 1
        inside = rows.astype(np.int64) - firsts[batch]
        found = []
        for column, lists in zip(self.raw_columns, self.layout.lists, strict=True):
            if lists.size >= 0:
                values = inside * lists.size
            else:
                width = np.dtype(lists.offset_type).itemsize
                places = lists.offsets[batch] + inside * width
                values = read_numbers(fds[0], self.path, lists.offset_type, places)[:, 0].astype(np.int64)
            found.append(lists.values[batch] + values * column.bits)
        return found


def _locate(pa: Any, array: Any, base: int, size: int) -> tuple[int, int] | None:
    """(byte of the file at which the offsets of an array of lists begin, bit at which its values begin); None if they
    do not lie in the file, as those of a compressed one do not."""
    fixed = pa.types.is_fixed_size_list(array.type)
    buffers = array.buffers()  # validity, offsets unless fixed, validity of the values, values
    child = array.values
    bits = 1 if pa.types.is_boolean(array.type.value_type) else array.type.value_type.bit_width
    values, begin = buffers[-1], child.offset
    offsets, at = None if fixed else buffers[1], 0
    if fixed:
        begin += array.offset * array.type.list_size
    else:
        at = array.offset * (8 if pa.types.is_large_list(array.type) else 4)
    needed = [b for b in (offsets, values) if b is not None and b.size]
    if any(not base <= b.address <= base + size - b.size for b in needed):
        return None
    if not fixed and len(array) and (offsets is None or not offsets.size):
        return None
    where_offsets = offsets.address - base + at if offsets is not None and offsets.size else 0
    where_values = 8 * (values.address - base) if values is not None and values.size else 0
    return where_offsets, where_values + begin * bits
