"""Checks of what the command line of a run gives: numbers, and a work dir that is writable and not in use."""

import errno
import math
import os
import tempfile
import time
from pathlib import Path

from xtuner.config.config import Config
from xtuner.core.errors import ConfigError
from xtuner.core.files import require_utf8, write_failure
from xtuner.train.checkpoints import work_dir_lock


def check_command_line(work_dir: Path, seed: int | None = None, max_minutes: float | None = None) -> None:
    """Check the command line: numbers, and that the work dir is writable and not in use. Leaves no files.

    Raises: ConfigError; BusyError for another run's work dir; CheckpointError for a disk that cannot be written.
    """
    require_utf8(work_dir, "work dir")
    if seed is not None and not 0 <= seed < 2**32:
        raise ConfigError(f"--seed {seed} is not in 0 … 2^32 - 1", where="--seed")
    if max_minutes is not None and not (math.isfinite(max_minutes) and max_minutes >= 0):
        raise ConfigError(
            f"--max-minutes {max_minutes:g} is not a number of minutes from 0 on",
            where="--max-minutes",
            do="0 stops after one iteration; omit it to train to the end",
        )
    try:
        there = work_dir.absolute()
        while not _exists(there):
            there = there.parent
        if not there.is_dir():
            raise NotADirectoryError(None, "it is a file" if there.is_file() else "it is not a folder", str(there))
        _try_to_write(there)
        if there == work_dir.absolute():
            work_dir_lock.require_dead(there / work_dir_lock.NAME, time.time())
    except ValueError as e:
        raise ConfigError(f"the work dir cannot be made: {e}", where=repr(str(work_dir))) from None
    except OSError as e:
        e.filename = None  # the name of the temporary file
        raise write_failure(e, "the work dir", work_dir, "give another one with --work-dir") from None


def _try_to_write(folder: Path) -> None:
    """Create an unnamed file, which vanishes even after a kill; a temporary folder on file systems without these.

    Raises: OSError.
    """
    try:
        os.close(os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o600))
    except OSError as e:
        if e.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
        tempfile.TemporaryDirectory(prefix=".xtuner-", dir=folder).cleanup()


def _exists(path: Path) -> bool:
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    return True


def resolve_work_dir(given: str | None, config: Config) -> Path:
    """--work-dir, else the config's, else work_dirs/CONFIG. Raises: ConfigError for an unknown ~user."""
    named = given or config.setting("work_dir")
    default = Path("work_dirs") / config.name
    try:
        return Path(named).expanduser() if isinstance(named, str) else default  # `check_settings` rejects other types
    except RuntimeError as e:
        where = "--work-dir" if given else config.where("work_dir")
        raise ConfigError(f"the work dir {named!r} cannot be found: {e}", where=where) from None
