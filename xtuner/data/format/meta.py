"""`.bin.meta` files: an npy array of integers, one row per document of the `.bin`: byte offset, …, token count."""

import bisect
import math
import os
import re
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from xtuner.core.errors import DataError
from xtuner.core.foreign_inputs import short_repr
from xtuner.core.remote.path import AnyPath, exists_any, open_any, stat_any
from xtuner.data.format.parse_tokens import Int64s

MIN_TOKEN_BYTES = 2  # of a token in the text: a digit, and a comma or bracket


def meta_path(path: AnyPath) -> Any:
    return path.with_name(path.name + ".meta")


def read_meta(path: AnyPath) -> tuple[Int64s, Int64s]:
    """(byte offsets, token counts) of all documents of `path`, read from `path`.meta, int64 [n] each.

    The array has at least two columns; the first is the offset, the last the count. Raises: DataError if the meta is
    missing, is not such an array, or cannot belong to this file.
    """
    array = _load(path)
    if array.size == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    offsets, lengths = array[:, 0].astype(np.int64), array[:, -1].astype(np.int64)
    size = stat_any(path)[0]
    _check_meta(meta_path(path), size, offsets, lengths, array.dtype, _remedy(path))
    _check_total(path, int(lengths.sum()), size)
    return offsets, lengths


def _remedy(path: AnyPath) -> str:
    return f"write {path.name} again, or rebuild the meta from its text: xtuner data check FOLDER --fix-meta"


class NpyHeader(NamedTuple):
    """Header of an npy file. numpy's own reader is not used: it compiles the header as Python code, which can fail when
    two threads do so at once (CPython 3.11)."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    by_column: bool
    begin: int  # byte offset of the numbers

    @classmethod
    def read(cls, f: BinaryIO) -> "NpyHeader":
        """Raises: ValueError for anything else than an npy file of plain numbers."""
        start = f.read(12)
        if start[:6] != b"\x93NUMPY" or len(start) < 12:
            raise ValueError("it does not begin like one")
        size, begin = (2, 10) if start[6] == 1 else (4, 12)
        length = int.from_bytes(start[8 : 8 + size], "little")
        f.seek(begin)
        text = f.read(min(length, 2**16)).decode("latin-1")
        descr = re.search(r"'descr': *'([<>|=]?[a-zA-Z]\d*)'", text)
        order = re.search(r"'fortran_order': *(True|False)", text)
        shape = re.search(r"'shape': *\(([\d, ]*)\)", text)
        if not (descr and order and shape):
            raise ValueError("its header is damaged, or it does not contain plain numbers")
        dtype = np.dtype(descr[1])
        if dtype.hasobject:
            raise ValueError("it contains a pickle")
        if dtype.kind not in "iufb":
            raise ValueError(f"it contains {dtype}, not numbers")
        sizes = tuple(int(word) for word in shape[1].replace(",", " ").split())
        return cls(sizes, dtype, order[1] == "True", begin + length)


def _load(path: AnyPath, mapped: bool = False) -> npt.NDArray[Any]:
    """The array of a meta. Raises: DataError if it is missing or not a valid meta."""
    meta = meta_path(path)
    if not exists_any(meta):  # Path.exists raises for a name that is too long
        raise DataError(
            f"{path.name} has no meta",
            where=str(meta),
            why="the meta says where each document begins",
            do=_remedy(path),
        )
    try:
        with open_any(meta) as f:
            shape, dtype, by_column, begin = NpyHeader.read(f)
            count = math.prod(shape)
            size = os.fstat(f.fileno()).st_size
            if size != (right := begin + count * dtype.itemsize):
                how = "cut short" if size < right else "longer than its array"
                raise ValueError(f"it is {how}: {size:,} bytes instead of {right:,}")
            f.seek(begin)
            flat = np.memmap(f, dtype, "r", begin, (count,)) if mapped and count else np.fromfile(f, dtype, count)
            array: npt.NDArray[Any] = flat.reshape(shape, order="F" if by_column else "C")
    except OSError as e:
        raise DataError(f"the meta cannot be read: {e.strerror or e}", where=str(meta), do=_remedy(path)) from None
    except (ValueError, TypeError) as e:
        raise DataError(f"the meta is not an npy array: {e}", where=str(meta), do=_remedy(path)) from None
    if array.size and (array.ndim != 2 or array.shape[1] < 2 or array.dtype.kind not in "iu"):
        raise DataError(
            f"the meta is {array.dtype} of shape {short_repr(array.shape)}, not integers of shape (documents, 2)",
            where=str(meta),
            do=_remedy(path),
        )
    return array


class MetaView:
    """A mapped meta, for tools that process it in blocks.

    Raises: DataError as `read_meta` does, for errors that show without reading the complete array.
    """

    ROWS = 2**20

    def __init__(self, path: AnyPath) -> None:
        self.path = path
        array = _load(path, mapped=True)
        array = array if array.size else np.zeros((0, 2), np.int64)
        self.offsets: npt.NDArray[Any] = array[:, 0]
        self.lengths: npt.NDArray[Any] = array[:, -1]
        self.dtype = array.dtype

    def __len__(self) -> int:
        return len(self.offsets)

    def check(self) -> None:
        """Raises: DataError for rows that cannot belong to this text. Sets `in_order`."""
        size = stat_any(self.path)[0]
        self.in_order = True
        before = -1
        tokens = 0
        for i in range(0, len(self), self.ROWS):
            offsets, lengths = (a[i : i + self.ROWS].astype(np.int64) for a in (self.offsets, self.lengths))
            _check_meta(meta_path(self.path), size, offsets, lengths, self.dtype, _remedy(self.path), i)
            tokens += int(lengths.sum())
            _check_total(self.path, tokens, size)
            self.in_order &= bool(before < offsets[0] and (np.diff(offsets) > 0).all())
            before = int(offsets[-1])

    def between(self, begin: int, end: int) -> npt.NDArray[np.int64]:
        """Rows (offset, count) of lines that begin in this byte range, int64 [n, 2]. The meta must be in order."""
        first, last = (bisect.bisect_left(self.offsets, at) for at in (begin, end))
        return np.stack((self.offsets[first:last], self.lengths[first:last]), axis=1).astype(np.int64)


def _check_meta(
    meta: AnyPath, size: int, offsets: Int64s, lengths: Int64s, dtype: np.dtype, remedy: str, first: int = 0
) -> None:
    if dtype.itemsize == 4 and (offsets.min() < 0 or (np.diff(offsets) < 0).any()):
        raise DataError(
            "byte offsets have overflowed 32 bits",
            where=str(meta),
            why="an int32 meta cannot describe a file beyond 2 GiB; documents would be read from wrong offsets",
            do=remedy,
        )
    if lengths.min() < 0:
        raise DataError(f"document {first + int(lengths.argmin())} has a negative length", where=str(meta), do=remedy)
    out = np.flatnonzero((offsets < 0) | (offsets >= size))
    if len(out):
        raise DataError(
            f"document {first + int(out[0])} begins at byte {int(offsets[out[0]])}, but the .bin has {size} bytes",
            where=str(meta),
            why="the .bin is cut short, or the meta belongs to another file",
            do=remedy,
        )
    out = np.flatnonzero(lengths > (size - offsets) // MIN_TOKEN_BYTES)
    if len(out):
        raise DataError(
            f"document {first + int(out[0])} has {int(lengths[out[0]]):,} tokens by its meta, and the .bin has "
            f"{size - int(offsets[out[0]]):,} bytes from where it begins",
            where=str(meta),
            why="a token takes at least 2 bytes: the .bin is cut short, or the meta belongs to another file",
            do=remedy,
        )


def _check_total(path: AnyPath, tokens: int, size: int) -> None:
    """Reject a meta whose token counts together cannot fit into the text, such as one with repeated rows."""
    if tokens > size // MIN_TOKEN_BYTES:
        raise DataError(
            f"the meta counts at least {tokens:,} tokens, and the .bin has {size:,} bytes",
            where=str(meta_path(path)),
            why="a token takes at least 2 bytes: the meta belongs to another file, or repeats rows",
            do=_remedy(path),
        )
