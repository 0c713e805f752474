"""Reads all documents of a file of any kind in its own order, some at a time, for the tools of `xtuner data`."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from xtuner.data.format.document_file import DocumentFile, FileKind
from xtuner.data.format.parse_tokens import Int64s
from xtuner.data.format.text_reader import LongLines, SpanArrays
from xtuner.data.sources import decoded
from xtuner.data.sources.decoded import DecodedFile

TOKENS = 2**20  # of a range; a longer document is one


class DocumentRange(NamedTuple):
    """Used documents `first` to `last` of a file, for a worker process."""

    file: DocumentFile
    kind: FileKind
    rows: npt.NDArray[np.uint32]  # their numbers in the file
    lengths: Int64s

    @property
    def size(self) -> int:
        """Bytes that are read, roughly."""
        return 4 * int(self.lengths.sum())


class DecodedBlock(NamedTuple):
    """A block of a file that is decoded block by block, for a worker process."""

    file: DecodedFile
    block: Any


class Documents(NamedTuple):
    lengths: Int64s  # of n documents
    ids: Int64s  # of all, end to end
    learned: npt.NDArray[np.bool_]


Part = DocumentRange | DecodedBlock


def split_file(file: DocumentFile, kind: FileKind) -> Iterator[Part]:
    """All documents of a file, in order, without writing caches. Raises: DataError."""
    if isinstance(file, DecodedFile) and not file.is_mapped:
        yield from (DecodedBlock(file, block) for block in file.blocks())
    else:
        yield from split_documents(file.examine(), kind)


def count_parts(file: DocumentFile) -> int:
    """How many parts `split_file` yields, roughly. Raises: DataError."""
    if isinstance(file, DecodedFile) and not file.is_mapped:
        return len(file.blocks())
    return file.examine().num_tokens // TOKENS + 1


def is_large(file: DocumentFile) -> bool:
    """Whether a part of a file needs too much memory to be sent between processes. Raises: DataError."""
    if not isinstance(file, DecodedFile) or file.is_mapped:
        return False
    return max(map(file.block_bytes, file.blocks()), default=0) > decoded.MAX_SENT


def read_part(part: Part, vocab_size: int | None = None) -> Iterator[Documents]:
    """Raises: DataError for documents that contradict their format or index, or an id not below `vocab_size`."""
    if isinstance(part, DocumentRange):
        yield read_documents(part, vocab_size)
        return
    count = 0
    for lengths, signed in part.file.decode(part.block):
        ids = np.abs(signed).astype(np.int64) - part.file.id_offset
        if vocab_size is not None and len(ids) and int(ids.max()) >= vocab_size:
            i = int(np.flatnonzero(ids >= vocab_size)[0])
            row = count + int(np.searchsorted(np.cumsum(lengths), i, side="right"))
            part.file.check_ids(ids[i : i + 1], part.file.describe(part.block, row), vocab_size)
        count += len(lengths)
        yield Documents(lengths, ids, signed > 0)


def split_documents(file: DocumentFile, kind: FileKind) -> Iterator[DocumentRange]:
    """Ranges of about `TOKENS` tokens. Raises: DataError."""
    lengths = file.lengths
    rows = np.arange(len(lengths)) if file.kept is None else file.kept
    part = np.cumsum(lengths) // TOKENS
    borders = np.concatenate(([0], np.flatnonzero(np.diff(part)) + 1, [len(lengths)]))
    light = kind.file(file.path, file.name, file.min_length, file.facts)  # without what has been computed
    for first, last in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        if last > first:
            yield DocumentRange(light, kind, rows[first:last].astype(np.uint32), lengths[first:last])


def read_documents(part: DocumentRange, vocab_size: int | None = None) -> Documents:
    """Raises: DataError for documents that contradict their format or index, or an id not below `vocab_size`."""
    used = part.lengths > 0
    if not used.any():
        return Documents(part.lengths, np.zeros(0, np.int64), np.zeros(0, np.bool_))
    reader: Any = part.kind.reader(part.file, LongLines())
    lengths = part.lengths[used]
    spans = SpanArrays(part.rows[used], np.zeros(len(lengths), np.int64), lengths.copy(), lengths)
    signed, _ = reader.read(spans, vocab_size)
    return Documents(part.lengths, np.abs(signed).astype(np.int64) - reader.id_offset, signed > 0)
