"""Asynchronous checkpoints: training waits only for the copy to host memory; a thread writes it to the disk."""

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from xtuner.core.errors import CheckpointError
from xtuner.core.log import human_bytes, logger
from xtuner.core.remote.url import Url, parse_url
from xtuner.dist.collectives import Ranks
from xtuner.engine.base import Strategy
from xtuner.train.checkpoints import checkpoint, remote
from xtuner.train.state import TrainState

TOLERATED = 2  # failed saves in a row; one more ends the run


class AsyncSaver:
    """Saves checkpoints to one work dir, one at a time.

    With `upload_dir` each is uploaded after it is on the disk; a save is done when its upload is.
    A failed save is logged, and training continues with the older checkpoints. The third failure in a row, or a failure
    of the run's last save, raises CheckpointError.
    """

    def __init__(self, work_dir: Path, ranks: Ranks, upload_dir: str | None = None) -> None:
        self.work_dir = work_dir
        self._upload_url = parse_url(upload_dir, "upload_dir") if upload_dir else None
        self._ranks = ranks.new_group()  # a group of its own: its collectives run in the thread
        self._pool = ThreadPoolExecutor(1, "xtuner-save")
        self._pending: Future[None] | None = None
        self._failures = 0
        self.save_time = 0.0  # s, of the last save
        self.written: deque[Path] = deque()  # checkpoints on the disk, not yet passed to hooks
        self.uploaded: deque[Path] = deque()  # those that are also in `upload_dir`

    def save(
        self, state: TrainState, strategy: Strategy, facts: dict[str, Any], optimizer: bool = True, keep: int = -1
    ) -> None:
        """Start a save; returns once the state has been copied. Waits for the previous save first."""
        self.finish()
        begin = time.perf_counter()
        snapshot = strategy.snapshot(optimizer)
        copied = time.perf_counter() - begin

        def write() -> None:
            begin = time.perf_counter()
            try:
                folder, size = checkpoint.write(self.work_dir, state, snapshot, facts, self._ranks, keep)
            except CheckpointError as e:
                logger.error(str(e))
                raise
            self.written.append(folder)
            self.save_time = took = time.perf_counter() - begin
            logger.info(
                f"saved {folder}: {human_bytes(size)} in {took:.1f} s ({human_bytes(size / took)}/s); "
                f"training waited {copied:.2f} s"
            )
            if self._upload_url:
                self._upload(folder, self._upload_url, size, keep)
                self.save_time = time.perf_counter() - begin

        self._pending = self._pool.submit(write)

    def _upload(self, folder: Path, url: Url, size: int, keep: int) -> None:
        begin = time.perf_counter()
        try:
            remote.upload(folder, url, self._ranks, keep)
        except CheckpointError as e:
            logger.error(str(e))
            raise
        self.uploaded.append(folder)
        took = time.perf_counter() - begin
        logger.info(f"uploaded {url.join(folder.name)} in {took:.1f} s ({human_bytes(size / took)}/s)")

    def finish(self, last: bool = False) -> None:
        """Wait for the save in progress. Raises: CheckpointError if it was the third failure in a row, or `last`."""
        if self._pending is None:
            return
        error, self._pending = self._pending.exception(), None
        if error is None:
            self._failures = 0
            return
        self._failures += 1
        if last or self._failures > TOLERATED or not isinstance(error, CheckpointError):
            raise error
        logger.error(f"checkpoint failed ({self._failures} in a row; {TOLERATED + 1} end the run); training continues")

    def close(self) -> None:
        """Wait for the save in progress, without its error: the process must not end while files are being written."""
        self._pool.shutdown(wait=True)
