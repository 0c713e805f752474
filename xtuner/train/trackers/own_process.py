"""A tracker in a process of its own: whatever its library does (handle signals, replace sys.exit, wait at the exit,
crash) cannot affect the process that trains.

Calls and replies are lines of JSON. What the library prints is in `TIME/NAME.log`. A process whose parent is killed
closes the tracker and ends.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xtuner.train.trackers.base import Tracker

IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)  # Slurm sends them to all


class InOwnProcess(Tracker):
    """Args: tracker: a dataclass of JSON values; its fields are passed on."""

    def __init__(self, tracker: Tracker) -> None:
        kind = type(tracker)
        self._kind = f"{kind.__module__}.{kind.__qualname__}"
        self._made = {
            "kind": self._kind,
            "fields": dataclasses.asdict(tracker),  # type: ignore[call-overload]
            "run_id": tracker.run_id,
        }
        self._name = kind.__name__
        self._process: subprocess.Popen[bytes] | None = None
        self._abandoned = False

    def begin(self, folder: Path, config: Mapping[str, Any]) -> str | None:
        self._log = folder / f"{self._name.lower()}.log"
        path = os.pathsep.join(p or os.getcwd() for p in sys.path)  # the same modules as here
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,  # the terminal's Ctrl-C is not for it
            )
        self._send(self._made)
        return self._send(["begin", str(folder), config])

    def log(self, record: Mapping[str, Any]) -> None:
        self._send(["log", record])

    def text(self, tag: str, value: str, iteration: int) -> None:
        self._send(["text", tag, value, iteration])

    def event(self, name: str, iteration: int, facts: Mapping[str, Any]) -> None:
        self._send(["event", name, iteration, facts])

    def close(self) -> None:
        self._send(["close"])
        assert self._process
        self._process.wait()  # the library may have more to do at its exit

    def abandon(self) -> None:
        self._abandoned = True
        if self._process:
            with contextlib.suppress(OSError):  # with what it has started
                os.killpg(self._process.pid, signal.SIGKILL)

    def _send(self, message: Any) -> str | None:
        """Send one line, and return the reply to it. Raises: RuntimeError with the error of the tracker."""
        process = self._process
        assert process
        assert process.stdin
        assert process.stdout
        with contextlib.suppress(OSError):  # the process has ended: no reply
            process.stdin.write(json.dumps(message).encode() + b"\n")
            process.stdin.flush()
        line = process.stdout.readline()
        if self._abandoned:
            raise SystemExit  # reported
        if not line:
            raise RuntimeError(f"its process ended with code {process.wait()}; see {self._log}")
        reply: dict[str, str | None] = json.loads(line)
        if reply["error"]:
            raise RuntimeError(reply["error"])
        return reply["result"]


def serve() -> None:
    """Receive calls on standard input until `close` or its end."""
    from xtuner.config.build import resolve_type

    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    with open(os.dup(1), "w", encoding="utf-8") as replies:
        os.dup2(2, 1)  # the library may print
        made = json.loads(sys.stdin.readline())
        method, tracker = "", Tracker()

        def reply(error: str | None = None, result: object = None) -> None:
            with contextlib.suppress(OSError):  # nobody waits for it
                print(json.dumps({"error": error, "result": result}), file=replies, flush=True)

        try:
            tracker = resolve_type(made["kind"])(**made["fields"])
            tracker.run_id = made["run_id"]
            reply()
            for line in sys.stdin:
                method, *arguments = json.loads(line)
                if method == "begin":
                    arguments[0] = Path(arguments[0])
                reply(result=getattr(tracker, method)(*arguments))
                if method == "close":
                    break
            if method != "close":
                tracker.event("failure", 0, {"error": "the training process was killed"})
                tracker.close()
        except BaseException as e:
            traceback.print_exc()
            reply(f"{type(e).__name__}: {e}")
            sys.stderr.flush()
            os._exit(1)


if __name__ == "__main__":
    serve()
