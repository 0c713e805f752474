"""A folder of token files as one sequence, in the order of the sorted walk or of a data-order file.

Files that are unchanged since they were last examined are recognised by their sizes and times (file_catalog.py); all
others are examined: of a `.bin`, the complete meta, and the beginning and end of the text.
"""

import hashlib
from base64 import b64decode
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from xtuner.core.errors import DataError
from xtuner.core.log import human_bytes, logger, progress
from xtuner.core.remote.cache import SIZE, open_cache
from xtuner.core.remote.path import AnyPath, RemotePath, list_folder
from xtuner.core.remote.store import ChangedObjectError
from xtuner.data.format import file_catalog
from xtuner.data.format.bin_file import BinFile
from xtuner.data.format.bin_kind import BinKind
from xtuner.data.format.cache_dirs import CacheDirs, Opening, log_once
from xtuner.data.format.document_file import DocumentFile, FileKind, Signature
from xtuner.data.format.file_catalog import SIGNATURE, Catalog, Records
from xtuner.data.format.file_order import no_files_error, read_order, require_folder, walk_files
from xtuner.data.format.text_reader import LongLines
from xtuner.data.packing import document_order
from xtuner.data.packing.document_order import MAX_WORKERS, PARALLEL_FROM, DocumentOrders
from xtuner.data.process_pool import map_ordered, usable_workers

SHOWN = 20  # problems in one message
STATS = 256  # files per task of the threads that read sizes and times
THREADS = 16


class TokenizedFolder:
    """The documents of a folder of token files, as a sequence of `DocumentFile`s; files without documents are left out.

    A file that a data order names several times is contained as often.
    """

    def __init__(
        self,
        folder: AnyPath,
        catalog: Catalog,
        min_length: int,
        cache_dirs: CacheDirs,
        request: list[str],
        kind: FileKind,
        location: str | None = None,
    ) -> None:
        self.folder = folder
        self.location = location or str(folder)
        self.catalog = catalog
        self.min_length = min_length
        self.cache_dirs = cache_dirs
        self.request = request  # the arguments, for comparison with those of another rank
        self.kind = kind
        self.orders: DocumentOrders | None = None
        size = int(catalog.records["signature"]["size"].sum())
        self.by_ranges = isinstance(folder, RemotePath) and size > (most := open_cache().size)
        if self.by_ranges:
            log_once(
                f"{folder} has {human_bytes(size)}, more than the cache of object storage ({human_bytes(most)}, "
                f"{SIZE}): documents are read from the server",
                logger.info,
            )

    def __len__(self) -> int:
        return len(self.catalog)

    @overload
    def __getitem__(self, i: int) -> DocumentFile: ...
    @overload
    def __getitem__(self, i: slice) -> list[DocumentFile]: ...
    def __getitem__(self, i: int | slice) -> DocumentFile | list[DocumentFile]:
        numbers = range(len(self))[i]
        if isinstance(numbers, range):
            return [self[n] for n in numbers]
        file = self.catalog.file(numbers, self.folder, self.min_length, self.kind)
        return replace(file, by_ranges=True) if self.by_ranges and isinstance(file, BinFile) else file

    def __iter__(self) -> Iterator[DocumentFile]:
        return (self[i] for i in range(len(self)))

    def file(self, i: int) -> DocumentFile:
        return self[i]

    @property
    def learn_zero(self) -> bool:
        return getattr(self.kind, "learn_zero", False)

    @property
    def kind_options(self) -> str:
        """For `xtuner data` commands that are suggested to the user."""
        return self.kind.options

    @property
    def names(self) -> list[str]:
        return self.catalog.names

    @property
    def tokens_per_file(self) -> npt.NDArray[np.int64]:
        return self.catalog.tokens

    @property
    def num_repeated(self) -> int:
        """Files that the data order names more than once."""
        return sum(times > 1 for times in Counter(self.catalog.names).values())

    @property
    def num_documents(self) -> int:
        return int(self.catalog.documents.sum())

    @property
    def num_tokens(self) -> int:
        return int(self.catalog.tokens.sum())

    def fingerprint(self) -> str:
        """Identity of the contents: size, meta, first and last bytes of each file in order, and the rule for id 0.

        No names, no times.
        """
        contents = self.catalog.fingerprint()
        return hashlib.sha256(f"{contents} learn_zero".encode()).hexdigest() if self.learn_zero else contents

    def identities(self) -> Iterator[str]:
        return (bytes(row[:8]).hex() for row in self.catalog.identities)

    def load_orders(self, seed: int, small: int | None = None) -> DocumentOrders | None:
        """The orders of this seed; see `document_order.find_or_build_orders`."""
        if self.orders is None or self.orders.seed != seed:
            self.orders = document_order.find_or_build_orders(
                self.catalog, self.folder, self.min_length, seed, self.cache_dirs, self.kind, small
            )
        return self.orders

    def order(self, i: int, seed: int) -> tuple[document_order.RowNumbers, npt.NDArray[np.int64]]:
        return document_order.shuffle_file(self[i], seed)

    def reader(self, i: int, long: LongLines) -> Any:
        """A `Reader`; see packing/document_source.py."""
        return self.kind.reader(self[i], long)


def load_intern_repo_tokenized_dataset(
    folder: str | Path,
    min_length: int = 0,
    data_order_path: str | Path | None = None,
    file_type: str = ".bin",
    cache_dir: str | Path | None = None,
    learn_zero: bool = False,
    opening: Opening = Opening(),  # noqa: B008
) -> TokenizedFolder:
    """Index a folder of tokenized files. Of the text, only beginning and end of files that are not in the catalog are
    read.

    Args:
        folder: contains `*.bin` and `*.bin.meta` files, at any depth; also s3:// and oss://.
        min_length: documents with fewer tokens are left out, and so are files without any other document.
        data_order_path: a file with one relative path per line; a file named several times is used as often. None for
            the sorted walk.
        file_type: ending of the token files.
        cache_dir: where the index is cached; None for next to the data, or the user's cache folder if that is not
            writable. Small data need no cache.
        learn_zero: a token of id 0, which has no sign, is learned like its neighbours (zeros.py); by the format's rule
            it is never learned.
        opening: set by the run that opens the folder.

    Raises: ConfigError if the folder does not exist, DataError for faulty files.
    """
    root = require_folder(folder)
    cache_dirs = CacheDirs(root, opening.cache_dir or cache_dir, opening.read_only)
    request = [str(root), str(min_length), str(data_order_path), file_type, str(learn_zero)]

    def find_names() -> list[str]:
        listed = list_folder(root) if isinstance(root, RemotePath) else root
        if data_order_path is not None:
            return read_order(data_order_path, listed, file_type)
        if not (names := list(walk_files(listed, file_type))):
            raise no_files_error(root, file_type)
        return names

    return open_files(root, find_names, min_length, cache_dirs, request, BinKind(cache_dirs, learn_zero), opening)


def open_files(
    root: AnyPath,
    find_names: Callable[[], list[str]],
    min_length: int,
    cache_dirs: CacheDirs,
    request: list[str],
    kind: FileKind,
    opening: Opening,
    location: str | None = None,
) -> TokenizedFolder:
    """The documents of files of any kind.

    Args:
        find_names: the files, in order; not called where another rank has found them.
        request: identifies the arguments, for comparison with those of another rank.
        location: what the user has given, for messages and hints; None: the folder.
    """
    if (known := opening.find_known(request)) and (found := _open_known(known)):
        whole = TokenizedFolder(root, found[0], min_length, cache_dirs, request, kind, location)
        whole.orders = found[1]
        return whole
    names = find_names()
    catalog = build_catalog(root, list(dict.fromkeys(names)), min_length, cache_dirs, kind)
    if len(names) > len(catalog):  # the data order names files more than once
        row = {name: i for i, name in enumerate(catalog.names)}
        catalog = catalog.select([row[name] for name in names])
    kept = np.flatnonzero(catalog.documents)
    if len(kept) < len(names):
        logger.info(f"{len(names) - len(kept)} files have no document of at least {min_length} tokens: left out")
        catalog = catalog.select(kept)
    return TokenizedFolder(root, catalog, min_length, cache_dirs, request, kind, location)


def _open_known(known: Mapping[str, Any]) -> tuple[Catalog, DocumentOrders | None] | None:
    """Catalog and index that another rank has found; None if its index is not visible on this node."""
    if known["path"] is None:
        return file_catalog.from_bytes(b64decode(known["catalog"]))[0], None
    try:
        orders = DocumentOrders(Path(known["path"]), known["key"])
    except (OSError, ValueError):
        return None
    return orders.catalog, orders


def build_catalog(folder: AnyPath, names: list[str], min_length: int, cache_dirs: CacheDirs, kind: FileKind) -> Catalog:
    """The catalog of these files; those without a valid cached entry are examined. Raises: DataError that lists all
    faulty files."""
    if isinstance(folder, RemotePath) and not folder.listed:
        folder = list_folder(folder)
    signatures = read_signatures(folder, names, kind)
    catalog, fresh = _find_unchanged(names, signatures, cache_dirs, _catalog_name(kind, min_length))
    unknown = np.flatnonzero(~fresh).tolist()
    if unknown:
        examined_bytes = int(signatures[kind.examined][unknown].clip(min=0).sum())
        _examine(catalog, unknown, folder, min_length, examined_bytes, kind)
        if int(catalog.documents.sum()) >= document_order.SMALL and not cache_dirs.read_only:
            save_catalog(catalog, cache_dirs, min_length, kind)
    return catalog


def _catalog_name(kind: FileKind, min_length: int) -> str:
    return f"files-{kind.tag}{min_length}.cat"


def save_catalog(catalog: Catalog, cache_dirs: CacheDirs, min_length: int, kind: FileKind) -> None:
    """Write a catalog for the next start, merged with the entries of older ones for other files of the folder."""
    name = _catalog_name(kind, min_length)
    with cache_dirs.locked():
        for path in cache_dirs.candidates(name):
            try:
                older, _ = file_catalog.from_bytes(path.read_bytes())
            except (OSError, ValueError):
                continue
            ours = set(catalog.names)
            others = older.select([i for i, n in enumerate(older.names) if n not in ours])
            catalog = Catalog(
                catalog.names + others.names,
                np.concatenate((catalog.records, others.records)),
                np.concatenate((catalog.identities, others.identities)),
            )
        cache_dirs.write(name, lambda f: f.write(file_catalog.to_bytes(catalog)), f"the index of {cache_dirs.folder}")


def read_signatures(folder: AnyPath, names: list[str], kind: FileKind) -> Records:
    """Sizes and times, SIGNATURE [files]; all -1 for a file that cannot be accessed, or whose meta cannot."""

    if isinstance(folder, RemotePath) and not folder.listed:
        folder = list_folder(folder)

    def read(part: list[str]) -> list[Signature]:
        return [_signature(kind.file(folder / name, name, 0)) for name in part]

    parts = [names[i : i + STATS] for i in range(0, len(names), STATS)]
    with ThreadPoolExecutor(THREADS) as pool:  # a network file system serves many requests at once
        found = [s for part in pool.map(read, parts) for s in part]
    return np.array(found, SIGNATURE)


def _signature(file: DocumentFile) -> Signature:
    try:
        return Signature.read(file.parts)
    except OSError:
        return Signature(-1, -1, -1, -1)


def _find_unchanged(
    names: list[str], signatures: Records, cache_dirs: CacheDirs, cache: str
) -> tuple[Catalog, npt.NDArray[np.bool_]]:
    """(catalog filled from cached ones for files with these signatures, bool [files]: which were found)."""
    catalog = Catalog.empty(names)
    fresh = np.zeros(len(names), np.bool_)
    for path in cache_dirs.candidates(cache):
        try:
            older, _ = file_catalog.from_bytes(path.read_bytes())
        except (OSError, ValueError) as e:
            log_once(f"the index {path} cannot be used ({getattr(e, 'strerror', None) or e}): it is rebuilt")
            continue
        where = {name: i for i, name in enumerate(older.names)}
        rows = np.array([where.get(name, -1) for name in names], np.int64)
        same = older.records["signature"][rows] == signatures if len(older) else rows >= 0
        changed = int(np.count_nonzero((rows >= 0) & ~same))
        if changed:
            logger.info(f"{changed} files of {cache_dirs.folder} have changed since they were indexed: examined again")
        take = (rows >= 0) & same & ~fresh
        catalog.records[take] = older.records[rows[take]]
        catalog.identities[take] = older.identities[rows[take]]
        fresh |= take
    return catalog, fresh


def _examine(
    catalog: Catalog, unknown: list[int], folder: AnyPath, min_length: int, examined_bytes: int, kind: FileKind
) -> None:
    """Examine the `unknown` files, of which `examined_bytes` are read, and add them to the catalog.

    Raises: DataError that lists all faulty files.
    """
    files = [kind.file(folder / catalog.names[i], catalog.names[i], min_length) for i in unknown]
    large = len(files) > 1 and examined_bytes >= 16 * PARALLEL_FROM
    workers = min(usable_workers(None), MAX_WORKERS) if large else 1
    problems = []
    results = map_ordered(_examine_file, files, workers)
    for i, found in zip(unknown, progress(results, "examining files", total=len(files)), strict=True):
        if isinstance(found, DataError):
            problems.append(found)
            continue
        assert found.facts is not None
        catalog.set_facts(i, found.facts)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        shown = "\n".join(f"* {p}" for p in problems[:SHOWN])
        more = f"\n… and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise DataError(f"{len(problems)} of {len(catalog)} data files are faulty\n{shown}{more}")


def _examine_file(file: DocumentFile) -> DocumentFile | DataError:
    """For `map_ordered`: the file with its facts, or the error."""
    try:
        return file.examine()
    except DataError as e:
        return e
    except ChangedObjectError:
        return DataError(f"{file.name} has changed while it was examined", where=str(file.path), do="start again")
    except OSError as e:  # the file was removed meanwhile
        return DataError(f"{file.name} cannot be read: {e.strerror}", where=str(file.path))
