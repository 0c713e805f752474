"""The logger of xtuner: coloured on a terminal, plain elsewhere and in the log file."""

import contextlib
import logging
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from xtuner.core.append_file import AppendFile
from xtuner.core.secrets import mask_text
from xtuner.core.system.stdio import CYAN, DIM, ERASE_LINE, RED, RESET, YELLOW, is_terminal, use_colour

T = TypeVar("T")
logger = logging.getLogger("xtuner")

_COLOURS = {logging.DEBUG: DIM, logging.WARNING: YELLOW, logging.ERROR: RED, logging.CRITICAL: RED}
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # in samples and file names a terminal would execute them
_CLOCK = "%H:%M:%S"
_PROGRESS_EVERY = 5.0  # s between progress lines in a log
_REDRAW = 0.1  # s at least between two updates of the progress line


class _Lines(logging.Formatter):
    """Masks secrets in the whole line, including a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        return mask_text(super().format(record))


class _Terminal(logging.StreamHandler):
    """Log lines on standard error and, on a terminal, a progress line below them that is updated in place."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self._progress: tuple[str, ...] = ()
        self._drawn = 0.0

    def format(self, record: logging.LogRecord) -> str:
        text = _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), super().format(record))
        if not use_colour(self.stream):
            return text
        if colour := _COLOURS.get(record.levelno):
            return f"{colour}{text}{RESET}"
        clock = len(time.strftime(_CLOCK))
        return f"{DIM}{text[:clock]}{RESET}{text[clock:]}"

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "printed", False):
            return
        if self._progress:
            self._write(ERASE_LINE)
        super().emit(record)
        self._draw()

    def handleError(self, record: logging.LogRecord) -> None:
        """Ignore OSErrors (a closed terminal); report anything else, which is a bug."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def show_progress(self, parts: tuple[str, ...]) -> None:
        if not is_terminal(self.stream) or self.level >= logging.ERROR:
            return
        now = time.monotonic()
        with contextlib.nullcontext() if self.lock is None else self.lock:
            if self._progress and not parts:
                self._write(ERASE_LINE)
            self._progress = parts
            if now - self._drawn >= _REDRAW:
                self._drawn = now
                self._draw()

    def _draw(self) -> None:
        """Draw as many parts as fit the width of the terminal: a wrapped line could not be erased."""
        if not self._progress:
            return
        try:
            width = os.get_terminal_size(self.stream.fileno()).columns or 80
        except OSError:
            width = 80
        text, *more = self._progress
        for part in more:
            if len(text) + 2 + len(part) < width:
                text += f"  {part}"
        text = text[: width - 1]
        self._write(ERASE_LINE + (f"{CYAN}{text}{RESET}" if use_colour(self.stream) else text))

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self.stream.write(text)
            self.stream.flush()


class _File(logging.Handler):
    """Log lines in a file. A full disk loses lines, but does not stop the run."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = AppendFile(path, logger.warning)

    def emit(self, record: logging.LogRecord) -> None:
        self._file.write(f"{self.format(record)}\n".encode("utf-8", "backslashreplace"))

    def close(self) -> None:
        self._file.close()
        super().close()


def setup(level: str = "INFO", file: Path | None = None, rank: int = 0) -> None:
    """(Re)configure the logger. On ranks other than 0 only errors are printed on the terminal.

    Raises: ValueError for an unknown level.
    """
    logger.setLevel(level.upper())
    logger.propagate = False
    for old in list(logger.handlers):
        logger.removeHandler(old)
        old.close()
    terminal = _Terminal()
    source = f"rank {rank}: " if rank else ""
    terminal.setFormatter(_Lines(f"%(asctime)s  {source}%(message)s", datefmt=_CLOCK))
    terminal.setLevel(logging.ERROR if rank else logging.NOTSET)
    logger.addHandler(terminal)
    if file is not None:
        to_file = _File(file)
        to_file.setFormatter(_Lines("%(asctime)s %(levelname)-7s %(message)s"))
        logger.addHandler(to_file)


def print_result(text: str) -> None:
    """Print the result of a command to standard output and the log file. All other lines go to standard error."""
    print(mask_text(text), flush=True)
    logger.info(text, extra={"printed": True})


def show_progress(*parts: str) -> None:
    """Show a progress line below the log, on a terminal only; without `parts` remove it.

    Parts that do not fit the width of the terminal are left out, from the end.
    """
    for handler in logger.handlers:
        if isinstance(handler, _Terminal):
            handler.show_progress(parts)


def progress(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a progress bar on a terminal, or a progress line every few seconds in a log."""
    if total is None:
        total = len(items)  # type: ignore[arg-type]
    if use_colour(sys.stderr) and logger.handlers and logger.handlers[0].level < logging.ERROR:
        from rich.console import Console
        from rich.progress import track

        yield from track(items, description=what, total=total, console=Console(stderr=True), transient=True)
        return
    last = time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() - last > _PROGRESS_EVERY:
            last = time.monotonic()
            logger.info(f"{what}: {done}/{total}")
        yield item


def human(number: float) -> str:
    """`1889110016` → `1.89 B`; counts only (powers of 1000)."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.2f} {letter}"
    return f"{number:g}"


def human_bytes(number: float) -> str:
    """`1073741824` → `1.00 GiB`."""
    for size, letter in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(number) >= size:
            return f"{number / size:.2f} {letter}"
    return f"{number:.0f} B"


def human_time(seconds: float) -> str:
    """`93784` → `1d 02:03:04`."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{h:02d}:{m:02d}:{s:02d}"
