"""Python programs as forks of this process: without the seconds in which each would import PyTorch."""

import gc
import os
import runpy
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

import deepspeed  # noqa: F401  these three once, before processes are forked
import torch.utils.tensorboard  # noqa: F401

import xtuner.train.trainer  # noqa: F401

_start = subprocess.Popen


def popen(words: Sequence[str], **how: Any) -> Any:
    """In place of `subprocess.Popen`: a fork for `python -m MODULE …`, else a new process."""
    return ForkedPython(words, **how) if list(words[:2]) == [sys.executable, "-m"] else _start(words, **how)


class ForkedPython:
    """The part of `subprocess.Popen` that benchmarks and our launcher use."""

    def __init__(
        self,
        words: Sequence[str],
        env: Mapping[str, str],
        stdout: IO[str] | int | None = None,
        stderr: int | None = None,
        text: bool = False,
        preexec_fn: Callable[[], None] | None = None,
        start_new_session: bool = False,
    ) -> None:
        self.returncode: int | None = None
        ends = os.pipe() if stdout == subprocess.PIPE else None
        to = ends[1] if ends else stdout.fileno() if stdout else 1  # type: ignore[union-attr]
        self.pid = os.fork()
        if not self.pid:
            try:
                if start_new_session:
                    os.setsid()
                if preexec_fn:
                    preexec_fn()
                os.dup2(to, 1)
                if stderr == subprocess.STDOUT:
                    os.dup2(1, 2)
                _become(words, env)
            finally:
                os._exit(1)
        self.stdout = None
        if ends:
            os.close(ends[1])
            self.stdout = os.fdopen(ends[0])

    def poll(self) -> int | None:
        return self._wait(os.WNOHANG)

    def wait(self) -> int:
        code = self._wait(0)
        assert code is not None
        return code

    def _wait(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _become(words: Sequence[str], environ: Mapping[str, str]) -> None:
    """Run `python -m MODULE …` in this (forked) process, with nothing of its parent but modules; does not return."""
    gc.freeze()  # no object of the parent closes a file
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # ends of pipes of other processes
    sys.stdout, sys.stderr = (os.fdopen(file, "w", buffering=1, closefd=False) for file in (1, 2))
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    warnings.resetwarnings()
    warnings.simplefilter("ignore", RuntimeWarning)  # of runpy: the module is imported already
    os.environ.clear()
    os.environ.update(environ)
    sys.argv = list(words[2:])
    code = 0
    try:
        runpy.run_module(words[2], run_name="__main__", alter_sys=True)
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
