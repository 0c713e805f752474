"""Errors that a user can act on, each with the exit code of the program.

Every message answers four questions: what happened, where (file and byte, or config key), why it matters,
and what to do next. A bug in xtuner itself is not one of these: it ends in a traceback and exit code 1.
"""

import errno
import os
import sys
import traceback
from pathlib import Path
from types import TracebackType

from xtuner.core.secrets import mask_text

EXIT_DONE = 0
EXIT_BUG = 1
EXIT_CONFIG = 2
EXIT_DATA = 65
EXIT_BUSY = 73
EXIT_IO = 74
EXIT_STOPPED = 75
EXIT_INTERRUPTED = 130  # 128 + SIGINT

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE}  # not the program's


class XTunerError(Exception):
    """Base of all errors for users. Secrets in its texts, such as values of a config, are masked.

    Args:
        what: one sentence, what happened.
        where: file:byte, or the config key path.
        why: what would go wrong if the program continued.
        do: the next command or edit.
    """

    exit_code = EXIT_BUG
    reported_elsewhere = False  # another rank reports it

    def __init__(self, what: str, *, where: str = "", why: str = "", do: str = "") -> None:
        self.what, self.where, self.why, self.do = map(mask_text, (what, where, why, do))
        rest = (("where", self.where), ("why", self.why), ("next", self.do))
        lines = [self.what, *(f"  {label}: {text}" for label, text in rest if text)]
        super().__init__("\n".join(lines))


class ConfigError(XTunerError):
    """A mistake in a config, an option or an environment variable."""

    exit_code = EXIT_CONFIG


class DataError(XTunerError):
    """Data that is missing, truncated or invalid."""

    exit_code = EXIT_DATA


class DivergedError(XTunerError):
    """A loss or a gradient that is not finite."""

    exit_code = EXIT_DATA


class BusyError(XTunerError):
    """Another job uses the work directory."""

    exit_code = EXIT_BUSY


class CheckpointError(XTunerError):
    """A checkpoint, an export or a disk that cannot be read or written."""

    exit_code = EXIT_IO


class LostRankError(XTunerError):
    """Another process of the run has ended or does not respond."""


class InterruptedRunError(XTunerError):
    """A second Ctrl-C ended a run without saving."""

    exit_code = EXIT_INTERRUPTED


def is_interrupt(error: BaseException) -> bool:
    """Whether an error is a KeyboardInterrupt, or was raised while one was being handled.

    Python's locks are not safe against it: a Ctrl-C between two instructions of `Condition.wait` leaves the lock
    released, and the `with` statement around it then raises "release unlocked lock" in place of the KeyboardInterrupt.
    """
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, KeyboardInterrupt):
        seen = seen.__context__
    return seen is not None


def from_os_error(error: OSError) -> CheckpointError | None:
    """The error for users if the operating system failed to read or write a file; None for any other OSError.

    Also None if a user's code raised it (a hook, a config): its author needs the traceback.
    """
    names = [os.fsdecode(n) for n in (error.filename, error.filename2) if isinstance(n, str | bytes | os.PathLike)]
    if not (names or error.errno in DISK_ERRORS) or not _is_ours(error.__traceback__):
        return None
    return CheckpointError(
        f"a file or folder cannot be used: {error.strerror or error}",
        where=" → ".join(names) or "an output, a temporary file (TMPDIR) or standard output",
        do=_ADVICE.get(error.errno or 0, "check the path and its disk"),
    )


def from_system_exit(error: SystemExit, where: str = "", by: str = "") -> ConfigError:
    """The error for user code that calls `sys.exit`: exit code 0 would otherwise claim that training is done.

    Args:
        where: the file and line, or the setting; by default the line that raised it.
        by: what called `sys.exit`.
    """
    frames = traceback.extract_tb(error.__traceback__)
    line = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return ConfigError(
        f"{by or 'code of the config'} ends the program: SystemExit({error.code!r})",
        where=where or line,
        why="training would stop with an exit code that is not xtuner's"
        + (f"; raised at {line}" if where and line not in where else ""),
        do="remove the call; raise an exception to stop a run with a reason",
    )


_FULL = "free some space, or write to another disk"
_ADVICE = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EACCES: "check its permissions, or give another path",
    errno.EPERM: "check its permissions, or give another path",
    errno.EROFS: "give a path on a disk that is writable",
    errno.EISDIR: "a folder has this name: move it, or give another name",
    errno.ENOTDIR: "a file has the name of a folder: move it, or give another name",
    errno.EEXIST: "something else has this name: move it, or give another name",
    errno.ENOENT: "check the path",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EMFILE: "raise the limit of open files: ulimit -n 65536",
}


def _is_ours(trace: TracebackType | None) -> bool:
    """Whether the traceback has frames of this package, Python and installed packages only."""
    installed = (*(f"{folder}{os.sep}" for folder in (Path(__file__).parent.parent, sys.prefix, sys.base_prefix)), "<")
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if not file.startswith(installed) and "-packages" not in file:  # site-packages, dist-packages
            return False
        trace = trace.tb_next
    return True


def raised_by_us(error: SystemExit) -> bool:
    """Whether this package itself raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename.startswith(f"{Path(__file__).parent.parent}{os.sep}")


def did_you_mean(name: str, known: list[str]) -> str:
    """`" Did you mean 'x'?"` for the nearest known name, or an empty string."""
    import difflib

    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""
