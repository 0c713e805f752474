"""One record an iteration, to JSON lines (all digits) and to TensorBoard."""

import json
from pathlib import Path
from typing import Any

from xtuner.core.secrets import mask, mask_text


class MetricWriter:
    """Writes `scalars.json` (one JSON object a line) and TensorBoard events into `folder`; nothing if that is None."""

    def __init__(self, folder: Path | None) -> None:
        self._lines = self._board = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            folder.mkdir(parents=True, exist_ok=True)
            self._lines = open(folder / "scalars.json", "a", encoding="utf-8")  # noqa: SIM115
            self._board = SummaryWriter(str(folder))

    def write(self, record: dict[str, Any]) -> None:
        """`record["iter"]` is the step; numbers become curves."""
        if self._lines is None or self._board is None:
            return
        self._lines.write(json.dumps(mask(record)) + "\n")
        self._lines.flush()
        for key, value in record.items():
            if isinstance(value, int | float) and key != "iter":
                self._board.add_scalar(key, value, record["iter"])

    def text(self, tag: str, value: str, iteration: int) -> None:
        if self._board is not None:
            self._board.add_text(tag, mask_text(value), iteration)

    def close(self) -> None:
        for sink in (self._lines, self._board):
            if sink is not None:
                sink.close()
