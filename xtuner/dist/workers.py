"""`xtuner train` on a node with several GPUs: start a worker for each, forward signals, end all if one fails."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from types import FrameType

from xtuner.core.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_STOPPED
from xtuner.core.log import logger
from xtuner.dist.launchers import LOOPBACK, NodeLayout
from xtuner.dist.shipped_launchers import environment_of_workers

GRACE = 12.0  # s that the other workers have after a failure to report what they saw
KILL_AFTER = 5.0  # s between SIGTERM and SIGKILL
_PARENT = "XTUNER_PARENT"


def stop_signals() -> list[signal.Signals]:
    """Signals that request a run to save and stop; SIGHUP (a closed terminal) unless `nohup` set it to be ignored."""
    hangup = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, *hangup]


def run_workers(layout: NodeLayout, command: list[str]) -> int:
    """Run `command` as all workers of this node. Returns the exit code of the first that failed, else 75 if they
    stopped on request, else 0. A worker killed by signal n counts as 128 + n, as in a shell."""
    port = layout.port or _free_port()
    environ = {**os.environ, _PARENT: str(os.getpid())}
    workers = [
        subprocess.Popen(command, env=environment_of_workers(environ, layout, i, port), start_new_session=True)
        for i in range(layout.workers)
    ]

    def forward(number: int, frame: FrameType | None) -> None:
        for worker in workers:
            if worker.returncode is None:
                worker.send_signal(number)

    before = {number: signal.signal(number, forward) for number in stop_signals()}
    try:
        return _wait(workers, layout.node_rank * layout.workers)
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(workers: list["subprocess.Popen[bytes]"], first_rank: int) -> int:
    failed: int | None = None
    ended: set[int] = set()
    deadline, step = float("inf"), iter((signal.SIGTERM, signal.SIGKILL))
    while len(ended) < len(workers):
        for i, worker in enumerate(workers):
            if i in ended or (code := worker.poll()) is None:
                continue
            ended.add(i)
            if code not in (EXIT_DONE, EXIT_STOPPED) and failed is None:
                failed, deadline = code, time.monotonic() + GRACE
                if code not in (
                    EXIT_INTERRUPTED,
                    -signal.SIGINT,
                ):  # a second Ctrl-C ends all workers: rank 0 reports it
                    logger.error(
                        f"rank {first_rank + i} (process {worker.pid}) {_describe(code)}; the other workers are stopped"
                    )
        if time.monotonic() > deadline:
            number = next(step, signal.SIGKILL)
            for worker in workers:
                if worker.returncode is None:
                    worker.send_signal(number)
            deadline = time.monotonic() + KILL_AFTER
        time.sleep(0.05)
    if failed is not None:
        return failed if failed > 0 else 128 - failed
    return EXIT_STOPPED if any(w.returncode == EXIT_STOPPED for w in workers) else EXIT_DONE


def _describe(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    hint = " (out of memory? see dmesg)" if code == -signal.SIGKILL else ""
    return f"was ended by {signal.Signals(-code).name}{hint}"


def _free_port() -> int:
    with socket.socket() as s:
        s.bind((LOOPBACK, 0))
        return int(s.getsockname()[1])


def end_with_parent() -> None:
    """For a worker: end when the process that started it ends, for whatever reason."""
    parent = os.environ.pop(_PARENT, "")
    if parent and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != int(parent):
            os._exit(128 + signal.SIGKILL)
