"""An object as a path. The functions below treat it and a local file alike; an object is read through the cache."""

import bisect
import io
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xtuner.core.foreign_inputs import open_regular
from xtuner.core.remote.cache import open_cache
from xtuner.core.remote.store import Entry, open_store
from xtuner.core.remote.url import Url, is_remote, parse_url

GAP = 2**16  # bytes between two ranges that one request reads: less than what it costs to make another


@dataclass(frozen=True)
class RemotePath:
    """An object, or a folder of objects. Nothing is requested before it is needed.

    Args:
        url: its address.
        listed: the objects of the folder that it was found in, by key; not sent to other processes.
    """

    url: Url
    listed: dict[str, Entry] = field(default_factory=dict, compare=False, repr=False)

    def __str__(self) -> str:
        return str(self.url)

    def __reduce__(self) -> tuple[Any, ...]:
        return RemotePath, (self.url,)

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(self.url.join(name), self.listed)

    @property
    def name(self) -> str:
        return self.url.name

    def resolve(self) -> "RemotePath":
        return self

    def with_name(self, name: str) -> "RemotePath":
        above = self.url.key.rpartition("/")[0]
        return RemotePath(Url(self.url.scheme, self.url.bucket, f"{above}/{name}".strip("/")), self.listed)

    def entry(self) -> Entry:
        """Raises: FileNotFoundError."""
        return self.listed.get(self.url.key) or open_store(self.url).head(self.url.key)

    def open(self, known: tuple[int, ...] | None = None, stopped: threading.Event | None = None) -> Any:
        """The object as a file on this machine, unbuffered. Raises: FileNotFoundError; ChangedObjectError; and
        InterruptedError after `stopped` has been set."""
        entry = Entry(self.url.key, *known) if known else self.entry()
        store = open_store(self.url)
        return open_cache().open_file(
            str(self), entry.size, entry.version, lambda fd: store.download(entry, fd, stopped)
        )

    def open_part(self, known: tuple[int, ...] | None = None) -> Any:
        """As `open`, to read a little of it: what is not in the cache is requested as it is read."""
        entry = Entry(self.url.key, *known) if known else self.entry()
        if open_cache().has_file(str(self), entry.version):
            return self.open((entry.size, entry.version))
        return RangeFile(self.url, entry)


AnyPath = Path | RemotePath


class RangeFile(io.RawIOBase):
    """An object as a file for reading, one request for each read of what `load` has not loaded."""

    def __init__(self, url: Url, entry: Entry) -> None:
        self.url, self.entry, self.at = url, entry, 0
        self._loaded: dict[int, bytes] = {}  # begin → bytes

    def load(self, ranges: list[tuple[int, int]]) -> None:
        """Read these ranges (begin, end), sorted, at the same time; neighbours together."""
        joined: list[tuple[int, int]] = []
        for begin, end in ranges:
            if joined and begin - joined[-1][1] <= GAP:
                joined[-1] = joined[-1][0], max(end, joined[-1][1])
            else:
                joined.append((begin, end))
        found = open_store(self.url).read_ranges(self.entry.key, joined, self.entry.version)
        self._loaded = {begin: data for (begin, _), data in zip(joined, found, strict=True)}
        self._begins = sorted(self._loaded)

    def pread(self, size: int, offset: int) -> bytes:
        """As `os.pread`."""
        if self._loaded:
            begin = self._begins[max(bisect.bisect_right(self._begins, offset) - 1, 0)]
            data = self._loaded[begin]
            if begin <= offset and offset + size <= begin + len(data):
                return data[offset - begin : offset - begin + size]
        end = min(offset + size, self.entry.size)
        return open_store(self.url).read(self.entry.key, offset, end, self.entry.version)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.entry.size}[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        data = self.pread(len(buffer), self.at)
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


def make_path(name: str | Path, where: str = "") -> AnyPath:
    """The path that a user wrote, `~` expanded. Raises: ConfigError for an invalid address in object storage."""
    return RemotePath(parse_url(str(name), where)) if is_remote(str(name)) else Path(os.path.expanduser(name))


def list_folder(folder: RemotePath) -> RemotePath:
    """The same folder with all its objects listed."""
    found = open_store(folder.url).list_objects(folder.url.key)
    return RemotePath(folder.url, {entry.key: entry for entry in found})


def pread_any(f: Any, size: int, offset: int) -> bytes:
    """As `os.pread`, of a file that `open_any` or `RemotePath.open_part` has opened."""
    return f.pread(size, offset) if isinstance(f, RangeFile) else os.pread(f.fileno(), size, offset)


def open_any(path: AnyPath, known: tuple[int, ...] | None = None, buffering: int = -1) -> Any:
    """A file or an object for reading. Raises: OSError, and what `RemotePath.open` does.

    Args:
        known: size and time of the file, if it is known.
    """
    return path.open(known) if isinstance(path, RemotePath) else open_regular(path, buffering)


def stat_any(path: AnyPath) -> tuple[int, int]:
    """(size, modification time in ns or version). Raises: OSError."""
    if isinstance(path, RemotePath):
        entry = path.entry()
        return entry.size, entry.version
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


def exists_any(path: AnyPath) -> bool:
    if not isinstance(path, RemotePath):
        return os.path.exists(path)
    try:
        path.entry()
    except FileNotFoundError:
        return False
    return True
