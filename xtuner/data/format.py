"""One `.bin` / `.bin.meta` pair, InternEvo's tokenized format.

    NAME.bin        one JSON object a line: {"tokens": [1, 320, -15, ...]}
                    a negative token stands for the id with its sign flipped, and is not learned
    NAME.bin.meta   npy integer array, one row a document: byte offset of its line, ..., number of tokens

id = abs(token); learned iff token > 0, so id 0 is never learned.
"""

import hashlib
import json
import os
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from xtuner.core.errors import DataError

Int64s = npt.NDArray[np.int64]
FAST_HEAD = b'{"tokens": ['
_LARGEST_ID = 2**31 - 1
_CHUNK = 2**20  # bytes a read, where the length of what is sought is not known


@dataclass(frozen=True)
class BinFile:
    """A `.bin` file and the documents of it that are used (those of at least `min_length` tokens)."""

    path: Path
    name: str  # relative to the data folder, POSIX style; what logs and data orders show
    min_length: int = 0

    @cached_property
    def whole_table(self) -> tuple[Int64s, Int64s]:
        """(byte offsets, token counts), one entry a document of the file, used or not."""
        return read_meta(self.path)

    @cached_property
    def table(self) -> tuple[Int64s, Int64s]:
        """(byte offsets, token counts), one entry a document that is used."""
        offsets, lengths = self.whole_table
        keep = lengths >= self.min_length
        return (offsets, lengths) if keep.all() else (offsets[keep], lengths[keep])

    @property
    def offsets(self) -> Int64s:
        return self.table[0]

    @property
    def lengths(self) -> Int64s:
        return self.table[1]

    @property
    def num_documents(self) -> int:
        return len(self.lengths)

    @cached_property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    def identity(self) -> bytes:
        """sha256 over the size, the ends of the text, the whole meta and min_length. Reads 8 KiB of the text.

        Raises: DataError: the text or the meta cannot be read.
        """
        return self._identity

    @cached_property
    def _identity(self) -> bytes:
        try:
            with self.open() as f:
                size = f.seek(0, os.SEEK_END)
                ends = os.pread(f.fileno(), 4096, 0) + os.pread(f.fileno(), 4096, max(size - 4096, 0))
            meta = meta_path(self.path).read_bytes()
        except OSError as e:
            raise DataError(f"{self.name} or its meta cannot be read: {e.strerror}", where=str(self.path)) from None
        return hashlib.sha256(f"{size} {self.min_length}\0".encode() + ends + meta).digest()

    def open(self) -> BinaryIO:
        """The text, unbuffered. Opened for each use: folders of more files than a process may hold open are common.

        Raises: DataError: a dangling link, no permission.
        """
        try:
            return open(self.path, "rb", buffering=0)
        except OSError as e:
            raise DataError(f"{self.name} cannot be opened: {e.strerror}", where=str(self.path)) from None

    def check(self) -> None:
        """Raise DataError unless the text can be opened and ends where the meta says its last document ends."""
        with self.open() as f:
            offsets, lengths = self.whole_table
            last, line = 0, b""
            if len(offsets):
                i = int(offsets.argmax())
                last = int(offsets[i])
                line = _read_line(f, last, int(lengths[i]))
            beyond = _find_text(f, last + len(line))
        if len(offsets) and not line.rstrip().endswith(b"}"):
            raise DataError(
                "the last line is not complete",
                where=f"{self.path}:{last}",
                why="the .bin is cut short",
                do="write the file again",
            )
        if beyond is not None:
            raise DataError(
                "the .bin goes on after the last document of its meta",
                where=f"{self.path}:{beyond}",
                why="the meta is older than the text, or belongs to another file",
                do=f"make a new {self.path.name}.meta from the text, or write the file again",
            )

    def read_document(self, document: int, vocab_size: int | None = None, text: BinaryIO | None = None) -> Int64s:
        """Signed tokens of one document, int64 [length]. `text`: what `open` gave, to read many from.

        Raises: DataError if the line is not what the format and the meta say, or an id is not below `vocab_size`.
        """
        offset, length = int(self.offsets[document]), int(self.lengths[document])
        with nullcontext(text) if text else self.open() as f:
            line = _read_line(f, offset, length)
        tokens = parse_line(line, where=f"{self.path}:{offset}")
        if len(tokens) != length:
            raise DataError(
                f"a document has {len(tokens)} tokens, its meta says {length}",
                where=f"{self.path}:{offset} (document {document})",
                why="every pack after it in this file would be shifted",
                do=f"write the file again, or make a new {self.path.name}.meta from the text",
            )
        if vocab_size is not None and length and (largest := int(np.abs(tokens).max())) >= vocab_size:
            raise DataError(
                f"token id {largest} is outside the vocabulary of {vocab_size}",
                where=f"{self.path}:{offset} (document {document})",
                why="the data were made with another tokenizer than the model's",
                do="tokenize the text again with the model's tokenizer, or take the model that belongs to the data",
            )
        return tokens


def _read_line(f: BinaryIO, offset: int, length: int) -> bytes:
    """Bytes from `offset` to the end of that line, or of the file. `length`: tokens it should hold."""
    f.seek(offset)
    size = 64 + 8 * length  # most lines fit: 6 digits, a comma and a space a token
    parts: list[bytes] = []
    while chunk := f.read(size):
        end = chunk.find(b"\n")
        if end >= 0:
            parts.append(chunk[:end])
            break
        parts.append(chunk)
        size = max(size, _CHUNK)
    return b"".join(parts)


def _find_text(f: BinaryIO, offset: int) -> int | None:
    """Where the first byte that is no white space stands, from `offset` on."""
    f.seek(offset)
    while chunk := f.read(_CHUNK):
        if text := chunk.lstrip():
            return offset + len(chunk) - len(text)
        offset += len(chunk)
    return None


def parse_line(line: bytes, where: str = "") -> Int64s:
    """Signed tokens of one line, int64 [n]. Numpy parses the usual form; all else goes to a full JSON parser.

    Raises: DataError.
    """
    body = line.strip()
    if body.startswith(FAST_HEAD) and body.endswith(b"]}"):
        numbers = body[len(FAST_HEAD) : -2]
        if _is_plain_list(numbers):
            tokens = np.fromstring(numbers, dtype=np.int64, sep=",")
            if len(tokens) == numbers.count(b",") + 1:
                return _in_range(tokens, where)
    return _parse_json(body, where)


def _is_plain_list(numbers: bytes) -> bool:
    """True for `1, -2,3` and the like: the forms on which numpy's parser and JSON agree.

    Numpy alone would read an empty element as 0 and ignore a comma at the end. Signs and spaces inside a number
    stop it early, which the count of commas then shows.
    """
    if numbers.translate(None, b"0123456789-, ") or not numbers[-1:].isdigit():
        return False
    tight = numbers.replace(b", ", b",")
    return b" " not in tight and b",," not in tight and not tight.startswith(b",") and b"-," not in tight


def _parse_json(body: bytes, where: str) -> Int64s:
    again = "write the file again with `xtuner data tokenize`"
    try:
        record = json.loads(body)
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        shown = body[:80].decode("utf-8", "replace")
        raise DataError(f"a line is not JSON: {e}; it begins {shown!r}", where=where, do=again) from None
    if not isinstance(record, dict) or "tokens" not in record:
        raise DataError('a line is not an object with the key "tokens"', where=where, do=again)
    values = record["tokens"]
    if not isinstance(values, list):
        raise DataError('"tokens" is not a list', where=where, do=again)
    wrong = [v for v in values if type(v) is not int]  # bool is an int to isinstance
    if wrong:
        raise DataError(f"a token is {wrong[0]!r}, not an integer", where=where, do=again)
    try:
        tokens = np.array(values, dtype=np.int64)
    except OverflowError:
        raise DataError("a token does not fit into 64 bits", where=where, do=again) from None
    return _in_range(tokens, where)


def _in_range(tokens: Int64s, where: str) -> Int64s:
    if len(tokens) and max(int(tokens.max()), -int(tokens.min())) > _LARGEST_ID:
        raise DataError("a token id is beyond 2^31 - 1", where=where, why="no vocabulary is that large")
    return tokens


def meta_path(path: Path) -> Path:
    return path.with_name(path.name + ".meta")


def read_meta(path: Path) -> tuple[Int64s, Int64s]:
    """(byte offsets, token counts) of all documents of `path`, read from `path`.meta, int64 [n] each.

    The array has at least two columns: the first is the offset, the last the count. Raises: DataError when the meta
    is missing, is no such array, or cannot belong to this file.
    """
    meta = meta_path(path)
    remedy = f"write {path.name} again, or make a new meta from its text"
    if not meta.is_file():
        raise DataError(
            f"{path.name} has no meta", where=str(meta), why="the meta says where each document begins", do=remedy
        )
    try:
        array = np.load(meta, allow_pickle=False)
    except (ValueError, EOFError, OSError) as e:
        raise DataError(f"the meta is not an npy array: {e}", where=str(meta), do=remedy) from None
    if array.size == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    if array.ndim != 2 or array.shape[1] < 2 or array.dtype.kind not in "iu":
        raise DataError(
            f"the meta is {array.dtype} of shape {array.shape}, not integers of shape (documents, 2)",
            where=str(meta),
            do=remedy,
        )
    offsets, lengths = array[:, 0].astype(np.int64), array[:, -1].astype(np.int64)
    _check_meta(meta, path.stat().st_size, offsets, lengths, array.dtype, remedy)
    return offsets, lengths


def _check_meta(meta: Path, size: int, offsets: Int64s, lengths: Int64s, dtype: np.dtype, remedy: str) -> None:
    if dtype.itemsize == 4 and (offsets.min() < 0 or (np.diff(offsets) < 0).any()):
        raise DataError(
            "byte offsets have overflowed 32 bits",
            where=str(meta),
            why="an int32 meta cannot describe a file beyond 2 GiB; documents would be read from wrong places",
            do=remedy,
        )
    if lengths.min() < 0:
        raise DataError(f"document {int(lengths.argmin())} has a negative length", where=str(meta), do=remedy)
    out = np.flatnonzero((offsets < 0) | (offsets >= size))
    if len(out):
        raise DataError(
            f"document {int(out[0])} begins at byte {int(offsets[out[0]])}, but the .bin has {size} bytes",
            where=str(meta),
            why="the .bin is cut short, or the meta belongs to another file",
            do=remedy,
        )
