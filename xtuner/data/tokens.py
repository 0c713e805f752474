"""The token cache: a `.bin`'s tokens as int32, so that nothing is parsed while training. `xtuner data cache` makes it.

    4096 bytes   one line of JSON: version, documents, tokens, the pair's size and time
    int64        [documents + 1]  where each document of the file begins, in tokens, in the order of the meta's rows
    int32        [tokens]         signed, as in the text

It is used while the pair's sizes and times are those that it was made from, and holds exactly what the text holds.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from xtuner.core.errors import DataError
from xtuner.data.format import BinFile, Signature
from xtuner.data.place import Place, tell_once
from xtuner.data.spans import Span

VERSION = 1
HEADER = 4096
ROWS = 2**20  # of a meta at a time
Int32s = npt.NDArray[np.int32]


def cache_name(name: str) -> str:
    """Of the cache of file `name`, below a cache folder. It does not end as a token file does."""
    return f"tokens/{name}.int32"


def header_of(signature: Signature, documents: int, tokens: int) -> bytes:
    facts = {"xtuner tokens": VERSION, "documents": documents, "tokens": tokens, "of": list(signature)}
    return json.dumps(facts).encode().ljust(HEADER - 1) + b"\n"


class TokenCache:
    """Reads spans of one file's documents, as `SpanReader` does, from its cache."""

    def __init__(self, file: BinFile, path: Path, documents: int, tokens: int) -> None:
        self.file, self.path = file, path
        self.documents, self.tokens = documents, tokens

    @property
    def begin(self) -> int:
        return HEADER + 8 * (self.documents + 1)

    def read(self, spans: Sequence[Span], vocab_size: int | None = None) -> tuple[Int32s, int | None]:
        """See `SpanReader.read`."""
        last = spans[-1]
        goes_on = last.stop < last.length
        tokens = np.empty(sum(s.stop - s.start for s in spans) + goes_on, np.int32)
        room, at, begin = tokens.view(np.uint8).data, 0, self.begin
        fd = self._open()
        try:
            for span in spans:
                place = np.frombuffer(os.pread(fd, 16, HEADER + 8 * span.row), np.int64).tolist()
                if len(place) != 2 or place[1] - place[0] != span.length:
                    raise self._wrong(f"document {span.row} is not {span.length} tokens long in it")
                size = 4 * (span.stop - span.start + (goes_on and span is last))
                if os.preadv(fd, [room[at : at + size]], begin + 4 * (place[0] + span.start)) != size:
                    raise self._wrong("it is cut short")
                at += size
        finally:
            os.close(fd)
        if vocab_size is not None and max(int(tokens.max()), -int(tokens.min())) >= vocab_size:
            self._find_large(tokens, spans, vocab_size)
        return (tokens[:-1], int(tokens[-1])) if goes_on else (tokens, None)

    def _open(self) -> int:
        self.file.check_unchanged()
        try:
            fd = os.open(self.path, os.O_RDONLY)
        except OSError as e:
            raise self._wrong(e.strerror or str(e)) from None
        return fd

    def _find_large(self, tokens: Int32s, spans: Sequence[Span], vocab_size: int) -> None:
        at = 0
        for span in spans:
            size = span.stop - span.start
            where = f"{self.file.path} (document {span.row})"
            self.file.check_ids(tokens[at : at + size].astype(np.int64), where, vocab_size)
            at += size
        self.file.check_ids(tokens[at:].astype(np.int64), f"{self.file.path} (document {spans[-1].row})", vocab_size)

    def _wrong(self, how: str) -> DataError:
        return DataError(
            f"the token cache of {self.file.name} cannot be read: {how}",
            where=str(self.path),
            why="it was whole when the run began",
            do="remove it, or make it again with `xtuner data cache`, and start again",
        )


def find(file: BinFile, place: Place) -> TokenCache | None:
    """The fresh token cache of a file that has facts. One that is torn, stale or of another version is told."""
    assert file.facts is not None
    for path in place.candidates(cache_name(file.name)):
        facts = read_header(path)
        if facts is None:
            tell_once(f"the token cache {path} is torn or of another version: the text is read instead")
        elif facts["of"] != list(file.facts.signature):
            tell_once(f"the token cache {path} is older than its text, which is read instead; run `xtuner data cache`")
        else:
            return TokenCache(file, path, facts["documents"], facts["tokens"])
    return None


def read_header(path: Path) -> dict[str, Any] | None:
    """None for a file that is no whole token cache of this version."""
    try:
        with open(path, "rb") as f:
            facts: dict[str, Any] = json.loads(f.read(HEADER))
            size = os.fstat(f.fileno()).st_size
        whole = HEADER + 8 * (facts["documents"] + 1) + 4 * facts["tokens"]
        return facts if facts["xtuner tokens"] == VERSION and size == whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def begin(f: IO[bytes], lengths: npt.NDArray[Any], signature: Signature) -> None:
    """Begin the cache of a file whose documents have these lengths; all tokens must follow, in that order."""
    total = int(lengths.sum(dtype=np.int64))
    f.write(header_of(signature, len(lengths), total))
    f.write(np.zeros(1, np.int64).data)
    total = 0
    for i in range(0, len(lengths), ROWS):
        starts = np.cumsum(lengths[i : i + ROWS], dtype=np.int64) + total
        f.write(starts.data)
        total = int(starts[-1])


def mapped(cache: TokenCache) -> Int32s:
    """All tokens of a cache, mapped; for tools that go through them."""
    return np.memmap(cache.path, np.int32, "r", cache.begin, (cache.tokens,))
