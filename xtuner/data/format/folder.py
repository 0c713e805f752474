"""A folder of `.bin` files as one sequence, in the order of the sorted walk or of a data-order file.

Files that are unchanged since they were last examined are recognised by their sizes and times (file_catalog.py); all
others are examined: the complete meta, and the beginning and end of the text.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from xtuner.core.errors import DataError
from xtuner.core.log import logger, progress
from xtuner.data.format import file_catalog
from xtuner.data.format.bin_file import BinFile, Signature
from xtuner.data.format.cache_dirs import CacheDirs, Opening, log_once
from xtuner.data.format.file_catalog import SIGNATURE, Catalog, Records
from xtuner.data.format.file_order import no_files_error, read_order, require_folder, walk_files
from xtuner.data.format.text_reader import LongLines, SpanReader, ZeroReader
from xtuner.data.format.token_cache import TokenCache, find_token_cache
from xtuner.data.packing import document_order
from xtuner.data.packing.document_order import MAX_WORKERS, PARALLEL_FROM, DocumentOrders
from xtuner.data.process_pool import map_ordered, usable_workers

SHOWN = 20  # problems in one message
STATS = 256  # files per task of the threads that read sizes and times
THREADS = 16


class TokenizedFolder:
    """The documents of a folder of tokenized files, as a sequence of `BinFile`s; files without documents are left out.

    A file that a data order names several times is contained as often.
    """

    def __init__(
        self,
        folder: Path,
        catalog: Catalog,
        min_length: int,
        cache_dirs: CacheDirs,
        request: list[str],
        learn_zero: bool = False,
    ) -> None:
        self.folder = folder
        self.catalog = catalog
        self.min_length = min_length
        self.cache_dirs = cache_dirs
        self.request = request  # the arguments, for comparison with those of another rank
        self.learn_zero = learn_zero
        self.orders: DocumentOrders | None = None

    def __len__(self) -> int:
        return len(self.catalog)

    @overload
    def __getitem__(self, i: int) -> BinFile: ...
    @overload
    def __getitem__(self, i: slice) -> list[BinFile]: ...
    def __getitem__(self, i: int | slice) -> BinFile | list[BinFile]:
        numbers = range(len(self))[i]
        if isinstance(numbers, range):
            return [self[n] for n in numbers]
        file = self.catalog.file(numbers, self.folder, self.min_length)
        return replace(file, learn_zero=True) if self.learn_zero else file

    def __iter__(self) -> Iterator[BinFile]:
        return (self[i] for i in range(len(self)))

    def file(self, i: int) -> BinFile:
        return self[i]

    @property
    def location(self) -> str:
        return str(self.folder)

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
                self.catalog, self.folder, self.min_length, seed, self.cache_dirs, small
            )
        return self.orders

    def order(self, i: int, seed: int) -> tuple[document_order.RowNumbers, npt.NDArray[np.int64]]:
        return document_order.shuffle_file(self[i], seed)

    def reader(self, i: int, long: LongLines) -> TokenCache | SpanReader | ZeroReader:
        file = self[i]
        reader = self.find_token_cache(file) or SpanReader(file, long)
        return ZeroReader(reader) if self.learn_zero else reader

    def find_token_cache(self, file: BinFile) -> TokenCache | None:
        return find_token_cache(file, self.cache_dirs)


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
        folder: contains `*.bin` and `*.bin.meta` files, at any depth.
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
    if (known := opening.known) and known["request"] == request and (found := _open_shared(known)):
        whole = TokenizedFolder(root, found.catalog, min_length, cache_dirs, request, learn_zero)
        whole.orders = found
        return whole
    names = (
        list(walk_files(root, file_type)) if data_order_path is None else read_order(data_order_path, root, file_type)
    )
    if not names:
        raise no_files_error(root, file_type)
    catalog = build_catalog(root, list(dict.fromkeys(names)), min_length, cache_dirs)
    if len(names) > len(catalog):  # the data order names files more than once
        row = {name: i for i, name in enumerate(catalog.names)}
        catalog = catalog.select([row[name] for name in names])
    kept = np.flatnonzero(catalog.documents)
    if len(kept) < len(names):
        logger.info(f"{len(names) - len(kept)} files have no document of at least {min_length} tokens: left out")
        catalog = catalog.select(kept)
    return TokenizedFolder(root, catalog, min_length, cache_dirs, request, learn_zero)


def _open_shared(known: Mapping[str, Any]) -> DocumentOrders | None:
    try:
        return DocumentOrders(Path(known["path"]), known["key"])
    except (OSError, ValueError):
        return None  # not visible on this node: the folder is walked here


def build_catalog(folder: Path, names: list[str], min_length: int, cache_dirs: CacheDirs) -> Catalog:
    """The catalog of these files; those without a valid cached entry are examined. Raises: DataError that lists all
    faulty files."""
    signatures = read_signatures(folder, names)
    catalog, fresh = _find_unchanged(names, signatures, cache_dirs, f"files-{min_length}.cat")
    unknown = np.flatnonzero(~fresh).tolist()
    if unknown:
        meta_bytes = int(signatures["meta_size"][unknown].clip(min=0).sum())
        _examine(catalog, unknown, folder, min_length, meta_bytes)
        if int(catalog.documents.sum()) >= document_order.SMALL and not cache_dirs.read_only:
            save_catalog(catalog, cache_dirs, min_length)
    return catalog


def save_catalog(catalog: Catalog, cache_dirs: CacheDirs, min_length: int) -> None:
    """Write a catalog for the next start, merged with the entries of older ones for other files of the folder."""
    name = f"files-{min_length}.cat"
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


def read_signatures(folder: Path, names: list[str]) -> Records:
    """Sizes and times, SIGNATURE [files]; all -1 for a file that cannot be accessed, or whose meta cannot."""

    def read(part: list[str]) -> list[Signature]:
        return [_signature(folder / name) for name in part]

    parts = [names[i : i + STATS] for i in range(0, len(names), STATS)]
    with ThreadPoolExecutor(THREADS) as pool:  # a network file system serves many requests at once
        found = [s for part in pool.map(read, parts) for s in part]
    return np.array(found, SIGNATURE)


def _signature(path: Path) -> Signature:
    try:
        return Signature.read(path)
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


def _examine(catalog: Catalog, unknown: list[int], folder: Path, min_length: int, meta_bytes: int) -> None:
    """Examine the `unknown` files, whose metas have `meta_bytes` in total, and add them to the catalog.

    Raises: DataError that lists all faulty files.
    """
    files = [BinFile(folder / catalog.names[i], catalog.names[i], min_length) for i in unknown]
    large = len(files) > 1 and meta_bytes >= 16 * PARALLEL_FROM
    workers = min(usable_workers(None), MAX_WORKERS) if large else 1
    problems = []
    results = map_ordered(_examine_file, files, workers)
    for i, found in zip(unknown, progress(results, "reading metas", total=len(files)), strict=True):
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


def _examine_file(file: BinFile) -> BinFile | DataError:
    """For `map_ordered`: the file with its facts, or the error."""
    try:
        return file.examine()
    except DataError as e:
        return e
    except OSError as e:  # the file was removed meanwhile
        return DataError(f"{file.name} cannot be read: {e.strerror}", where=str(file.path))
