"""One logger for the whole toolkit: coloured on a terminal, plain elsewhere and in the log file."""

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from xtuner.core.secrets import mask_text

T = TypeVar("T")
logger = logging.getLogger("xtuner")

_COLOURS = {logging.DEBUG: "\033[2m", logging.WARNING: "\033[33m", logging.ERROR: "\033[31m"}
_RESET = "\033[0m"


def use_colour(stream: object) -> bool:
    """Colours only for people: a terminal, and neither NO_COLOR nor TERM=dumb."""
    is_terminal = bool(getattr(stream, "isatty", lambda: False)())
    return is_terminal and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


class _Lines(logging.Formatter):
    """Lines without secrets: message, traceback and all."""

    def format(self, record: logging.LogRecord) -> str:
        return mask_text(super().format(record))


class _Terminal(logging.StreamHandler):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        colour = _COLOURS.get(record.levelno)
        return f"{colour}{text}{_RESET}" if colour and use_colour(self.stream) else text


def setup(level: str = "INFO", file: Path | None = None, rank: int = 0) -> None:
    """(Re)configure the logger. Of ranks other than 0 only errors reach the terminal.

    Raises: ValueError for an unknown level.
    """
    logger.setLevel(level.upper())
    logger.propagate = False
    for old in list(logger.handlers):
        logger.removeHandler(old)
        old.close()
    terminal = _Terminal(sys.stderr)
    who = f"rank {rank}: " if rank else ""
    terminal.setFormatter(_Lines(f"%(asctime)s  {who}%(message)s", datefmt="%H:%M:%S"))
    terminal.setLevel(logging.ERROR if rank else logging.NOTSET)
    logger.addHandler(terminal)
    if file is not None:
        to_file = logging.FileHandler(file, encoding="utf-8")
        to_file.setFormatter(_Lines("%(asctime)s %(levelname)-7s %(message)s"))
        logger.addHandler(to_file)


def progress(items: Iterable[T], what: str, total: int | None = None, every_s: float = 5.0) -> Iterator[T]:
    """Iterate with a progress bar on a terminal, or a line every few seconds in a log."""
    if total is None:
        total = len(items)  # type: ignore[arg-type]
    if use_colour(sys.stderr) and logger.handlers and logger.handlers[0].level < logging.ERROR:
        from rich.console import Console
        from rich.progress import track

        yield from track(items, description=what, total=total, console=Console(stderr=True), transient=True)
        return
    last = time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() - last > every_s:
            last = time.monotonic()
            logger.info(f"{what}: {done}/{total}")
        yield item


def human(number: float, unit: str = "") -> str:
    """`1889110016` → `1.89 B`; counts only (powers of 1000)."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.2f} {letter}{unit}"
    return f"{number:g} {unit}".rstrip()


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
