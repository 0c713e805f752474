"""Runs a third-party program: its output goes to a log, its progress is reported, and it ends if we are stopped."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from xtuner.core.errors import EXIT_BUG, XTunerError
from xtuner.core.log import logger

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
GRACE = 5.0  # s between SIGTERM and SIGKILL
POLL = 0.2  # s
REPORT_EVERY = 5.0  # s
TAIL = 8192  # bytes at the end of a log that are examined
_BAR = re.compile(r"([^\r\n|]*?):?[ \t]*\d+%\|[^|\r\n]*\|[ \t]*(\d+/\d+ \[[^\]\r\n]*\])")
_NOT_TAKEN_ALONG = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")


class ToolError(XTunerError):
    """A third-party program has failed."""

    exit_code = EXIT_BUG


def environ(**more: str) -> dict[str, str]:
    """Our environment variables without those that would make another environment's Python use our packages."""
    kept = {k: v for k, v in os.environ.items() if k not in _NOT_TAKEN_ALONG}
    ours = {"PYTHONNOUSERSITE": "1", "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**kept, **ours, **more}


def run(words: list[str], log: Path, news: Callable[[], str | None], cwd: Path, env: Mapping[str, str]) -> int:
    """Run a program; returns its exit code. Its output replaces `log`.

    `news` returns its current activity, which is logged when it has changed, at most every few seconds. On a signal to
    stop, the program and all processes that it has started are ended first.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    stopped: list[int] = []
    with _signals(stopped), open(log, "wb") as output:
        process = subprocess.Popen(
            words,
            cwd=cwd,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            _wait(process, news, stopped)
        finally:
            _end(process)
    if stopped:
        logger.warning(f"stopped; the output of {words[0]} is in {log}")
        if stopped[0] == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + stopped[0])
    return process.returncode


def _wait(process: "subprocess.Popen[bytes]", news: Callable[[], str | None], stopped: list[int]) -> None:
    reported, last = None, time.monotonic()
    while process.poll() is None and not stopped:
        time.sleep(POLL)
        if time.monotonic() - last < REPORT_EVERY:
            continue
        found, last = news(), time.monotonic()
        if found and found != reported:
            logger.info(found)
            reported = found


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a running program and all processes that it has started."""
    if process.poll() is not None:
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


@contextmanager
def _signals(stopped: list[int]) -> Iterator[None]:
    def note(number: int, frame: FrameType | None) -> None:
        stopped.append(number)

    heard = [number for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN]  # SIGHUP under nohup
    before = {number: signal.signal(number, note) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def tail(path: Path) -> str:
    """The end of a log; empty if there is none."""
    try:
        with open(path, "rb") as f:
            f.seek(max(0, path.stat().st_size - TAIL))
            return f.read().decode(errors="replace")
    except OSError:
        return ""


def bar(path: Path) -> str | None:
    """The last state of a tqdm progress bar in a log: `Running requests: 3/25 [00:01<00:10, 2.00it/s]`."""
    found = _BAR.findall(tail(path))
    return ": ".join(filter(None, (part.strip() for part in found[-1]))) if found else None


def last_line(path: Path) -> str:
    """The last line of a failed program's output: the message of its exception."""
    lines = [line.strip() for line in re.split(r"[\r\n]", tail(path)) if line.strip()]
    return lines[-1] if lines else "it printed nothing"
