"""Reads all documents of a file of any kind in its own order, some at a time, for the tools of `xtuner data`."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from xtuner.data.format.document_file import DocumentFile, FileKind
from xtuner.data.format.parse_tokens import Int64s
from xtuner.data.format.text_reader import LongLines, SpanArrays

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


class Documents(NamedTuple):
    lengths: Int64s  # of n documents
    ids: Int64s  # of all, end to end
    learned: npt.NDArray[np.bool_]


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
