"""The protocol for trackers: any service that takes the metrics of a run can be added."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Tracker:
    """Receives the metrics and texts of a run. Only rank 0 has trackers.

    Derive from it, and name the class in a config: `trackers = [dict(type=MyTracker, …)]`. An error of the constructor
    ends `xtuner train` before training. All other methods are called in a thread of the tracker, in order, so that the
    run never waits for them; after an error, which is logged, the run continues without the tracker.
    Secrets (tokens, passwords) are masked in everything that it receives.
    """

    label = ""  # in messages; "" for the name of the class
    own_process = False  # True: its methods run in another process; it must be a dataclass of JSON values
    run_id = ""  # 21 characters, equal in all starts of a run; set before `begin`

    def begin(self, folder: Path, config: Mapping[str, Any]) -> str | None:
        """Returns where the curves can be seen, for the log.

        Args: folder: of this start, inside the work dir, with environment.json; config: resolved.
        """
        return None

    def log(self, record: Mapping[str, Any]) -> None:
        """Metrics by name; `record["iter"]` is the iteration. Values that are not numbers may be skipped."""

    def text(self, tag: str, value: str, iteration: int) -> None:
        """A text, such as a sample of the model."""

    def event(self, name: str, iteration: int, facts: Mapping[str, Any]) -> None:
        """Something that happened: start, save, stop, end, failure."""

    def close(self) -> None:
        """Called after the last record, also if the run ends with an error."""

    def abandon(self) -> None:
        """Called in another thread if `close` does not return in time."""
