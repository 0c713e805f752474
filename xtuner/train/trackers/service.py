"""What trackers of experiment services have in common."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xtuner.core.errors import ConfigError
from xtuner.core.system.sysinfo import installed
from xtuner.train.trackers.base import Tracker

UPLOADING = 25  # s that a library may take at the end of a run; less than `group.CLOSING`


class Service(Tracker):
    """A tracker whose library runs in a process of its own."""

    own_process = True
    failure = ""
    _texts = -1, 0  # iteration, and how many texts it had

    def event(self, name: str, iteration: int, facts: Mapping[str, Any]) -> None:
        if name == "failure":
            self.failure = str(facts.get("error", "unknown"))

    def number_text(self, tag: str, iteration: int) -> str:
        """`sample/1` for the first text of an iteration, and so on: every prompt has a name of its own."""
        last, count = self._texts
        self._texts = iteration, count + 1 if last == iteration else 1
        return f"{tag}/{self._texts[1]}"


def describe_run(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config, and the environment with the git state: what a service shows of a run."""
    try:
        environment = json.loads((folder / "environment.json").read_bytes())
    except (OSError, ValueError):
        environment = None
    return {**config, "environment": environment}


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in record.items() if isinstance(value, int | float)}


def require_package(package: str, install: str, name: str) -> None:
    """Raises: ConfigError if a package is not installed."""
    if installed(package) is None:
        raise ConfigError(
            f"{name} needs the package {package}, which is not installed",
            do=f"pip install '{install}'; or remove {name} from `trackers` and the command line",
        )
