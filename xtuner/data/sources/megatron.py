"""Megatron's indexed datasets: `.bin` / `.idx` pairs, as megatron-core's `IndexedDatasetBuilder` writes them.

    NAME.bin    the tokens of all sequences, as numbers of one type
    NAME.idx    "MMIDIDX\\0\\0"  uint64 version 1  uint8 code of the type  uint64 sequences n  uint64 d
                int32 [n] tokens of each sequence   int64 [n] byte of the .bin at which it begins
                int64 [d] first sequence of each document, and the end   int8 [n] modes (multimodal data only)

A document is what ended with `end_document`: usually one sequence, with --split-sentences several. If nothing did, each
sequence is a document. The format has no place for a loss mask. What exists in practice is a second pair with as many
values: labels (GPT-NeoX's `label_data_paths`: the id, or -100) or a mask of 0 and 1. Such a pair is found by its name,
NAME_labels or NAME_loss_mask.
"""

import hashlib
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from xtuner.core.errors import DataError
from xtuner.core.foreign_inputs import open_regular
from xtuner.data.format.document_file import DocumentFile
from xtuner.data.format.parse_tokens import Int64s
from xtuner.data.format.text_reader import SpanArrays
from xtuner.data.sources.columns import AUTO, ID_OFFSET, Columns, Role
from xtuner.data.sources.raw_reader import RawColumn, RawReader, read_numbers

MAGIC, OLDER = b"MMIDIDX\0\0", b"TNTIDX\0\0"
HEAD = struct.Struct("<9sQBQQ")
TYPES = {1: "|u1", 2: "|i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
ENDINGS: dict[str, tuple[str, ...]] = {"labels": ("_labels",), "mask": ("_loss_mask", "_mask")}
_AGAIN = "copy the pair again, or write it again with the tool that made it"


def idx_path(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(".bin") + ".idx")


class IndexHead(NamedTuple):
    """The head of an `.idx`, and where its arrays begin."""

    dtype: str
    sequences: int
    borders: int  # entries of the document index

    @property
    def pointers_begin(self) -> int:
        return HEAD.size + 4 * self.sequences

    @property
    def borders_begin(self) -> int:
        return HEAD.size + 12 * self.sequences


def read_head(path: Path) -> IndexHead:
    """Of the `.idx` of the pair with this `.bin`. Raises: DataError."""
    idx = idx_path(path)
    try:
        with open_regular(idx) as f:
            return _parse_head(idx, f.read(HEAD.size), os.fstat(f.fileno()).st_size)
    except OSError as e:
        raise _access_error(path, e) from None


def _access_error(path: Path, e: OSError) -> DataError:
    if isinstance(e, FileNotFoundError):
        what, why = "has no .idx", "the .idx says where each document begins"
    else:
        what, why = "has an .idx that cannot be read", e.strerror or str(e)
    return DataError(f"{path.name} {what}", where=str(idx_path(path)), why=why, do=_AGAIN)


def read_lengths(path: Path) -> Int64s:
    """Tokens of each document of the pair with this `.bin`.

    Raises: DataError if its `.idx` is damaged, or describes more or less than the `.bin`.
    """
    idx = idx_path(path)
    try:
        with open_regular(idx) as f:
            dtype, n, d = _parse_head(idx, f.read(HEAD.size), os.fstat(f.fileno()).st_size)
            lengths = np.fromfile(f, "<i4", n).astype(np.int64)
            pointers, borders = np.fromfile(f, "<i8", n), np.fromfile(f, "<i8", d)
    except OSError as e:
        raise _access_error(path, e) from None
    if len(lengths) < n or len(pointers) < n or len(borders) < d:
        raise DataError("the .idx was cut short while it was read", where=str(idx), do=_AGAIN)
    _check_sequences(path, idx, lengths, pointers, np.dtype(dtype).itemsize)
    if d < 2 and n:  # `end_document` was never called
        return lengths
    if n and (borders[0] != 0 or borders[-1] != n or (np.diff(borders) < 0).any()):
        raise DataError(
            f"the document index does not cover the sequences: {n:,} sequences, documents from {borders[0]:,} to "
            f"{borders[-1]:,}",
            where=f"{idx}:{HEAD.size + 12 * n}",
            why="end_document must be called after the last sequence of each document",
            do="write the pair again",
        )
    if not n:
        return lengths
    _check_joined(idx, lengths, pointers, borders, np.dtype(dtype).itemsize)
    total = np.concatenate(([0], np.cumsum(lengths)))
    return np.diff(total[borders])


def _parse_head(idx: Path, head: bytes, size: int) -> IndexHead:
    """Raises: DataError."""
    if head[: len(OLDER)] == OLDER:
        raise DataError(
            "the .idx is of Megatron's older format, which cannot be read in parts",
            where=str(idx),
            do="write the data again with --dataset-impl mmap",
        )
    if len(head) < HEAD.size or not head.startswith(MAGIC):
        raise DataError("it is not the .idx of a Megatron dataset", where=f"{idx}:0", why="it begins otherwise")
    _, version, code, n, d = HEAD.unpack(head)
    if version != 1 or code not in TYPES:
        what = f"version {version}" if version != 1 else f"type code {code}"
        raise DataError(f"the .idx has {what}, which is not known", where=f"{idx}:{9 if version != 1 else 17}")
    right = HEAD.size + 12 * n + 8 * d
    if size not in (right, right + n):
        how = "cut short" if size < right else "longer than its arrays"
        raise DataError(f"the .idx is {how}: {size:,} bytes instead of {right:,}", where=f"{idx}:{size}", do=_AGAIN)
    return IndexHead(TYPES[code], n, d)


def _check_sequences(path: Path, idx: Path, lengths: Int64s, pointers: Int64s, each: int) -> None:
    """Raises: DataError unless the sequences are inside the `.bin`, up to its end."""
    size = os.path.getsize(path) if path.exists() else 0
    if len(wrong := np.flatnonzero((lengths < 0) | (pointers < 0))):
        i = int(wrong[0])
        raise DataError(
            f"sequence {i} has {lengths[i]} tokens from byte {pointers[i]} on", where=f"{idx}:{HEAD.size + 4 * i}"
        )
    over = pointers > size - lengths * each  # without overflow
    if len(wrong := np.flatnonzero(over)):
        i = int(wrong[0])
        raise DataError(
            f"sequence {i} of {int(lengths[i]):,} tokens begins at byte {int(pointers[i]):,}, and the .bin has "
            f"{size:,} bytes",
            where=f"{path}:{size}",
            why="the .bin is cut short, or the .idx belongs to another file",
            do=_AGAIN,
        )
    end = int((pointers + lengths * each).max(initial=0))
    if end != size:
        raise DataError(
            f"the .bin continues after the last sequence of its .idx: {size:,} bytes instead of {end:,}",
            where=f"{path}:{end}",
            why="the .idx is older than the .bin, or belongs to another file",
            do=_AGAIN,
        )


def _check_joined(idx: Path, lengths: Int64s, pointers: Int64s, borders: Int64s, each: int) -> None:
    """Raises: DataError unless the sequences of a document follow each other in the `.bin`."""
    apart = np.flatnonzero(pointers[1:] != pointers[:-1] + lengths[:-1] * each) + 1
    if len(inside := np.setdiff1d(apart, borders)):
        raise DataError(
            f"sequence {inside[0]} does not follow the one before it, which is of the same document",
            where=f"{idx}:{HEAD.size + 4 * len(lengths) + 8 * int(inside[0])}",
            do="write the pair again, document by document",
        )


@dataclass(frozen=True)
class MegatronFile(DocumentFile):
    """A pair, and the pair with its labels or mask if there is one."""

    columns: Columns = field(default_factory=Columns)

    @cached_property
    def companion(self) -> tuple[Role, Path] | None:
        """What the second pair contains, and its `.bin`."""
        roles: tuple[Role, ...] = ("labels", "mask")
        for role in roles:
            wanted = getattr(self.columns, role)
            other = self.columns.mask if role == "labels" else self.columns.labels
            if wanted is None or (wanted == AUTO and other not in (None, AUTO)):
                continue
            for ending in ENDINGS[role] if wanted == AUTO else (wanted,):
                path = self.path.with_name(f"{self.path.name.removesuffix('.bin')}{ending}.bin")
                if wanted != AUTO or os.path.exists(idx_path(path)):
                    return role, path
        return None

    @property
    def role(self) -> Role:
        return self.companion[0] if self.companion else ""

    @cached_property
    def parts(self) -> tuple[Path, ...]:
        own = self.path, idx_path(self.path)
        return (*own, self.companion[1], idx_path(self.companion[1])) if self.companion else own

    @cached_property
    def heads(self) -> tuple[IndexHead, ...]:
        """Of the pair, and of its companion."""
        return tuple(read_head(part) for part in self.parts[::2])

    @cached_property
    def all_lengths(self) -> Int64s:
        found = read_lengths(self.path)
        if self.companion is None:
            return found
        other = read_lengths(self.companion[1])
        n = min(len(found), len(other))
        differ = np.flatnonzero(found[:n] != other[:n])
        i = int(differ[0]) if len(differ) else n
        if i < max(len(found), len(other)):
            here, there = (int(x[i]) if i < len(x) else "no" for x in (found, other))
            raise DataError(
                f"document {i} has {here} tokens and {there} {self.role}",
                where=str(self.companion[1]),
                why=f"each token needs a value of the {self.role}",
                do=f"write both pairs from the same documents, or set {self.role}=None to learn every token",
            )
        return found

    @property
    def raw_columns(self) -> tuple[RawColumn, ...]:
        return tuple(RawColumn(2 * i, head.dtype) for i, head in enumerate(self.heads))

    def check(self) -> None:
        self.open().close()
        _ = self.all_lengths

    def begins(self, rows: npt.NDArray[Any], fds: Sequence[int]) -> list[Int64s]:
        """See `RawLayout.begins`."""
        found = []
        for i, head in enumerate(self.heads):
            path, fd, sequences = self.parts[2 * i + 1], fds[2 * i + 1], rows.astype(np.int64)
            if head.borders > 1:
                sequences = read_numbers(fd, path, "<i8", head.borders_begin + 8 * sequences)[:, 0]
            sequences = np.minimum(sequences, head.sequences - 1)  # an empty document at the end has none
            found.append(8 * read_numbers(fd, path, "<i8", head.pointers_begin + 8 * sequences)[:, 0].astype(np.int64))
        return found

    def identity(self) -> bytes:
        """sha256 over the sizes and ends of the `.bin`s, the complete `.idx`s, and min_length."""
        if self.facts:
            return self.facts.identity
        digest = hashlib.sha256(f"megatron {self.min_length} {self.role}\0".encode())
        for part in self.parts:
            try:
                with open_regular(part) as f:
                    if part.suffix == ".idx":
                        digest.update(hashlib.file_digest(f, "sha256").digest())
                        continue
                    size = os.fstat(f.fileno()).st_size
                    ends = os.pread(f.fileno(), 4096, 0) + os.pread(f.fileno(), 4096, max(size - 4096, 0))
                    digest.update(f"{size}\0".encode() + ends)
            except OSError as e:
                raise DataError(f"{part.name} cannot be read: {e.strerror}", where=str(part)) from None
        return digest.digest()

    def read(self, i: int, vocab_size: int | None = None) -> tuple[Int64s, npt.NDArray[np.bool_]]:
        return read_document(self, RawReader(self, self), i, vocab_size)


def read_document(
    file: DocumentFile, reader: Any, i: int, vocab_size: int | None = None
) -> tuple[Int64s, npt.NDArray[np.bool_]]:
    """(ids, learned) of a used document, by a `Reader` with an id_offset of 1."""
    row, length = i if file.kept is None else int(file.kept[i]), np.array([file.lengths[i]])
    if not length[0]:
        return np.zeros(0, np.int64), np.zeros(0, np.bool_)
    spans = SpanArrays(np.array([row], np.uint32), np.zeros(1, np.int64), length.copy(), length)
    signed, _ = reader.read(spans, vocab_size)
    return np.abs(signed).astype(np.int64) - ID_OFFSET, signed > 0
