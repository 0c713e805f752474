"""Downloads files of object storage before their packs are read."""

import contextlib
import threading
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from xtuner.core.errors import XTunerError
from xtuner.core.remote.cache import open_cache
from xtuner.core.remote.path import RemotePath
from xtuner.core.remote.store import ChangedObjectError

AHEAD = 64  # packs
FILES = 4  # at a time


def is_remote(dataset: Any) -> bool:
    """Whether a dataset has files in object storage."""
    documents = getattr(dataset, "documents", None)
    parts = getattr(documents, "parts", None) or [documents]
    return any(isinstance(getattr(part, "folder", None), RemotePath) for part in parts)


def prefetch_files(dataset: Any, numbers: Iterator[int]) -> Iterator[int]:
    """The same numbers of packs, while the files of the next `AHEAD` ones are downloaded: of fewer, if these files
    would fill half of the cache."""
    waiting: deque[tuple[int, int]] = deque()  # (pack, file)
    used: Counter[int] = Counter()  # packs of a file among these
    stopped = threading.Event()
    most = open_cache().size // 2
    total = 0
    pool = ThreadPoolExecutor(FILES, "xtuner-files")
    try:
        for number in numbers:
            i = dataset.locate(number)[0]
            file = dataset.documents.file(i)
            if not used[i]:
                total += _size(file)
                pool.submit(_download, file, stopped)
            used[i] += 1
            waiting.append((number, i))
            while len(waiting) > AHEAD or (waiting and total > most):
                number, i = waiting.popleft()
                used[i] -= 1
                total -= 0 if used[i] else _size(dataset.documents.file(i))
                yield number
        yield from (number for number, _ in waiting)
    finally:
        stopped.set()
        pool.shutdown(wait=False, cancel_futures=True)


def _size(file: Any) -> int:
    """Bytes that it has in the cache: 0 for files on a disk, of whatever kind."""
    if not isinstance(getattr(file, "path", None), RemotePath):
        return 0
    signature = file.facts.signature
    size: int = signature.meta_size + (0 if file.by_ranges else signature.size)
    return size


def _download(file: Any, stopped: threading.Event) -> None:
    """What fails here fails again when the pack is read, and is reported there."""
    with contextlib.suppress(XTunerError, OSError, ChangedObjectError):
        if isinstance(getattr(file, "path", None), RemotePath):
            signature = file.facts.signature
            if not file.by_ranges:
                file.path.open(signature[:2], stopped).close()
            file.path.with_name(f"{file.path.name}.meta").open(signature[2:], stopped).close()
