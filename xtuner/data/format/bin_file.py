"""One `.bin` / `.bin.meta` pair, InternEvo's tokenized format.

    NAME.bin        one JSON object per line: {"tokens": [1, 320, -15, ...]}
                    a negative token is context only: no loss is computed for it
    NAME.bin.meta   npy integer array, one row per document: byte offset of its line, ..., number of tokens

id = abs(token); a token is learned if it is > 0, so id 0 is never learned.
"""

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from xtuner.core.errors import DataError
from xtuner.core.remote.path import RemotePath, open_any
from xtuner.data.format.document_file import DocumentFile
from xtuner.data.format.meta import meta_path, read_meta
from xtuner.data.format.parse_tokens import Int64s, parse_line
from xtuner.data.format.zeros import find_learned

_CHUNK = 2**20  # bytes per read where the length to read is unknown


def data_type(name: str) -> str:
    """The data type of a file: its first folder below the data folder; "." for files directly in the data folder."""
    return name.split("/")[0] if "/" in name else "."


@dataclass(frozen=True)
class BinFile(DocumentFile):
    """A `.bin` file with its meta."""

    learn_zero: bool = False  # see zeros.py
    by_ranges: bool = False  # of an object: read parts of the text from the server, not all of it to the cache

    @property
    def parts(self) -> tuple[Any, ...]:
        return self.path, meta_path(self.path)

    @cached_property
    def full_table(self) -> tuple[Int64s, Int64s]:
        """(byte offsets, token counts), int64 [n] each, of all documents of the file, used or not."""
        try:
            return read_meta(self.path)
        except (DataError, OSError):
            self.check_unchanged()  # if the file changed during the run, report that instead
            raise

    @property
    def all_lengths(self) -> Int64s:
        return self.full_table[1]

    @cached_property
    def offsets(self) -> Int64s:
        return self.full_table[0] if self.kept is None else self.full_table[0][self.kept]

    def identity(self) -> bytes:
        """sha256 over size, first and last 4 KiB of the text, the complete meta, and min_length.

        Raises: DataError: the text or the meta cannot be read.
        """
        if self.facts:
            return self.facts.identity
        try:
            with self._open_ranges() as f:
                size = f.seek(0, os.SEEK_END)
                ends = b""
                for begin in (0, max(size - 4096, 0)):
                    f.seek(begin)
                    ends += f.read(4096)
            with open_any(meta_path(self.path)) as f:
                meta = f.read()
        except OSError as e:
            raise DataError(f"{self.name} or its meta cannot be read: {e.strerror}", where=str(self.path)) from None
        return hashlib.sha256(f"{size} {self.min_length}\0".encode() + ends + meta).digest()

    def open(self) -> BinaryIO:
        return self._open_ranges() if self.by_ranges else super().open()

    def _open_ranges(self) -> BinaryIO:
        """The text, to read a little of it."""
        if not isinstance(self.path, RemotePath):
            return self.open()
        try:
            found: BinaryIO = self.path.open_part(self.facts and self.facts.signature[:2])
        except OSError as e:
            raise DataError(f"{self.path.name} cannot be opened: {e.strerror}", where=str(self.path)) from None
        return found

    def open_meta(self) -> BinaryIO:
        """The meta, as `open` opens the text."""
        return self.open_part(meta_path(self.path), self.facts and self.facts.signature[2:])

    def check(self) -> None:
        """Check that the text can be opened and ends where the last document of the meta ends. Raises: DataError."""
        with self._open_ranges() as f:
            offsets = self.full_table[0]
            last, end, closed = 0, 0, True
            if len(offsets):
                last = int(offsets[offsets.argmax()])
                end, closed = _line_end(f, last)
            beyond = _find_text(f, end)
        if not closed:
            raise DataError(
                "the last line is not complete",
                where=f"{self.path}:{last}",
                why="the .bin is cut short",
                do="write the file again",
            )
        if beyond is not None:
            raise DataError(
                "the .bin continues after the last document of its meta",
                where=f"{self.path}:{beyond}",
                why="the meta is older than the text, or belongs to another file",
                do="rebuild the meta from the text (xtuner data check FOLDER --fix-meta), or write the file again",
            )

    def read_document(self, document: int, vocab_size: int | None = None) -> Int64s:
        """Signed tokens of one document, int64 [length].

        Raises: DataError if the line contradicts the format or the meta, or an id is not below `vocab_size`.
        """
        offset, length = int(self.offsets[document]), int(self.lengths[document])
        with self.open() as f:
            line = read_line(f, offset, length)
        tokens = parse_line(line, where=f"{self.path}:{offset}")
        self.check_document(tokens, document, offset, length, vocab_size)
        return tokens

    def read(self, i: int, vocab_size: int | None = None) -> tuple[Int64s, npt.NDArray[np.bool_]]:
        """(ids, learned) of one document, both [length]. Raises: DataError."""
        signed = self.read_document(i, vocab_size)
        borders = np.array([0, len(signed)])
        return np.abs(signed), find_learned(signed, borders) if self.learn_zero else signed > 0

    def check_document(
        self, tokens: Int64s, document: int, offset: int, length: int, vocab_size: int | None = None
    ) -> None:
        """Raises: DataError if the number of tokens differs from the meta, or an id is not below `vocab_size`."""
        where = f"{self.path}:{offset} (document {document})"
        if len(tokens) != length:
            raise self.count_error(len(tokens), length, where)
        self.check_ids(tokens, where, vocab_size)

    def count_error(self, found: int, length: int, where: str) -> DataError:
        return DataError(
            f"a document has {found} tokens, its meta says {length}",
            where=where,
            why="all following packs of this file would be shifted",
            do="write the file again, or rebuild its meta from the text: xtuner data check FOLDER --fix-meta",
        )


def read_line(f: BinaryIO, offset: int, length: int, most: int | None = None) -> bytes:
    """Bytes from `offset` to the end of that line or of the file.

    Args:
        length: expected number of tokens, from which the first read is sized.
        most: stop soon after this many bytes.
    """
    f.seek(offset)
    size = 64 + 8 * length  # enough for most lines: 6 digits, a comma and a space per token
    size = size if most is None else min(size, most + 1)
    parts: list[bytes] = []
    total = 0
    while chunk := f.read(size):
        end = chunk.find(b"\n")
        if end >= 0:
            parts.append(chunk[:end])
            break
        parts.append(chunk)
        total += len(chunk)
        if most is not None and total > most:
            break
        size = max(size, _CHUNK)
    return b"".join(parts)


def _line_end(f: BinaryIO, offset: int) -> tuple[int, bool]:
    """(end of the line that begins at `offset`, whether it ends with `}`). Reads a chunk of the line at a time."""
    f.seek(offset)
    last = b""
    while chunk := f.read(_CHUNK):
        end = chunk.find(b"\n")
        part = chunk if end < 0 else chunk[:end]
        last = part.rstrip()[-1:] or last
        offset += len(part)
        if end >= 0:
            break
    return offset, last == b"}"


def _find_text(f: BinaryIO, offset: int) -> int | None:
    """Offset of the first byte from `offset` on that is not white space."""
    f.seek(offset)
    while chunk := f.read(_CHUNK):
        if text := chunk.lstrip():
            return offset + len(chunk) - len(text)
        offset += len(chunk)
    return None
