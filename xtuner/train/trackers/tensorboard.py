"""Curves and texts for TensorBoard."""

import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xtuner.core.append_file import AppendFile
from xtuner.core.log import logger
from xtuner.train.trackers.base import Tracker


class TensorBoard(Tracker):
    """An event file in `vis_data/` of the folder of a start.

    TensorBoard's own writer is not used: its thread stores errors and raises them at a later, unrelated write.
    """

    def begin(self, folder: Path, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import summary

        self._summary = summary
        name = f"events.out.tfevents.{int(time.time()):010d}.{platform.node()}.{os.getpid()}.0"
        self._file = AppendFile(folder / "vis_data" / name, logger.warning, _event(file_version="brain.Event:2"))

    def log(self, record: Mapping[str, Any]) -> None:
        curves = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "iter"}
        scalar = self._summary.scalar
        self._file.write(b"".join(_event(step=record["iter"], summary=scalar(k, v)) for k, v in curves.items()))

    def text(self, tag: str, value: str, iteration: int) -> None:
        self._file.write(_event(step=iteration, summary=self._summary.text(tag, value)))

    def close(self) -> None:
        self._file.close_and_report()


def _event(**fields: Any) -> bytes:
    """A record of a TensorBoard event file: an `Event`, framed by its length and checksums."""
    from io import BytesIO

    from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]
    from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

    framed = BytesIO()
    RecordWriter(framed).write(Event(wall_time=time.time(), **fields).SerializeToString())
    return framed.getvalue()
