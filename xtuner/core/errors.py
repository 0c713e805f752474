"""Errors that a user can do something about, and the exit code each ends the program with.

Every message answers four questions: what happened, where (file and byte, or config key), why it matters,
and what to do next. A bug in xtuner itself is never one of these: it ends in a traceback and exit code 1.
"""

from xtuner.core.secrets import mask_text

EXIT_DONE = 0
EXIT_BUG = 1
EXIT_CONFIG = 2
EXIT_DATA = 65
EXIT_BUSY = 73
EXIT_IO = 74
EXIT_STOPPED = 75


class XTunerError(Exception):
    """Base of all errors meant for users. Secrets in its texts, such as values of a config, are masked.

    Args:
        what: one sentence, what happened.
        where: file:byte, or the config key path.
        why: what would go wrong if we went on.
        do: the next command or edit.
    """

    exit_code = EXIT_BUG
    quiet = False  # another rank tells it

    def __init__(self, what: str, *, where: str = "", why: str = "", do: str = "") -> None:
        self.what, self.where, self.why, self.do = map(mask_text, (what, where, why, do))
        rest = (("where", self.where), ("why", self.why), ("next", self.do))
        lines = [self.what, *(f"  {label}: {text}" for label, text in rest if text)]
        super().__init__("\n".join(lines))


class ConfigError(XTunerError):
    """A mistake in a config, an option or an environment variable."""

    exit_code = EXIT_CONFIG


class DataError(XTunerError):
    """Data that is missing, torn, or not what it says it is."""

    exit_code = EXIT_DATA


class DivergedError(XTunerError):
    """A loss or a gradient that is no finite number."""

    exit_code = EXIT_DATA


class BusyError(XTunerError):
    """Another job uses the work directory."""

    exit_code = EXIT_BUSY


class CheckpointError(XTunerError):
    """A checkpoint, an export or a disk that cannot be read or written."""

    exit_code = EXIT_IO


class LostRankError(XTunerError):
    """Another process of the run has gone or does not answer."""


def did_you_mean(name: str, known: list[str]) -> str:
    """`" Did you mean 'x'?"` for the nearest known name, or an empty string."""
    import difflib

    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""
