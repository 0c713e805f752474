"""Files whose documents can only be decoded in blocks: Parquet, compressed Arrow, JSON lines.

A pack has documents from everywhere in a file, so that reading them from the file itself would decode a block for each.
Each file is therefore decoded once, into a cache that is mapped, of 4 bytes a token:

    4096 bytes   header (cache_file.py): version, documents, tokens, the file's size and time, identity
    int32        [tokens]         ±(id + 1), positive where learned; padded to 8 bytes
    int64        [documents + 1]  token at which each document begins

Where no cache can be written, documents are decoded with the block that they are in: slow, but the same.
"""

import hashlib
import multiprocessing
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from xtuner.core.errors import DataError
from xtuner.core.log import logger, progress
from xtuner.data import process_pool
from xtuner.data.format.cache_dirs import CacheDirs, log_once
from xtuner.data.format.cache_file import HEADER_BYTES, CacheFormat
from xtuner.data.format.document_file import DocumentFile, Facts, Signature
from xtuner.data.format.parse_tokens import Int64s
from xtuner.data.format.text_reader import SpanArrays
from xtuner.data.format.token_cache import TokenCache
from xtuner.data.sources.columns import ID_OFFSET, Columns
from xtuner.data.sources.megatron import read_document

FORMAT = CacheFormat("xtuner decoded tokens", 1)
LARGE = 2**26  # bytes of a file; from this size on, its decoding is reported
PARALLEL = 2**30  # from this size on, it is decoded by several processes, which take a second to start
MAX_SENT = 2**28  # bytes of a block that processes send to each other
MAX_WORKERS = 16
KEPT = 2  # decoded blocks, where there is no cache


class Decoded(NamedTuple):
    """Documents of one block, or of a part of it."""

    lengths: Int64s  # tokens of each
    signed: npt.NDArray[np.int32]  # of all, end to end


class DecodedTokens(TokenCache):
    """The cache of one file."""

    id_offset = ID_OFFSET

    @property
    def tokens_begin(self) -> int:
        return HEADER_BYTES

    @property
    def starts_begin(self) -> int:
        return HEADER_BYTES + -(-4 * self.tokens // 8) * 8

    @staticmethod
    def read_header(path: Path) -> dict[str, Any] | None:
        facts, size = FORMAT.read_facts(path)
        documents, tokens = facts.get("documents"), facts.get("tokens")
        if not (type(documents) is int and type(tokens) is int and min(documents, tokens) >= 0):
            return None
        right = HEADER_BYTES + -(-4 * tokens // 8) * 8 + 8 * (documents + 1)
        return facts if size == right and isinstance(facts.get("of"), list) else None


class _Scan(NamedTuple):
    """What one pass over a file finds."""

    counts: list[int]  # documents of each block
    lengths: Int64s
    identity: str  # hash of all tokens, lengths and what is learned: the same whatever the file's format


@dataclass(frozen=True)
class DecodedFile(DocumentFile):
    id_offset = ID_OFFSET
    cache_dirs: CacheDirs | None = None
    columns: Columns = field(default_factory=Columns)

    @property
    def is_mapped(self) -> bool:
        """Whether the file itself is read at random, so that it is not decoded."""
        return False

    def blocks(self) -> list[Any]:
        """What `decode` decodes at once. Raises: DataError."""
        raise NotImplementedError

    def decode(self, block: Any) -> Iterator[Decoded]:
        """Yield the documents of a block, in parts of bounded size. Raises: DataError with the position."""
        raise NotImplementedError

    def block_bytes(self, block: Any) -> int:
        """Memory that the decoded block needs, roughly."""
        raise NotImplementedError

    def describe(self, block: Any, i: int) -> str:
        """Where document `i` of a block is, for messages."""
        raise NotImplementedError

    @property
    def cache_name(self) -> str:
        tag = hashlib.sha256(self.columns.tag.encode()).hexdigest()[:8]
        return f"tokens/{self.name}.{tag}.decoded"

    def find_cache(self) -> tuple[DecodedTokens, str] | None:
        """The valid cache of the file as it is now, and its identity. One that is damaged or outdated is logged."""
        signature = self.facts.signature if self.facts else Signature.read(self.parts)
        for path in self.cache_dirs.candidates(self.cache_name) if self.cache_dirs else ():
            facts = DecodedTokens.read_header(path)
            if facts is None:
                log_once(f"the cache {path} is damaged or of another version: {self.name} is decoded again")
            elif facts["of"] == list(signature):
                known = self if self.facts else replace(self, facts=Facts(signature, 0, 0, b""))
                return DecodedTokens(known, path, facts["documents"], facts["tokens"]), str(facts.get("identity"))
        return None

    def build_cache(self) -> tuple[DecodedTokens, str] | None:
        """Decode the file into its cache. None where no cache can be written. Raises: DataError."""
        if self.cache_dirs is None or self.cache_dirs.read_only:
            return None
        path = self.cache_dirs.write(self.cache_name, self._fill, f"{self.name}, decoded,")
        return self.find_cache() if path else None

    def _fill(self, f: IO[bytes]) -> None:
        signature = Signature.read(self.parts)
        if signature.size >= LARGE:
            logger.info(f"{self.name} is decoded once, into a cache of 4 bytes a token")
        f.write(bytes(HEADER_BYTES))
        scan = self._pass(lambda signed: f.write(signed.data))
        tokens = int(scan.lengths.sum())
        f.write(bytes(-4 * tokens % 8))
        f.write(np.zeros(1, np.int64).data)
        f.write(np.cumsum(scan.lengths, dtype=np.int64).data)
        f.seek(0)
        facts = {"documents": len(scan.lengths), "tokens": tokens, "of": list(signature), "identity": scan.identity}
        f.write(FORMAT.header(**facts))
        if Signature.read(self.parts) != signature:
            raise self.changed_error(self.path, "it was written to while it was decoded")

    def _pass(self, take: Any = lambda signed: None) -> _Scan:
        """Decode all blocks. Raises: DataError."""
        counts, lengths, sizes, contents = [], [np.zeros(0, np.int64)], hashlib.sha256(), hashlib.sha256()
        blocks = self.blocks()
        for parts in progress(self._decode_all(blocks), f"decoding {self.name}", total=len(blocks)):
            count = 0
            for part in parts:
                lengths.append(part.lengths)
                sizes.update(np.ascontiguousarray(part.lengths).data)
                contents.update(np.ascontiguousarray(part.signed).data)
                take(part.signed)
                count += len(part.lengths)
            counts.append(count)
        return _Scan(counts, np.concatenate(lengths), hashlib.sha256(sizes.digest() + contents.digest()).hexdigest())

    def _decode_all(self, blocks: list[Any]) -> Iterator[Iterable[Decoded]]:
        """The documents of each block; those of a large file by several processes, unless this is one of several."""
        alone = multiprocessing.parent_process() is None
        size = os.path.getsize(self.path)
        if alone and size >= PARALLEL and max(map(self.block_bytes, blocks), default=0) <= MAX_SENT:
            workers = min(process_pool.usable_workers(None), len(blocks), MAX_WORKERS)
            yield from process_pool.map_ordered(decode_block, [(self, block) for block in blocks], max(workers, 1))
        else:
            yield from map(self.decode, blocks)

    @cached_property
    def scan(self) -> _Scan:
        return self._pass()

    @cached_property
    def all_lengths(self) -> Int64s:
        found = self.find_cache()
        return np.diff(found[0].mapped()[0]) if found else self.scan.lengths

    def check(self) -> None:
        self.open().close()
        _ = self.find_cache() or self.build_cache()

    def identity(self) -> bytes:
        """sha256 over all tokens and min_length."""
        if self.facts:
            return self.facts.identity
        found = self.find_cache()
        contents = found[1] if found else self.scan.identity
        return hashlib.sha256(f"{contents} {self.min_length}".encode()).digest()

    def make_reader(self) -> "DecodedTokens | BlockReader":
        """Of the cache, built if it has been removed; else of the blocks."""
        self.check_unchanged()
        if (found := self.find_cache()) is None and self.cache_dirs and not self.cache_dirs.read_only:
            with self.cache_dirs.locked():
                found = self.find_cache() or self.build_cache()
        if found:
            return found[0]
        if self.cache_dirs and not self.cache_dirs.read_only:
            log_once(
                f"{self.path.parent} is read without a cache: each document is decoded with the block that it is in, "
                "which is slow; give a writable --cache-dir, or convert the data (xtuner data convert)"
            )
        return BlockReader(self)

    def read(self, i: int, vocab_size: int | None = None) -> tuple[Int64s, npt.NDArray[np.bool_]]:
        return read_document(self, self.own_reader, i, vocab_size)

    @cached_property
    def own_reader(self) -> Any:
        return self.make_reader()


def decode_block(job: tuple[DecodedFile, Any]) -> list[Decoded]:
    """For a worker process."""
    file, block = job
    return list(file.decode(block))


class BlockReader:
    """Reads documents from the blocks of a file; see `Reader` in packing/document_source.py."""

    id_offset = ID_OFFSET

    def __init__(self, file: DecodedFile) -> None:
        self.file = file
        self.blocks = file.blocks()
        self._firsts = np.concatenate(([0], np.cumsum(file.scan.counts)))
        self._decoded: OrderedDict[int, tuple[Int64s, npt.NDArray[np.int32]]] = OrderedDict()

    def read(self, span_arrays: SpanArrays, vocab_size: int | None = None) -> tuple[npt.NDArray[np.int32], int | None]:
        """See `Reader.read`."""
        self.file.check_unchanged()
        parts: list[npt.NDArray[np.int32]] = []
        following = None
        for span in span_arrays.as_list():
            if span.start == span.stop:
                continue
            signed = self._document(span.row)
            if len(signed) != span.length:
                raise self.file.changed_error(self.file.path, f"document {span.row} has other contents than before")
            self.file.check_ids(
                np.abs(signed[span.start : span.stop + 1]) - ID_OFFSET,
                f"{self.file.path}, document {span.row}",
                vocab_size,
            )
            parts.append(signed[span.start : span.stop])
            following = int(signed[span.stop]) if span.stop < span.length else None
        return np.concatenate(parts), following

    def _document(self, row: int) -> npt.NDArray[np.int32]:
        number = int(np.searchsorted(self._firsts, row, side="right")) - 1
        if (found := self._decoded.get(number)) is None:
            found = join(self.file.decode(self.blocks[number]))
            self._decoded = OrderedDict([*self._decoded.items(), (number, found)][-KEPT:])  # two threads read packs
        ends, signed = found
        i = row - int(self._firsts[number])
        return signed[ends[i] : ends[i + 1]]


def join(parts: Iterable[Decoded]) -> tuple[Int64s, npt.NDArray[np.int32]]:
    """(ends of the documents, from 0; their tokens)."""
    found = list(parts)
    lengths = np.concatenate([np.zeros(1, np.int64), *(part.lengths for part in found)])
    return np.cumsum(lengths), np.concatenate([np.zeros(0, np.int32), *(part.signed for part in found)])


def damaged(path: Path, position: str, error: Exception) -> DataError:
    """The error of a library that cannot decode a file."""
    return DataError(
        f"{path.name} cannot be decoded: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
        where=f"{path}{position}",
        why="the file is damaged or cut short",
        do="copy or write it again",
    )
