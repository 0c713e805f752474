"""Safe access to files and values that others wrote.

A path in a data folder or a model folder may be a named pipe or a device. A value read from such a file may be larger
than the file, if it contains one part many times. Existence is tested with `os.path.isfile`, `isdir` and `exists`: they
return False for invalid names, where the methods of `Path` raise.
"""

import errno
import os
import stat
from pathlib import Path
from typing import Any

SHOWN = 120  # characters of a foreign value in a message
_ITEMS = 4  # of a list or dict in a message
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class NotAFileError(OSError):
    """The path is a pipe, a socket or a device; `strerror` says which."""


def open_regular(path: str | Path, buffering: int = -1) -> Any:
    """As `open(path, "rb", buffering)`, for regular files only: opening a named pipe would wait for its writer.

    Raises: OSError; its subclass NotAFileError for pipes, sockets and devices.
    """
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except ValueError as e:  # a NUL or half a surrogate pair in the name
        raise NotAFileError(0, f"invalid file name: {e}", short_repr(str(path))) from None
    except OSError:
        check_regular(path)  # opening a socket fails with "No such device or address"
        raise
    try:
        _check_kind(os.fstat(fd).st_mode, path)
        return os.fdopen(fd, "rb", buffering)
    except BaseException:
        os.close(fd)
        raise


def read_regular(path: str | Path) -> bytes:
    """All bytes of a regular file. Raises: as `open_regular`."""
    with open_regular(path) as f:
        return f.read()


def check_regular(path: str | Path) -> None:
    """Raises: OSError if the path is not a regular file. A missing file is not an error here."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return
    _check_kind(mode, path)


def _check_kind(mode: int, path: str | Path) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "a special file")
        raise NotAFileError(0, f"it is {kind}, not a file", str(path))


def short(text: str, length: int = SHOWN) -> str:
    """The beginning of a text that others chose, such as a file name."""
    return text if len(text) <= length else f"{text[:length]}…"


def short_repr(value: Any, length: int = SHOWN) -> str:
    """`repr` for messages: at most about `length` characters, and without visiting more of the value.

    `repr` itself visits a list as often as it occurs: a hundred nested pairs of one list would never finish.
    """
    return short(_short(value, length, 2), length + 2)


def _short(value: Any, length: int, depth: int) -> str:
    kind = type(value)
    if kind is str or kind is bytes:
        return repr(value) if len(value) <= length else f"{value[:length]!r}…"
    if kind is int and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    if value is None or kind in (bool, int, float, complex):
        return repr(value)
    if isinstance(value, dict | list | tuple | set | frozenset):
        begin, end = ("[", "]") if isinstance(value, list) else ("(", ")") if isinstance(value, tuple) else ("{", "}")
        if not value and isinstance(value, set | frozenset):
            return f"{kind.__name__}()"
        parts: list[str] = []
        for item in value:
            if len(parts) == _ITEMS or (value and depth == 0):
                parts.append("…")
                break
            shown = _short(item, length, depth - 1)
            parts.append(f"{shown}: {_short(value[item], length, depth - 1)}" if isinstance(value, dict) else shown)
        comma = "," if isinstance(value, tuple) and len(parts) == 1 and parts[0] != "…" else ""
        return begin + ", ".join(parts) + comma + end
    if isinstance(value, type):
        return f"<class {value.__name__}>"
    return f"<{kind.__name__}>"
