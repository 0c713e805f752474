"""Standard input, output and error: there whatever our parent closed, and no character or closed terminal ends us."""

import codecs
import contextlib
import io
import os
import sys
from typing import Any

BOLD_RED, RED, YELLOW, CYAN, DIM, RESET = "\033[1;31m", "\033[31m", "\033[33m", "\033[36m", "\033[2m", "\033[0m"
ERASE_LINE = "\r\033[K"
_ERRORS = "xtuner_output"
_STANDARD = ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w"))


def _encode_anyway(error: UnicodeError) -> tuple[bytes, int]:
    """What an encoding lacks: a byte of a path that is not UTF-8 as it is on the disk, any other character escaped."""
    assert isinstance(error, UnicodeEncodeError)
    characters = error.object[error.start : error.end]
    parts = [
        bytes([ord(c) - 0xDC00]) if 0xDC80 <= ord(c) <= 0xDCFF else c.encode("ascii", "backslashreplace")
        for c in characters
    ]
    return b"".join(parts), error.end


codecs.register_error(_ERRORS, _encode_anyway)


def prepare_streams() -> None:
    """Make the three streams usable, before any other file is opened.

    A descriptor that was closed (by cron or a daemon) becomes /dev/null: otherwise the next file opened gets its
    number, and what is printed goes into it. Neither output in another encoding than UTF-8 nor input that is not text
    raises a UnicodeError.
    """
    for fd, name, mode in _STANDARD:
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number, which is `fd`
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, stream)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ERRORS if mode == "w" else "replace")


def as_text(argument: str) -> str:
    """A word of the command line as text: bytes that are not UTF-8 are replaced, as they are in standard input."""
    return os.fsencode(argument).decode("utf-8", "replace")


class _Lossy(io.FileIO):
    """A descriptor that takes everything: what cannot be written is lost."""

    def write(self, data: Any) -> int:
        with contextlib.suppress(OSError):  # EPIPE, EIO: nobody reads any more; ENOSPC: a redirection to a full disk
            written = super().write(data)
            if written is not None:
                return written
        return memoryview(data).nbytes


def ignore_write_errors() -> None:
    """For a process whose work outlives its terminal: from now on no write to standard output or error fails.

    That holds for hooks and libraries as well. Streams that someone has replaced (a notebook, a test) are left alone.
    """
    for fd, name, _ in _STANDARD[1:]:
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__") or not isinstance(stream, io.TextIOWrapper):
            continue
        with contextlib.suppress(OSError):
            stream.flush()
        lossy = io.TextIOWrapper(
            io.BufferedWriter(_Lossy(fd, "w", closefd=False)),
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=stream.line_buffering or stream.write_through,  # PYTHONUNBUFFERED
        )
        setattr(sys, name, lossy)
        setattr(sys, f"__{name}__", lossy)


def discard_buffers() -> None:
    """Drop what is still buffered for standard output and error: it would fail again when the process ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for fd in (1, 2):
        os.dup2(nowhere, fd)


def is_terminal(stream: object) -> bool:
    """Whether a person looks at `stream`, on a terminal that understands escape sequences."""
    return bool(getattr(stream, "isatty", lambda: False)()) and os.environ.get("TERM") != "dumb"


def use_colour(stream: object) -> bool:
    """Colours only for people: a terminal, and neither NO_COLOR nor TERM=dumb."""
    return is_terminal(stream) and "NO_COLOR" not in os.environ
