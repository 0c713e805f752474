"""One record a line of the log, to JSON lines (all digits) and to TensorBoard."""

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

from xtuner.core.append import AppendFile
from xtuner.core.log import logger
from xtuner.core.secrets import mask, mask_text


class MetricWriter:
    """Writes `scalars.json` (one JSON object a line) and TensorBoard events into `folder`; nothing if that is None.

    Both files may be lost (a full disk), never the run. TensorBoard's own writer is not used: its thread keeps what
    went wrong, and raises it from the next curve.
    """

    def __init__(self, folder: Path | None) -> None:
        self._files: tuple[AppendFile, AppendFile] | None = None
        if folder is not None:
            from torch.utils.tensorboard import summary

            self._summary = summary
            name = f"events.out.tfevents.{int(time.time()):010d}.{platform.node()}.{os.getpid()}.0"
            first = _event(file_version="brain.Event:2")
            self._files = (
                AppendFile(folder / "scalars.json", logger.warning),
                AppendFile(folder / name, logger.warning, first),
            )

    def write(self, record: dict[str, Any]) -> None:
        """`record["iter"]` is the step; numbers become curves."""
        if self._files is None:
            return
        lines, board = self._files
        lines.write(json.dumps(mask(record)).encode() + b"\n")
        curves = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "iter"}
        scalar = self._summary.scalar
        board.write(b"".join(_event(step=record["iter"], summary=scalar(k, v)) for k, v in curves.items()))

    def text(self, tag: str, value: str, iteration: int) -> None:
        if self._files is not None:
            self._files[1].write(_event(step=iteration, summary=self._summary.text(tag, mask_text(value))))

    def close(self) -> None:
        for file in self._files or ():
            file.close()
            if file.lost:
                logger.warning(f"{file.lost} records of {file.path} were lost")


def _event(**fields: Any) -> bytes:
    """A record of TensorBoard's event files: an `Event`, framed by its length and checksums."""
    from io import BytesIO

    from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]
    from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

    framed = BytesIO()
    RecordWriter(framed).write(Event(wall_time=time.time(), **fields).SerializeToString())
    return framed.getvalue()
