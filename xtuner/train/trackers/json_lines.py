"""Every metric of a run, unrounded."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xtuner.core.append_file import AppendFile
from xtuner.core.log import logger
from xtuner.train.trackers.base import Tracker


class JsonLines(Tracker):
    """`vis_data/scalars.json` in the folder of a start: one JSON object per line."""

    def begin(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._file = AppendFile(folder / "vis_data" / "scalars.json", logger.warning)

    def log(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(record).encode() + b"\n")

    def close(self) -> None:
        self._file.close_and_report()
