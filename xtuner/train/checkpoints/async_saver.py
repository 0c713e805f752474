"""Checkpoints beside training: a step waits for the copy to host memory only, a thread brings it to the disk."""

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from xtuner.core.errors import CheckpointError
from xtuner.core.log import human_bytes, logger
from xtuner.dist.collectives import Ranks
from xtuner.engine.base import Strategy
from xtuner.train.checkpoints import checkpoint
from xtuner.train.state import TrainState

TOLERATED = 2  # failed saves in a row; one more ends the run


class Saver:
    """Saves checkpoints into one work dir, one at a time.

    A save that fails is told, and training goes on with the older checkpoints; three in a row, or the last one of a
    run, raise CheckpointError.
    """

    def __init__(self, work_dir: Path, ranks: Ranks) -> None:
        self.work_dir = work_dir
        self._ranks = ranks.new_group()  # its collectives run in the thread, between the main one's
        self._pool = ThreadPoolExecutor(1, "xtuner-save")
        self._flying: Future[None] | None = None
        self._failures = 0
        self.save_time = 0.0  # s that the last save took
        self.written: deque[Path] = deque()  # checkpoints that are on the disk, for who takes them out

    def save(
        self, state: TrainState, strategy: Strategy, facts: dict[str, Any], optimizer: bool = True, keep: int = -1
    ) -> None:
        """Begin to save; returns when what training may change has been copied. Waits for an earlier save first."""
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

        self._flying = self._pool.submit(write)

    def finish(self, last: bool = False) -> None:
        """Wait for the save in flight. Raises: CheckpointError if it was one failure too many, or the `last` save."""
        if self._flying is None:
            return
        error, self._flying = self._flying.exception(), None
        if error is None:
            self._failures = 0
            return
        self._failures += 1
        if last or self._failures > TOLERATED or not isinstance(error, CheckpointError):
            raise error
        logger.error(f"failure {self._failures} of {TOLERATED + 1} that end the run; training goes on")

    def close(self) -> None:
        """Wait, whatever came of it: nothing half-written is left to a process that ends."""
        self._pool.shutdown(wait=True)
