"""Folders: from a disk to object storage, and back."""

import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from xtuner.core.activity import record_progress
from xtuner.core.errors import CheckpointError
from xtuner.core.remote.cache import open_cache
from xtuner.core.remote.store import ChangedObjectError, Entry, open_store
from xtuner.core.remote.url import Url

FILES = 4  # at a time; each is sent in several parts at a time


def list_names(url: Url) -> dict[str, Entry]:
    """The objects below a folder by their names in it, sorted. Empty if there are none."""
    begin = len(url.key) + 1 if url.key else 0
    return {entry.key[begin:]: entry for entry in open_store(url).list_objects(url.key)}


def upload_files(folder: Path, names: Iterable[str], url: Url) -> None:
    """Raises: ConfigError, CheckpointError; OSError of the disk."""
    store = open_store(url)
    with ThreadPoolExecutor(FILES, "xtuner-files") as pool:
        list(pool.map(lambda name: store.upload(folder / name, url.join(name).key), names))


def download_files(names: dict[str, Entry], url: Url, folder: Path) -> None:
    """Write objects to files of these names, which are on the disk when it returns. Raises: as `upload_files`."""
    store = open_store(url)

    def download(name: str) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as f:
            os.ftruncate(f.fileno(), names[name].size)
            store.download(names[name], f.fileno())
            os.fsync(f.fileno())
        record_progress(f"{name} downloaded")

    try:
        with ThreadPoolExecutor(FILES, "xtuner-files") as pool:
            list(pool.map(download, names))
    except (ChangedObjectError, FileNotFoundError):
        raise CheckpointError(
            f"{url} has changed while it was downloaded", where=str(url), do="run the same command again"
        ) from None


def cache_folder(url: Url, wanted: Callable[[str], bool]) -> Path | None:
    """A folder of objects on this machine, with the files of these names; None if there are no such objects.

    Downloaded once for all processes of the machine. An object that changes later makes another folder.
    """
    names = {name: entry for name, entry in list_names(url).items() if wanted(name)}
    if not names:
        return None
    size = sum(entry.size for entry in names.values())
    version = _hash(names)
    return open_cache().open_folder(str(url), version, size, lambda folder: download_files(names, url, folder))


def _hash(names: dict[str, Entry]) -> int:
    """A number that follows from names and versions."""
    text = "\n".join(f"{entry.version} {name}" for name, entry in names.items())
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
