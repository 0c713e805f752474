"""Standard input, output and error that always work: closed by the parent, in any encoding, without a terminal."""

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
    """Encode what the encoding lacks: bytes of a path that is not UTF-8 as they are, other characters escaped."""
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

    A descriptor that was closed (by cron or a daemon) becomes /dev/null: otherwise the next file that is opened would
    get its number, and receive what is printed. Output in any encoding and input that is not text raise no
    UnicodeError.
    """
    for fd, name, mode in _STANDARD:
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest free number, which is `fd`
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, stream)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ERRORS if mode == "w" else "replace")


def as_text(argument: str) -> str:
    """An argument of the command line as text: bytes that are not UTF-8 are replaced, as in standard input."""
    return os.fsencode(argument).decode("utf-8", "replace")


class _Lossy(io.FileIO):
    """A descriptor whose writes never fail: what cannot be written is lost."""

    def write(self, data: Any) -> int:
        with contextlib.suppress(OSError):  # EPIPE, EIO: no reader any more; ENOSPC: redirected to a full disk
            written = super().write(data)
            if written is not None:
                return written
        return memoryview(data).nbytes


def ignore_write_errors() -> None:
    """From now on no write to standard output or error fails: for a process that may outlive its terminal.

    Writes of hooks and libraries are included. Streams that were replaced (in a notebook or a test) are not changed.
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
    """Drop buffered output: writing it at exit would fail again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for fd in (1, 2):
        os.dup2(nowhere, fd)


def is_terminal(stream: object) -> bool:
    """Whether `stream` is a terminal that understands escape sequences."""
    return bool(getattr(stream, "isatty", lambda: False)()) and os.environ.get("TERM") != "dumb"


def use_colour(stream: object) -> bool:
    """Whether to print colours: on a terminal, without NO_COLOR or TERM=dumb."""
    return is_terminal(stream) and "NO_COLOR" not in os.environ
