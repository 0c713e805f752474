"""Where the figures of a run go: a small protocol, so that any service can be one more place."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from xtuner.core.log import logger
from xtuner.core.secrets import mask, mask_text


class Tracker:
    """A place for the figures and texts of a run. Only rank 0 has trackers.

    Derive from it, and name the class in a config: `trackers = [dict(type=MyTracker, …)]`. What the constructor refuses
    ends `xtuner train` before it begins; after that, an error of a tracker is reported, and the run continues without
    that tracker. Secrets (tokens, passwords) are masked in all that it gets.
    """

    def begin(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Args: folder: of this start, in the work dir; config: resolved."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Figures by name; `record["iter"]` is the iteration. What is not a number (an ETA, a list) may be left out."""

    def text(self, tag: str, value: str, iteration: int) -> None:
        """A sample of the model, for one."""

    def close(self) -> None:
        """After the last record, also of a run that ends with an error."""


class Trackers:
    """Several at once; one that fails is left out from then on."""

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
                logger.warning(f"{name} failed and gets nothing more; the run continues: {why}")
