"""Builds the caches of a folder for `xtuner data cache`: the index of one seed, and the tokens of each file."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from xtuner.core.errors import DataError
from xtuner.core.log import progress
from xtuner.data import process_pool
from xtuner.data.format import token_cache
from xtuner.data.format.bin_file import BinFile
from xtuner.data.format.cache_dirs import CacheDirs
from xtuner.data.format.file_order import require_local
from xtuner.data.format.folder import TokenizedFolder, save_catalog
from xtuner.data.format.meta import MetaView
from xtuner.data.format.parse_tokens import Int64s
from xtuner.data.inspect.check_files import compare_with_meta
from xtuner.data.inspect.scan import Scanner, split_file
from xtuner.data.sources.decoded import DecodedFile


@dataclass
class CacheResult:
    """Where the caches were written. `failed`: (file, reason) of token caches that could not be written."""

    index: Path | None = None
    tokens: int = 0  # files with a valid token cache
    made: int = 0  # token caches that this call has written
    bytes: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)


class _Job(NamedTuple):
    file: BinFile
    cache_dirs: CacheDirs


class _Result(NamedTuple):
    name: str
    bytes: int = 0
    failure: str = ""
    error: DataError | None = None


def build_caches(data: TokenizedFolder, seed: int, with_tokens: bool = True, workers: int | None = None) -> CacheResult:
    """Build the caches that are missing.

    Raises: DataError for a text that contradicts its meta, after the caches of all other files are built.
    """
    require_local(data.folder, "xtuner data cache")
    workers = process_pool.usable_workers(workers)
    rows = {name: i for i, name in enumerate(data.catalog.names)}
    save_catalog(data.catalog.select(list(rows.values())), data.cache_dirs, data.min_length, data.kind)
    orders = data.load_orders(seed, small=0)
    made = CacheResult(orders.path if orders else None)
    jobs = []
    for file in {file.name: file for file in data}.values():
        if isinstance(file, DecodedFile) and not file.is_mapped:  # decoded when it was examined, unless removed since
            if found := file.find_cache() or file.build_cache():
                made.tokens, made.bytes = made.tokens + 1, made.bytes + found[0].path.stat().st_size
            else:
                made.failed.append((file.name, "; ".join(data.cache_dirs.failures)))
        if not isinstance(file, BinFile):
            continue
        cache = token_cache.find_token_cache(file, data.cache_dirs)
        if cache is not None:
            made.tokens += 1
            made.bytes += cache.path.stat().st_size
        elif with_tokens:
            jobs.append(_Job(file, data.cache_dirs))
    errors = []
    results = process_pool.map_ordered(write_token_cache, jobs, min(workers, max(len(jobs), 1)))
    for result in progress(results, "caching tokens", total=len(jobs)):
        if result.error:
            errors.append(result.error)
        elif result.failure:
            made.failed.append((result.name, result.failure))
        else:
            made.tokens, made.made, made.bytes = made.tokens + 1, made.made + 1, made.bytes + result.bytes
    if errors:
        more = f" (and {len(errors) - 1} other files)" if len(errors) > 1 else ""
        first = errors[0]
        raise DataError(first.what + more, where=first.where, why=first.why, do="list all: xtuner data check FOLDER")
    return made


def write_token_cache(job: _Job) -> _Result:
    """For a worker process: write the token cache of one file."""
    size = 0

    def fill(f: IO[bytes]) -> None:
        nonlocal size
        size = _fill(f, job.file)

    try:
        path = job.cache_dirs.write(
            token_cache.cache_name(job.file.name), fill, f"the token cache of {job.file.name}", quiet=True
        )
    except DataError as e:
        return _Result(job.file.name, error=e)
    failure = "" if path else "; ".join(job.cache_dirs.failures)
    return _Result(job.file.name, size, failure)


def _fill(f: IO[bytes], file: BinFile) -> int:
    """Returns the bytes written. Raises: DataError, OSError."""
    assert file.facts is not None
    meta = MetaView(file.path)
    meta.check()
    if not meta.in_order:
        raise DataError(
            "the rows of the meta are not in the order of the text",
            where=str(file.path),
            why="a token cache is built in one pass over both",
        )
    total = 0

    def take(part: Int64s) -> None:
        nonlocal total
        total += len(part)
        f.write(part.astype(np.int32).data)

    token_cache.write_head(f, meta.lengths, file.facts.signature)
    path = require_local(file.path, "a token cache")
    for part in split_file(path, os.stat(path).st_size):
        found = Scanner(part, take=take).run()
        wrong = f"byte {found.problems[0][0]}: {found.problems[0][1]}" if found.problems else ""
        wrong = wrong or compare_with_meta(meta, part, found.table())
        if wrong:
            raise DataError(
                "the text contradicts its meta", where=str(file.path), why=wrong, do="xtuner data check FOLDER"
            )
    file.check_unchanged()
    return f.tell()
