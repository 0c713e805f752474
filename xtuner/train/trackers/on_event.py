"""`on_event`: a command of the user at the end of a run, however it ends."""

import json
import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xtuner.core.errors import ConfigError
from xtuner.train.trackers.base import Tracker

EVENTS = ("end", "failure", "stop")
SHOWN = 500  # bytes of a failed command's output


class OnEvent(Tracker):
    """Runs a command for each of EVENTS, with the event as JSON in place of `{json}` and on standard input.

    No shell is involved: the JSON is one argument, whatever it contains.
    """

    label = "on_event"

    def __init__(self, command: str) -> None:
        try:
            self._words = shlex.split(command)
        except ValueError as e:
            raise ConfigError(f"on_event = {command!r} cannot be split into words: {e}") from None
        if not self._words or shutil.which(self._words[0]) is None:
            raise ConfigError(
                f"on_event = {command!r} does not name a program",
                why="its first word is neither in PATH nor an executable file; it is not run by a shell",
                do="give the path of a program; for pipes: sh -c '…' sh {json}",
            )

    def begin(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._work_dir = folder.parent.resolve()

    def event(self, name: str, iteration: int, facts: Mapping[str, Any]) -> None:
        if name not in EVENTS:
            return
        text = json.dumps(
            {"event": name, "iter": iteration, "time": time.time(), "work_dir": str(self._work_dir), **facts}
        )
        words = [word.replace("{json}", text) for word in self._words]
        done = subprocess.run(
            words,
            input=text.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # it may last longer than the run
        )
        if done.returncode:
            said = done.stdout[-SHOWN:].decode(errors="replace").strip() or "it printed nothing"
            raise RuntimeError(f"{self._words[0]} ended with code {done.returncode} at the event {name!r}: {said}")
