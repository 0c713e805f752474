"""The packs of complete documents of all files, for one seed and packed_length: computed once, cached and mapped.

    header    4096 bytes, see cache_file.py
    table     int64 [files, 5]: offset, documents, packs, tokens, checksum
    a file    uint32 [documents] rows; then, aligned to 8 bytes, int64 [documents] ends and int64 [packs + 1] borders

The file name is a hash of everything that the packs depend on. Few documents, and those without a folder for caches,
are packed in the memory of each rank.
"""

import contextlib
import functools
import hashlib
import mmap
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from xtuner.core.foreign_inputs import open_regular
from xtuner.core.log import logger, progress
from xtuner.data.format.bin_file import BinFile, Int64s
from xtuner.data.format.cache_dirs import CacheDirs, log_once
from xtuner.data.format.cache_file import DAMAGED, HEADER_BYTES, CacheFormat
from xtuner.data.packing import document_order
from xtuner.data.packing.document_order import MAX_WORKERS, DocumentOrders, shuffle_file
from xtuner.data.packing.document_source import Documents
from xtuner.data.packing.whole_documents import FileTable, LongDocuments
from xtuner.data.process_pool import map_ordered, usable_workers

FORMAT = CacheFormat("version", 1, magic=b"xtuner packs of whole documents\n")
PARALLEL_FROM = 500_000  # documents; fewer are packed by one process
MAX_IN_FLIGHT = 50_000_000  # documents of files that processes work at; twice as many are held, 20 bytes each
COLUMNS = ("begin", "documents", "packs", "tokens", "crc32")


class WholePacks:
    """The packs of the files of several sources, numbered source by source."""

    def __init__(self, parts: Sequence[Documents], packed_length: int, seed: int, long: LongDocuments) -> None:
        """Builds what is not cached. Raises: DataError for a meta that has changed meanwhile."""
        recipe = _Recipe(packed_length, seed, long)
        self._parts = [_open(documents, recipe) for documents in parts]
        sizes = [len(documents) for documents in parts]
        self._files = [(part, file) for part, size in zip(self._parts, sizes, strict=True) for file in range(size)]
        self.packs: Int64s = np.concatenate([part.packs for part in self._parts])
        self.tokens: Int64s = np.concatenate([part.tokens for part in self._parts])  # of each file, without padding

    def table(self, file_number: int) -> FileTable:
        part, file = self._files[file_number]
        return part.table(file)


class _Recipe(NamedTuple):
    packed_length: int
    seed: int
    long: LongDocuments

    def key(self, documents: Documents) -> str:
        return hashlib.sha256(f"{FORMAT.version} {documents.fingerprint()} {tuple(self)}".encode()).hexdigest()


class _InMemory:
    def __init__(self, packer: "_Packer") -> None:
        self._tables = list(packer.fill_all())
        self.packs = np.array([len(t.borders) - 1 for t in self._tables], np.int64)
        self.tokens = np.array([t.borders[-1] for t in self._tables], np.int64)

    def table(self, file: int) -> FileTable:
        return self._tables[file]


class _Mapped:
    """The contents of an index file. A file with a wrong checksum is packed again."""

    def __init__(self, path: Path, key: str, packer: "_Packer") -> None:
        """Raises: OSError; ValueError for a file that is not complete, or has another key."""
        self._path, self._key, self._packer = path, key, packer
        with open_regular(path) as f:
            size = os.fstat(f.fileno()).st_size
            if size < HEADER_BYTES:
                raise ValueError(DAMAGED)
            self._map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        head = FORMAT.read_header(self._map)
        files = head.get("files")
        if head.get("key") != key or head.get("size") != size or type(files) is not int:
            raise ValueError(DAMAGED)
        table = np.frombuffer(self._map, np.int64, files * len(COLUMNS), HEADER_BYTES).reshape(files, len(COLUMNS))
        if zlib.crc32(table.tobytes()) != head.get("crc32"):
            raise ValueError(DAMAGED)
        self._begins, self._documents, self.packs, self.tokens, self._checksums = table.T
        self._verified: dict[int, FileTable] = {}

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return _Mapped, (self._path, self._key, self._packer)

    def table(self, file: int) -> FileTable:
        if file not in self._verified:
            self._verified[file] = self._read(file) or self._packer.fill(file)
        return self._verified[file]

    def _read(self, file: int) -> FileTable | None:
        """None, logged, if the checksum is wrong."""
        begin, documents, packs = int(self._begins[file]), int(self._documents[file]), int(self.packs[file])
        ends = begin + _aligned(4 * documents)
        borders = ends + 8 * documents
        stop = borders + 8 * (packs + 1)
        if stop > len(self._map) or zlib.crc32(memoryview(self._map)[begin:stop]) != self._checksums[file]:
            log_once(f"the index {self._path} is damaged: it is removed, and rebuilt at the next start")
            with contextlib.suppress(OSError):
                self._path.unlink()
            return None
        return FileTable(
            np.frombuffer(self._map, np.uint32, documents, begin),
            np.frombuffer(self._map, np.int64, documents, ends),
            np.frombuffer(self._map, np.int64, packs + 1, borders),
        )


def _aligned(size: int) -> int:
    return -(-size // 8) * 8


def _open(documents: Documents, recipe: _Recipe) -> _InMemory | _Mapped:
    cache_dirs = documents.cache_dirs
    packer = _Packer(documents, recipe, documents.load_orders(recipe.seed))
    if cache_dirs is None:
        return _InMemory(packer)
    key = recipe.key(documents)
    if found := _find(cache_dirs, key, packer):
        return found
    if cache_dirs.read_only or documents.num_documents < document_order.SMALL:
        return _InMemory(packer)
    with cache_dirs.locked():
        if found := _find(cache_dirs, key, packer):  # another process was faster
            return found
        path = cache_dirs.write(_name(key), lambda f: _write(f, packer, key), "the index of packs")
    return _Mapped(path, key, packer) if path else _InMemory(packer)


def _name(key: str) -> str:
    return f"whole-{key[:32]}.idx"


def _find(cache_dirs: CacheDirs, key: str, packer: "_Packer") -> _Mapped | None:
    for path in cache_dirs.candidates(_name(key)):
        try:
            return _Mapped(path, key, packer)
        except (OSError, ValueError) as e:
            log_once(f"the index {path} cannot be used ({getattr(e, 'strerror', None) or e}): it is rebuilt")
    return None


def _write(f: IO[bytes], packer: "_Packer", key: str) -> None:
    """Write the complete index file. Raises: OSError, DataError."""
    at = HEADER_BYTES + 8 * len(COLUMNS) * len(packer.documents)
    f.seek(at)
    rows = []
    for table in packer.fill_all():
        numbers = table.rows.tobytes()
        checksum, begin = 0, at
        for part in (numbers.ljust(_aligned(len(numbers)), b"\0"), table.ends.tobytes(), table.borders.tobytes()):
            f.write(part)
            checksum = zlib.crc32(part, checksum)
            at += len(part)
        rows.append((begin, len(table.rows), len(table.borders) - 1, int(table.borders[-1]), checksum))
    body = np.array(rows, np.int64).tobytes()
    f.seek(0)
    f.write(FORMAT.header(files=len(rows), key=key, size=at, crc32=zlib.crc32(body)))
    f.write(body)


class _Job(NamedTuple):
    """For a worker process: a file, and the index of the order of its documents, if there is one."""

    number: int
    file: BinFile
    orders: tuple[Path, str] | None
    recipe: _Recipe


@dataclass(frozen=True)
class _Packer:
    """Packs the files of one source. Raises: DataError."""

    documents: Documents
    recipe: _Recipe
    orders: DocumentOrders | None

    def fill(self, file: int) -> FileTable:
        table = self.orders.order(file) if self.orders else None
        rows, ends = table or self.documents.order(file, self.recipe.seed)
        return FileTable.fill(rows, ends, self.recipe.packed_length, self.recipe.long)

    def fill_all(self) -> Iterator[FileTable]:
        count, number = self.documents.num_documents, len(self.documents)
        if count >= document_order.SMALL:
            logger.info(f"packing {count:,} documents of {number:,} files, once for this seed and length")
        tables: Iterator[FileTable] = map(self.fill, range(number))
        files = [self.documents.file(i) for i in range(number)] if count >= PARALLEL_FROM else []
        known = (self.orders.path, self.orders.key) if self.orders else None
        jobs = [_Job(i, file, known, self.recipe) for i, file in enumerate(files) if isinstance(file, BinFile)]
        if jobs:  # else few documents, or those of a source that is in the memory of this process
            largest = max(file.num_documents for file in files)
            workers = min(usable_workers(None), MAX_WORKERS, len(jobs), MAX_IN_FLIGHT // largest)
            tables = map_ordered(fill_file, jobs, max(workers, 1))
        return progress(tables, "packing documents", total=number)


def fill_file(job: _Job) -> FileTable:
    """For a worker process. Raises: DataError, OSError."""
    table = _open_orders(*job.orders).order(job.number) if job.orders else None
    rows, ends = table or shuffle_file(job.file, job.recipe.seed)
    return FileTable.fill(rows, ends, job.recipe.packed_length, job.recipe.long)


@functools.lru_cache(1)
def _open_orders(path: Path, key: str) -> DocumentOrders:
    return DocumentOrders(path, key)
