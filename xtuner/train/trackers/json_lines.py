"""Every metric and event of a run, unrounded."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xtuner.core.append_file import AppendFile
from xtuner.core.log import logger
from xtuner.train.trackers.base import Tracker


class JsonLines(Tracker):
    """`vis_data/scalars.json` and `events.json` in the folder of a start: one JSON object per line."""

    def begin(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._file = AppendFile(folder / "vis_data" / "scalars.json", logger.warning)
        self._events = AppendFile(folder / "events.json", logger.warning)

    def log(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(record).encode() + b"\n")

    def text(self, tag: str, value: str, iteration: int) -> None:
        self.event(tag, iteration, {"text": value})

    def event(self, name: str, iteration: int, facts: Mapping[str, Any]) -> None:
        line = {"event": name, "iter": iteration, "time": time.time(), **facts}
        self._events.write(json.dumps(line).encode() + b"\n")

    def close(self) -> None:
        self._file.close_and_report()
        self._events.close_and_report()
