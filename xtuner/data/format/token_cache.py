"""The token cache: a `.bin`'s tokens as int32, so that nothing is parsed while training. Built by `xtuner data cache`.

    4096 bytes   header (cache_file.py): version, documents, tokens, the pair's sizes and times
    int64        [documents + 1]  token at which each document begins, in the order of the meta's rows
    int32        [tokens]         signed, as in the text

It is used while sizes and times of the pair are those in the header, and contains exactly the tokens of the text.
"""

import mmap
import os
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from xtuner.core.errors import DataError
from xtuner.data.format.cache_dirs import CacheDirs, log_once
from xtuner.data.format.cache_file import HEADER_BYTES, CacheFormat
from xtuner.data.format.document_file import DocumentFile, Signature
from xtuner.data.format.parse_tokens import Int64s
from xtuner.data.format.text_reader import SpanArrays

FORMAT = CacheFormat("xtuner tokens", 1)
ROWS = 2**20  # of a meta per block
MAX_MAPS = 256  # mappings kept; each keeps a file open
Int32s = npt.NDArray[np.int32]
_MAPS: dict[Path, tuple[tuple[int, ...], Int64s, Int32s]] = {}  # the files' inode, size and time; starts; tokens


def cache_name(name: str) -> str:
    """Name of the cache of file `name`, below a cache directory. It does not end like a token file."""
    return f"tokens/{name}.int32"


def _facts(signature: Signature, documents: int, tokens: int) -> dict[str, Any]:
    return {"documents": documents, "tokens": tokens, "of": list(signature)}


class TokenCache:
    """Reads spans of one file's documents from its cache, as `SpanReader` reads them from the text."""

    id_offset = 0  # the text cannot mark id 0 as learned

    def __init__(self, file: DocumentFile, path: Path, documents: int, tokens: int) -> None:
        self.file, self.path = file, path
        self.documents, self.tokens = documents, tokens

    @property
    def tokens_begin(self) -> int:
        return HEADER_BYTES + 8 * (self.documents + 1)

    @property
    def starts_begin(self) -> int:
        return HEADER_BYTES

    @staticmethod
    def read_header(path: Path) -> dict[str, Any] | None:
        return read_header(path)

    def read(self, span_arrays: SpanArrays, vocab_size: int | None = None) -> tuple[Int32s, int | None]:
        """See `SpanReader.read`."""
        self.file.check_unchanged()
        starts, tokens = self.mapped()
        rows, first, stop, lengths = span_arrays
        begins = starts[rows]
        if not np.array_equal(starts[rows + np.uint32(1)] - begins, lengths):
            raise self._wrong("its documents have other lengths than in the index")
        spans = list(zip((begins + first).tolist(), (begins + stop).tolist(), strict=True))
        found = np.concatenate([tokens[i:j] for i, j in spans])
        if len(found) != int((stop - first).sum()):
            raise self._wrong("documents extend beyond its end")
        following = int(tokens[spans[-1][1]]) if stop[-1] < lengths[-1] else None
        largest = max(int(found.max()), -int(found.min()), abs(following or 0)) - self.id_offset
        if vocab_size is not None and largest >= vocab_size:
            for span, (i, j) in zip(span_arrays.as_list(), spans, strict=True):
                document = np.abs(tokens[i : j + (span.stop < span.length)].astype(np.int64)) - self.id_offset
                self.file.check_ids(document, f"{self.file.path} (document {span.row})", vocab_size)
        return found, following

    def mapped(self) -> tuple[Int64s, Int32s]:
        """(tokens at which documents begin [documents + 1], all tokens). Raises: DataError if the cache has changed."""
        try:
            stat = os.stat(self.path)
            known = _MAPS.get(self.path)
            identity = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            if known is None or known[0] != identity:
                header = self.read_header(self.path)
                if header is None or any(header.get(k) != v for k, v in self.facts().items()):
                    raise self._wrong("it has changed")
                with open(self.path, "rb") as f:
                    mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
                starts = np.frombuffer(mapped, np.int64, self.documents + 1, self.starts_begin)
                known = identity, starts, np.frombuffer(mapped, np.int32, self.tokens, self.tokens_begin)
                while len(_MAPS) >= MAX_MAPS:
                    _MAPS.pop(next(iter(_MAPS)), None)
                _MAPS[self.path] = known
        except OSError as e:
            raise self._wrong(e.strerror or str(e)) from None
        return known[1], known[2]

    def facts(self) -> dict[str, Any]:
        assert self.file.facts is not None
        return _facts(self.file.facts.signature, self.documents, self.tokens)

    def _wrong(self, how: str) -> DataError:
        return DataError(
            f"the token cache of {self.file.name} cannot be read: {how}",
            where=str(self.path),
            why="it was complete when the run started",
            do="remove it, or rebuild it with `xtuner data cache`, and start again",
        )


def find_token_cache(file: DocumentFile, cache_dirs: CacheDirs) -> TokenCache | None:
    """The valid token cache of an examined file; one that is damaged, outdated or of another version is logged."""
    assert file.facts is not None
    for path in cache_dirs.candidates(cache_name(file.name)):
        facts = read_header(path)
        if facts is None:
            log_once(f"the token cache {path} is damaged or of another version: the text is read instead")
        elif facts["of"] != list(file.facts.signature):
            log_once(f"the token cache {path} is older than its text, which is read instead; run `xtuner data cache`")
        else:
            return TokenCache(file, path, facts["documents"], facts["tokens"])
    return None


def read_header(path: Path) -> dict[str, Any] | None:
    """The facts of the header; None unless the file is a complete token cache of this version."""
    facts, size = FORMAT.read_facts(path)
    documents, tokens = facts.get("documents"), facts.get("tokens")
    if not (type(documents) is int and type(tokens) is int and isinstance(facts.get("of"), list)):
        return None
    right = min(documents, tokens) >= 0 and size == HEADER_BYTES + 8 * (documents + 1) + 4 * tokens
    return facts if right else None


def write_head(f: IO[bytes], lengths: npt.NDArray[Any], signature: Signature) -> None:
    """Write header and document starts of the cache of a file; the caller writes all tokens after them, in order."""
    total = int(lengths.sum(dtype=np.int64))
    f.write(FORMAT.header(**_facts(signature, len(lengths), total)))
    f.write(np.zeros(1, np.int64).data)
    total = 0
    for i in range(0, len(lengths), ROWS):
        starts = np.cumsum(lengths[i : i + ROWS], dtype=np.int64) + total
        f.write(starts.data)
        total = int(starts[-1])
