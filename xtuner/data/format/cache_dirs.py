"""Directories for the caches of a data folder: next to the data if that is writable, else the user's cache folder.

Caches are optional: one that is absent, damaged, outdated or cannot be written is rebuilt or done without. A cache file
is complete from the moment it has its name and never changes afterwards, so that mappings of it stay valid.
"""

import contextlib
import fcntl
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from xtuner.core.files import atomic_file, user_cache_dir
from xtuner.core.foreign_inputs import check_regular
from xtuner.core.log import logger
from xtuner.core.remote.path import AnyPath, RemotePath
from xtuner.data.format.file_order import CACHE_FOLDER

VARIABLE = "XTUNER_DATA_CACHE"
_logged: set[str] = set()
_log_lock = threading.Lock()  # two threads read packs


def log_once(text: str, level: Callable[[str], None] = logger.warning) -> None:
    """Log a text at its first occurrence in this process."""
    with _log_lock:
        if text in _logged:
            return
        _logged.add(text)
    level(text)


@dataclass(frozen=True)
class Opening:
    """How a run opens its data folders.

    Args:
        cache_dir: value of `--cache-dir`, which overrides the config's.
        read_only: use existing caches, write none.
        known: what another rank has found, of each folder (open_on_ranks.py).
    """

    cache_dir: str | None = None
    read_only: bool = False
    known: Sequence[Mapping[str, Any]] = ()

    def find_known(self, request: list[str]) -> Mapping[str, Any] | None:
        """What another rank has found for a folder opened with these arguments."""
        return next((known for known in self.known if known["request"] == request), None)


class CacheDirs:
    """The directories that may contain caches of one data folder, in order of preference.

    Args:
        cache_dir: the only directory to use; None for $XTUNER_DATA_CACHE, else next to the data, else the user's
            cache folder.
        read_only: use existing caches, write none.
    """

    def __init__(self, folder: AnyPath, cache_dir: str | Path | None = None, read_only: bool = False) -> None:
        self.folder = folder
        self.failures: list[str] = []
        self.read_only = read_only
        root = str(folder) if isinstance(folder, RemotePath) else os.path.abspath(folder)
        own = f"{os.path.basename(root)}-{hashlib.sha256(os.fsencode(root)).hexdigest()[:12]}"
        given = cache_dir or os.environ.get(VARIABLE)
        if given:
            self.dirs = [Path(os.path.expanduser(given)) / own]
        else:
            self.dirs = [user_cache_dir() / "data" / own]
            if not isinstance(folder, RemotePath):
                self.dirs.insert(0, folder / CACHE_FOLDER)

    def candidates(self, name: str) -> Iterator[Path]:
        """Existing cache files of this name."""
        return (d / name for d in self.dirs if os.path.isfile(d / name))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Exclude other processes that build caches here. Where the file system has no locks, two processes may build
        the same file; both results are equal, and the last one stays."""
        with contextlib.ExitStack() as stack:
            for folder in self.dirs:
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                    check_regular(folder / "lock")
                    lock = stack.enter_context(open(folder / "lock", "a"))
                except OSError:
                    continue
                with contextlib.suppress(OSError):
                    try:
                        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        logger.info(f"another process is building the index of {self.folder}: waiting for it")
                        fcntl.flock(lock, fcntl.LOCK_EX)
                break
            yield

    def write(self, name: str, fill: Callable[[IO[bytes]], Any], what: str, quiet: bool = False) -> Path | None:
        """Write a file with `fill` to the first directory where that works. Returns its path; None, logged once, if
        it works nowhere.

        Sets `failures`, one reason per directory. Raises: what `fill` raises, except OSError.
        """
        self.failures = []
        if self.read_only:
            return None
        for folder in self.dirs:
            try:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                with atomic_file(folder / name, "wb") as f:
                    fill(f)
            except OSError as e:
                self.failures.append(f"{folder}: {e.strerror or e}")
                continue
            if folder.name != CACHE_FOLDER:
                log_once(f"caches of {self.folder} are kept in {folder}", logger.info)
            return folder / name
        if not quiet:
            why = "; ".join(self.failures)
            log_once(f"{what} cannot be cached and is rebuilt at each start ({why}); give a writable --cache-dir")
        return None
