"""Files of object storage on this machine: at most `XTUNER_OBJECT_CACHE_SIZE` bytes, those not used for longest leave.

    FOLDER/                 XTUNER_OBJECT_CACHE, else xtuner/objects in the user's cache folder
      files/HASH            an object; its modification time is its version, its access time the last use
      folders/HASH/NAME/    a model: a folder whose files are all there, or absent
      locks/                one process of this machine downloads an object, the others wait for it
      locks/lock            held while space is reserved; contains a number of bytes that is at least what is used

Space is reserved before a download, by a file of that size, so that the bound holds for all processes together. A file
may leave while it is read: an open one stays readable. A folder stays while a process that has opened it runs.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from xtuner.core.errors import CheckpointError, ConfigError
from xtuner.core.file_owner import is_owner_alive, owner_tag
from xtuner.core.files import remove_tree, user_cache_dir
from xtuner.core.log import human_bytes, logger

FOLDER, SIZE = "XTUNER_OBJECT_CACHE", "XTUNER_OBJECT_CACHE_SIZE"
DEFAULT_SIZE = "100GiB"
STRIPES = 4096  # lock files; two objects that share one wait for each other
USED_AGAIN = 60.0  # s; a later use is recorded
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class _Item(NamedTuple):
    used: float  # time of the last use
    size: int
    path: Path


def open_cache() -> "Cache":
    """The cache of this machine, by what the environment says now. Raises: ConfigError."""
    text = os.environ.get(SIZE) or DEFAULT_SIZE
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)(?:iB|B)?", text.strip(), re.IGNORECASE)
    size = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
    if size <= 0:
        raise ConfigError(f"{SIZE} = {text!r} is not a size", where=SIZE, do="as 500GiB")
    folder = os.environ.get(FOLDER)
    return _open(Path(folder).expanduser() if folder else user_cache_dir() / "objects", size)


@functools.lru_cache(16)
def _open(folder: Path, size: int) -> "Cache":
    return Cache(folder, size)


class Cache:
    """Args: folder; `size` in bytes. Methods raise CheckpointError if the disk fails or the bound is too small."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size
        self._held: dict[Path, IO[Any]] = {}  # locks of folders that this process uses

    def open_file(self, url: str, size: int, version: int, fill: Callable[[int], None]) -> IO[bytes]:
        """An object's file, unbuffered. `fill` writes it to an open file if it is not here. Raises: what `fill` does.

        A process that runs out of space for it waits for nobody: it is an error if all else is in use.
        """
        path = self.folder / "files" / _hash(url, version)
        if found := self._open(path, size):
            return found
        with self._disk(), self._locked(path.name):
            if found := self._open(path, size):  # another process was faster
                return found
            temporary, fd = self._reserve(path, size, url)
            with os.fdopen(fd, "wb"), _removed_on_error(temporary):
                fill(fd)
                os.utime(fd, ns=(time.time_ns(), version))
                os.fsync(fd)
                with self._locked(""):  # a scan of the folder meanwhile could miss both names
                    os.rename(temporary, path)
                    return open(path, "rb", buffering=0)

    def has_file(self, url: str, version: int) -> bool:
        return (self.folder / "files" / _hash(url, version)).exists()

    def open_folder(self, url: str, version: int, size: int, fill: Callable[[Path], None]) -> Path:
        """A folder that `fill` writes if it is not here, named like the URL. It stays while this process runs."""
        path, name = self.folder / "folders" / _hash(url, version), url.rpartition("/")[2]
        with self._disk(), self._locked(path.name):
            self._hold(path)
            if path.is_dir():
                os.utime(path)
                return path / name
            reserved, fd = self._reserve(path, size, url)
            temporary = path.with_name(f".{path.name}.tmp-{owner_tag()}")
            with os.fdopen(fd, "wb"), _removed_on_error(reserved), _removed_on_error(temporary):
                (temporary / name).mkdir(parents=True)
                fill(temporary / name)
                with self._locked(""):  # no other process counts both
                    os.rename(temporary, path)
                    reserved.unlink()
            return path / name

    def used(self) -> int:
        """Bytes in use or reserved."""
        return sum(item.size for item in self._items())

    def _open(self, path: Path, size: int) -> IO[bytes] | None:
        try:
            found = open(path, "rb", buffering=0)  # noqa: SIM115
        except FileNotFoundError:
            return None
        stat = os.fstat(found.fileno())
        if stat.st_size != size:  # after a power failure
            found.close()
            return None
        if time.time() - stat.st_atime > USED_AGAIN:
            with contextlib.suppress(OSError):
                os.utime(path, ns=(time.time_ns(), stat.st_mtime_ns))
        return found

    def _hold(self, path: Path) -> None:
        if path not in self._held:
            lock = self._lock_file(f"use-{path.name}")
            fcntl.flock(lock, fcntl.LOCK_SH)
            self._held[path] = lock

    def _reserve(self, path: Path, size: int, url: str) -> tuple[Path, int]:
        """(a temporary file of `size` bytes next to `path`, open). Removes what was not used for longest."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._locked("") as lock:
            disk = os.statvfs(self.folder)
            free = disk.f_bavail * disk.f_frsize
            used = self._read_used(lock)
            if used + size > self.size or size > free:
                used = self._make_room(size, free, url)
            temporary = path.with_name(f".{path.name}.part-{owner_tag()}")
            fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            os.ftruncate(fd, size)
            _write_used(lock, used + size)
            return temporary, fd

    def _read_used(self, lock: IO[Any]) -> int:
        lock.seek(0)
        text = lock.read(40)
        return int(text) if text.isdecimal() else self.used()

    def _make_room(self, size: int, free: int, url: str) -> int:
        """Remove what was not used for longest, on a disk with `free` bytes. Returns the bytes used then."""
        items = sorted(self._items())
        used = sum(item.size for item in items)
        most = min(self.size, used + free)
        for item in items:
            if used + size <= most:
                break
            if self._remove(item.path):
                used -= item.size
        if used + size > most:
            raise CheckpointError(
                f"{url} has {human_bytes(size)}, and the cache of object storage has room for "
                f"{human_bytes(max(most - used, 0))}: {human_bytes(used)} are in use",
                where=str(self.folder),
                do=f"set {SIZE} to more than {human_bytes(self.size)}, or {FOLDER} to a larger disk",
            )
        return used

    def _items(self) -> Iterator[_Item]:
        """Files, folders and reservations. Those of processes that have ended are removed."""
        for folder in (self.folder / "files", self.folder / "folders"):
            with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):  # it has left meanwhile
                        path, stat = Path(entry.path), entry.stat()
                        if entry.name.startswith(".") and is_owner_alive(entry.name) is False:
                            remove_tree(path)
                        elif entry.is_file():
                            yield _Item(stat.st_atime, stat.st_size, path)
                        elif not entry.name.startswith("."):  # else the reservation has been counted
                            size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
                            yield _Item(stat.st_mtime, size, path)

    def _remove(self, path: Path) -> bool:
        """Remove a file, or a folder that no process uses. Returns whether it did."""
        if path.name.startswith("."):  # a download of another process
            return False
        if not path.is_dir():
            path.unlink(missing_ok=True)
            return True
        with self._lock_file(f"use-{path.name}") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            aside = path.with_name(f".{path.name}.removing-{owner_tag()}")
            os.rename(path, aside)
            remove_tree(aside)
        return True

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[IO[Any]]:
        with self._lock_file(f"{int(name[:8], 16) % STRIPES:03x}" if name else "lock") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.debug(f"another process of this machine downloads to {self.folder}: waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield lock

    def _lock_file(self, name: str) -> IO[Any]:
        folder = self.folder / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        return open(folder / name, "a+")

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        """Errors of the disk in the user's words."""
        try:
            yield
        except FileNotFoundError:  # an object
            raise
        except OSError as e:
            raise CheckpointError(
                f"the cache of object storage cannot be written: {e.strerror or e}",
                where=str(e.filename or self.folder),
                do=f"free some space, or set {FOLDER} to a folder on another disk",
            ) from None


@contextlib.contextmanager
def _removed_on_error(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            remove_tree(path)
        raise


def _write_used(lock: IO[Any], used: int) -> None:
    lock.truncate(0)  # it is open for appending
    lock.write(str(used))


def _hash(url: str, version: int) -> str:
    return hashlib.sha256(f"{url}\0{version}".encode()).hexdigest()[:40]
