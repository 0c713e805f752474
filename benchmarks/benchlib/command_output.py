"""Reads the output of commands line by line, and ends them in time."""

import ctypes
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def stream_lines(
    words: list[str], until: str, environ: Mapping[str, str] = os.environ, deadline: float = math.inf
) -> Iterator[tuple[float, str]]:
    """(seconds since the start, line) of a command's output. The command is killed after the first line that matches
    `until` or comes after `deadline` (of time.monotonic), and on Linux when this process is. Ends when all processes
    that write to the output have."""
    begin, environ = time.perf_counter(), {**environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ, preexec_fn=_end_with_parent()
    )
    assert process.stdout is not None
    for line in process.stdout:
        yield time.perf_counter() - begin, line
        if re.search(until, line) or time.monotonic() > deadline:
            process.kill()
    process.wait()


def _end_with_parent():
    """For Popen's `preexec_fn`: a benchmark that is killed must not leave a training on the GPU."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # loaded before the fork
    return lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
