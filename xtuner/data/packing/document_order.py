"""The order of every file's documents and where each ends, for one seed: 12 bytes per document, built once and mapped.

    the catalog (file_catalog.py), with offset and checksum of each file's order
    the order of a file:   uint32 [documents]  rows of the meta in packing order; then, aligned to 8 bytes,
                           int64  [documents]  number of tokens up to and including each document

All ranks and workers of a node share the mapped pages. The file name is a hash of everything that the orders depend on
(names, sizes, times, contents, min_length, seed, version), so that an index is never outdated. An order with a wrong
checksum is rebuilt in memory, and the file is removed.
"""

import contextlib
import mmap
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from xtuner.core.foreign_inputs import open_regular
from xtuner.core.log import logger, progress
from xtuner.core.remote.path import AnyPath
from xtuner.data.format.cache_dirs import CacheDirs, log_once
from xtuner.data.format.cache_file import DAMAGED, HEADER_BYTES
from xtuner.data.format.document_file import DocumentFile, FileKind
from xtuner.data.format.file_catalog import Catalog, from_bytes, to_bytes
from xtuner.data.format.parse_tokens import Int64s
from xtuner.data.process_pool import map_ordered, usable_workers

SMALL = 100_000  # documents; fewer are ordered in milliseconds, so that nothing is cached for them
PARALLEL_FROM = 3_000_000  # documents; fewer are ordered by one process
MAX_WORKERS = 16
RowNumbers = npt.NDArray[np.uint32]


def shuffle_documents(lengths: Int64s, seed: int) -> tuple[RowNumbers, Int64s]:
    """(document numbers in packing order, tokens up to and including each), [n] each, as in the reference loader."""
    order = np.arange(len(lengths), dtype=np.uint32)  # the draws do not depend on the dtype
    np.random.RandomState(seed).shuffle(order)
    return order, np.cumsum(lengths[order])


def shuffle_file(file: DocumentFile, seed: int) -> tuple[RowNumbers, Int64s]:
    """(rows of the meta in packing order, tokens up to and including each document), [n] each, of used documents."""
    lengths = file.lengths
    if len(lengths) != file.num_documents:
        raise file.changed_error(file.parts[-1], f"it has {len(lengths):,} documents instead of {file.num_documents:,}")
    order, ends = shuffle_documents(lengths, seed)
    return (order if file.kept is None else file.kept[order].astype(np.uint32)), ends


def _sizes(documents: int) -> tuple[int, int]:
    """Bytes of (the rows with padding, the complete order of a file)."""
    rows = -(-4 * documents // 8) * 8
    return rows, rows + 8 * documents


class DocumentOrders:
    """The orders of all files of a catalog, mapped read-only."""

    def __init__(self, path: Path, key: str) -> None:
        """Raises: OSError; ValueError for a file that is not complete, or has another key."""
        self.path, self.key = path, key
        with open_regular(path) as f:
            size = os.fstat(f.fileno()).st_size
            if size < HEADER_BYTES:
                raise ValueError(DAMAGED)
            self._map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        self.catalog, head = from_bytes(self._map)
        if head.get("key") != key or head.get("size") != size:
            raise ValueError(DAMAGED if head.get("key") == key else "of other data")
        self.min_length, self.seed = head.get("min_length"), head.get("seed")
        if type(self.min_length) is not int or type(self.seed) is not int:
            raise ValueError(DAMAGED)
        self._verified: set[int] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        return DocumentOrders, (self.path, self.key)

    def order(self, i: int) -> tuple[RowNumbers, Int64s] | None:
        """(rows, ends) of file i, mapped; None, logged, if the checksum is wrong."""
        _, documents, _, begin, checksum = self.catalog.records[i].item()
        rows, size = _sizes(documents)
        if i not in self._verified:
            inside = documents >= 0 and 0 <= begin <= len(self._map) - size
            if not inside or zlib.crc32(memoryview(self._map)[begin : begin + size]) != checksum:
                log_once(f"the index {self.path} is damaged: it is removed, and rebuilt at the next start")
                with contextlib.suppress(OSError):
                    self.path.unlink()
                return None
            self._verified.add(i)
        return (
            np.frombuffer(self._map, np.uint32, documents, begin),
            np.frombuffer(self._map, np.int64, documents, begin + rows),
        )


def find_orders(catalog: Catalog, min_length: int, seed: int, cache_dirs: CacheDirs) -> DocumentOrders | None:
    key = catalog.key(min_length=min_length, seed=seed)
    for path in cache_dirs.candidates(_name(key)):
        try:
            return DocumentOrders(path, key)
        except (OSError, ValueError) as e:
            log_once(f"the index {path} cannot be used ({getattr(e, 'strerror', None) or e}): it is rebuilt")
    return None


def find_or_build_orders(
    catalog: Catalog,
    folder: AnyPath,
    min_length: int,
    seed: int,
    cache_dirs: CacheDirs,
    kind: FileKind,
    small: int | None = None,
) -> DocumentOrders | None:
    """Orders of all files, built and cached if absent. None for little data, or where nothing can be cached.

    Raises: DataError for a meta that has changed meanwhile.
    """
    if found := find_orders(catalog, min_length, seed, cache_dirs):
        return found
    if cache_dirs.read_only or int(catalog.documents.sum()) < (SMALL if small is None else small):
        return None
    with cache_dirs.locked():
        if found := find_orders(catalog, min_length, seed, cache_dirs):  # another process was faster
            return found
        key = catalog.key(min_length=min_length, seed=seed)
        build = _Builder(catalog, folder, min_length, seed, cache_dirs, kind, key)
        path = cache_dirs.write(_name(key), build.fill, f"the index of {folder}")
    return DocumentOrders(path, key) if path else None


def _name(key: str) -> str:
    return f"order-{key[:32]}.idx"


class _Job(NamedTuple):
    """The order of one file, to be written at offset `begin` of the index file `target`."""

    file: DocumentFile
    seed: int
    target: str
    begin: int


def write_order(job: _Job) -> int:
    """For a worker process. Returns the checksum. Raises: DataError, OSError."""
    rows, ends = shuffle_file(job.file, job.seed)
    padded = rows.tobytes().ljust(_sizes(len(rows))[0], b"\0")
    fd = os.open(job.target, os.O_WRONLY)
    try:
        _write_at(fd, padded, job.begin)
        _write_at(fd, ends.data.cast("B"), job.begin + len(padded))
    finally:
        os.close(fd)
    return zlib.crc32(ends.data, zlib.crc32(padded))


def _write_at(fd: int, data: Any, at: int) -> None:
    view = memoryview(data)
    while len(view):  # a full disk writes less than requested, then fails
        written = os.pwrite(fd, view, at)
        view, at = view[written:], at + written


@dataclass
class _Builder:
    """Writes the index file of one seed."""

    catalog: Catalog
    folder: AnyPath
    min_length: int
    seed: int
    cache_dirs: CacheDirs
    kind: FileKind
    key: str

    def fill(self, f: IO[bytes]) -> None:
        """Write the complete file. Raises: OSError, DataError."""
        catalog, documents = self.catalog, self.catalog.documents
        facts: dict[str, Any] = {"key": self.key, "min_length": self.min_length, "seed": self.seed}
        at = -(-(len(to_bytes(catalog, **facts)) + 64) // HEADER_BYTES) * HEADER_BYTES
        sizes = [_sizes(n)[1] for n in documents.tolist()]
        catalog.records["order_begin"] = at + np.concatenate(([0], np.cumsum(sizes)))[:-1]
        facts["size"] = at + sum(sizes)
        os.truncate(f.fileno(), facts["size"])
        old = dict(self._find_older())
        jobs = []
        for i in range(len(catalog)):
            if not self._copy(f, i, old.get(catalog.identities[i].tobytes())):
                jobs.append(i)
        target = os.path.realpath(f"/proc/self/fd/{f.fileno()}")
        files = [catalog.file(i, self.folder, self.min_length, self.kind) for i in jobs]
        begins = catalog.records["order_begin"][jobs].tolist()
        work = [_Job(file, self.seed, target, begin) for file, begin in zip(files, begins, strict=True)]
        count = int(documents[jobs].sum())
        if count:
            logger.info(f"ordering {count:,} documents of {len(jobs):,} files, once for this seed")
        workers = min(usable_workers(None), MAX_WORKERS, len(jobs)) if count >= PARALLEL_FROM else 1
        done = map_ordered(write_order, work, max(workers, 1))
        for i, checksum in zip(jobs, progress(done, "ordering documents", total=len(jobs)), strict=True):
            catalog.records["order_crc32"][i] = checksum
        f.seek(0)
        f.write(to_bytes(catalog, **facts))

    def _find_older(self) -> Iterator[tuple[bytes, tuple["DocumentOrders", int]]]:
        """(identity, its order) of files in older indexes of this seed: orders of unchanged files are copied."""
        for folder in self.cache_dirs.dirs:
            for path in sorted(folder.glob("order-*.idx")):
                with contextlib.suppress(OSError, ValueError):
                    with open_regular(path) as f:
                        _, head = from_bytes(f.read(HEADER_BYTES + 2**26))
                    if head.get("seed") == self.seed and head.get("min_length") == self.min_length:
                        orders = DocumentOrders(path, str(head.get("key")))
                        for i, identity in enumerate(orders.catalog.identities):
                            yield identity.tobytes(), (orders, i)

    def _copy(self, f: IO[bytes], i: int, old: tuple[DocumentOrders, int] | None) -> bool:
        if old is None or old[0].order(old[1]) is None:
            return False
        orders, j = old
        *_, begin, checksum = orders.catalog.records[j].item()
        size = _sizes(int(self.catalog.documents[i]))[1]
        _write_at(
            f.fileno(), memoryview(orders._map)[begin : begin + size], int(self.catalog.records["order_begin"][i])
        )
        self.catalog.records["order_crc32"][i] = checksum
        return True
