"""The protocol for trackers: any service that takes the metrics of a run can be added."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from xtuner.core.log import logger
from xtuner.core.secrets import mask, mask_text


class Tracker:
    """Receives the metrics and texts of a run. Only rank 0 has trackers.

    Derive from it, and name the class in a config: `trackers = [dict(type=MyTracker, …)]`. An error of the constructor
    ends `xtuner train` before training; after that, an error of a tracker is logged, and the run continues without it.
    Secrets (tokens, passwords) are masked in everything that it receives.
    """

    def begin(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Args: folder: of this start, inside the work dir; config: resolved."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Metrics by name; `record["iter"]` is the iteration. Values that are not numbers may be skipped."""

    def text(self, tag: str, value: str, iteration: int) -> None:
        """A text, such as a sample of the model."""

    def event(self, name: str, iteration: int, facts: Mapping[str, Any]) -> None:
        """Something that happened: start, save, stop, end, failure."""

    def close(self) -> None:
        """Called after the last record, also if the run ends with an error."""


class Trackers:
    """Several trackers; one that fails is dropped."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = list(trackers)

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
        self._each(lambda t: t.event(name, iteration, masked))

    def close(self) -> None:
        self._each(lambda t: t.close())
        self._trackers = []

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                act(tracker)
            except Exception as e:
                self._trackers.remove(tracker)
                name, why = type(tracker).__name__, mask_text(f"{type(e).__name__}: {e}")
                logger.warning(f"{name} failed and is no longer used; the run continues: {why}")
