"""The trackers of a run as one."""

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from xtuner.core.log import logger
from xtuner.core.secrets import mask, mask_text
from xtuner.train.trackers.base import Tracker
from xtuner.train.trackers.own_process import InOwnProcess

MOST_WAITING = 10_000  # calls that wait for a slow tracker; later ones are lost
CLOSING = 30.0  # s that a run waits at its end for trackers to send the rest
CLOSING_FAILED = 3.0  # the same after a failure, which other ranks must learn of


class Trackers:
    """Several trackers; one that fails is dropped.

    Args:
        direct: local files, which are written before the call returns.
        added: those of the config, each called in a thread of its own.
        run_id: see `Tracker.run_id`.
    """

    def __init__(self, direct: Sequence[Tracker], added: Sequence[Tracker] = (), run_id: str = "") -> None:
        self.run_id = run_id
        for tracker in (*direct, *added):
            tracker.run_id = run_id
        self._direct, self._added = list(direct), [Background(t) for t in added]
        self._closing = CLOSING

    def begin(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._each(lambda t: t.begin(folder, config))

    def log(self, record: Mapping[str, Any]) -> None:
        masked = mask(dict(record))
        self._each(lambda t: t.log(masked))

    def text(self, tag: str, value: str, iteration: int) -> None:
        masked = mask_text(value)
        self._each(lambda t: t.text(tag, masked, iteration))

    def event(self, name: str, iteration: int, **facts: Any) -> None:
        masked = mask(facts)
        if name == "failure":
            self._closing = CLOSING_FAILED
        self._each(lambda t: t.event(name, iteration, masked))

    def close(self) -> None:
        self._each(lambda t: t.close())
        deadline = time.monotonic() + self._closing
        for tracker in self._added:
            tracker.wait(deadline)
        self._direct, self._added = [], []

    def _each(self, act: Callable[[Tracker], object]) -> None:
        for added in self._added:
            act(added)
        for tracker in list(self._direct):
            try:
                act(tracker)
            except Exception as e:
                self._direct.remove(tracker)
                _report_failure(tracker, e)


class Background(Tracker):
    """Calls a tracker in a thread, so that its caller neither waits nor fails."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = InOwnProcess(tracker) if tracker.own_process else tracker
        self._name = tracker.label or type(tracker).__name__
        self._calls: queue.SimpleQueue[tuple[str, tuple[Any, ...]]] = queue.SimpleQueue()
        self._lost = 0
        self._begun = time.monotonic()
        self._thread = threading.Thread(target=self._run, name=f"tracker-{self._name}", daemon=True)
        self._thread.start()

    def begin(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._add("begin", folder, config)

    def log(self, record: Mapping[str, Any]) -> None:
        self._add("log", record)

    def text(self, tag: str, value: str, iteration: int) -> None:
        self._add("text", tag, value, iteration)

    def event(self, name: str, iteration: int, facts: Mapping[str, Any]) -> None:
        self._add("event", name, iteration, facts)

    def close(self) -> None:
        """Does not wait: `wait` does."""
        self._begun = time.monotonic()
        self._calls.put(("close", ()))

    def wait(self, deadline: float) -> None:
        """Wait until everything has been received, but not beyond `deadline` (of time.monotonic)."""
        self._thread.join(max(deadline - time.monotonic(), 0.0))
        if self._thread.is_alive():
            logger.warning(
                f"{self._name} did not finish within {time.monotonic() - self._begun:.0f} s; the run ends without it, "
                "and what it has not sent may be lost"
            )
            self._tracker.abandon()
        elif self._lost:
            logger.warning(f"{self._lost:,} records were lost, because {self._name} was slow")

    def _add(self, method: str, *arguments: Any) -> None:
        if not self._thread.is_alive():
            return
        if self._calls.qsize() < MOST_WAITING:
            self._calls.put((method, arguments))
            return
        self._lost += 1
        if self._lost == 1:
            logger.warning(
                f"{self._name} is slow: {MOST_WAITING:,} records wait for it, and more are lost until it has received "
                "some; scalars.json has all of them"
            )

    def _run(self) -> None:
        method = ""
        try:
            while method != "close":
                method, arguments = self._calls.get()
                place = getattr(self._tracker, method)(*arguments)
                if method == "begin" and place:
                    logger.info(f"{self._name}: {place}")
        except (Exception, SystemExit) as e:
            _report_failure(self._name, e)


def _report_failure(tracker: Tracker | str, e: BaseException) -> None:
    name, why = tracker if isinstance(tracker, str) else type(tracker).__name__, mask_text(f"{type(e).__name__}: {e}")
    logger.warning(f"{name} failed and is no longer used; the run continues: {why}")
