"""Where what is made of a data folder is kept: beside it, where that can be written, else in a folder of the user's.

Nothing here is needed: whatever is absent, torn, old or cannot be written is made again or done without. Files appear
whole under their names, and never change afterwards: whoever has one mapped keeps what was in it.
"""

import contextlib
import fcntl
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from xtuner.core.files import atomic_file, user_cache
from xtuner.core.foreign_inputs import check_regular
from xtuner.core.log import logger
from xtuner.data.format.file_order import CACHE_FOLDER

VARIABLE = "XTUNER_DATA_CACHE"
_logged: set[str] = set()
_log_lock = threading.Lock()  # two threads read packs


def log_once(text: str, level: Callable[[str], None] = logger.warning) -> None:
    with _log_lock:
        if text in _logged:
            return
        _logged.add(text)
    level(text)


@dataclass(frozen=True)
class Opening:
    """How a run opens its data folders.

    Args:
        cache_dir: of `--cache-dir`, before what a config says.
        read_only: look at caches, write none.
        known: what another rank has found (open_on_ranks.py).
    """

    cache_dir: str | None = None
    read_only: bool = False
    known: Mapping[str, Any] | None = None


class CacheDirs:
    """The folders in which caches of one data folder may lie.

    Args:
        cache_dir: the one place to use; None for $XTUNER_DATA_CACHE, else beside the data, else the user's cache
            folder.
        read_only: look at caches, write none.
    """

    def __init__(self, folder: Path, cache_dir: str | Path | None = None, read_only: bool = False) -> None:
        self.folder = folder
        self.failures: list[str] = []
        self.read_only = read_only
        root = Path(os.path.abspath(folder))
        own = f"{root.name}-{hashlib.sha256(os.fsencode(root)).hexdigest()[:12]}"
        given = cache_dir or os.environ.get(VARIABLE)
        if given:
            self.dirs = [Path(os.path.expanduser(given)) / own]
        else:
            self.dirs = [folder / CACHE_FOLDER, user_cache() / "data" / own]

    def candidates(self, name: str) -> Iterator[Path]:
        """Files of this name that are there."""
        return (d / name for d in self.dirs if os.path.isfile(d / name))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Wait until nobody else builds here, as far as the file system can tell: without locks the work is done twice,
        and the last of two equal files stays."""
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
                        logger.info(f"another process builds the index of {self.folder}: waiting for it")
                        fcntl.flock(lock, fcntl.LOCK_EX)
                break
            yield

    def write(self, name: str, fill: Callable[[IO[bytes]], Any], what: str, quiet: bool = False) -> Path | None:
        """Write a file by `fill` in the first folder that takes it. Returns where; None, told once, if none does.

        `failures` says afterwards why folders did not take it. Raises: what `fill` raises, but OSError.
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
            if folder != self.folder / CACHE_FOLDER:
                log_once(f"caches of {self.folder} are kept in {folder}", logger.info)
            return folder / name
        if not quiet:
            log_once(f"{what} is not kept: each start makes it again ({'; '.join(self.failures)}); give a --cache-dir")
        return None
