"""The schedule of a mixture: weights that change at given iterations, as for annealing.

schedule=[dict(iteration=9000, weights=dict(web=0.2, math=0.8))]
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xtuner.core.errors import ConfigError, did_you_mean
from xtuner.data.packing.mixture_plan import KEY

MOST_CHANGES = 100  # each has a table of up to 0.9 MB


@dataclass(frozen=True)
class Change:
    """Weights from an iteration on, one for each source; key: the setting that says so."""

    iteration: int
    weights: tuple[float, ...]
    key: str


def read_schedule(schedule: Sequence[Any], sources: Sequence[tuple[str, float]]) -> list[Change]:
    """The changes of a schedule.

    Args:
        sources: name and weight of each.

    Raises: ConfigError.
    """
    if not isinstance(schedule, list | tuple) or not all(isinstance(entry, Mapping) for entry in schedule):
        raise ConfigError(
            f"schedule = {schedule!r} is not a list of changes: [dict(iteration=N, weights=dict(NAME=WEIGHT)), …]",
            where=f"{KEY}.schedule",
        )
    if len(schedule) > MOST_CHANGES:
        raise ConfigError(f"a schedule of {len(schedule)} changes, more than {MOST_CHANGES}", where=f"{KEY}.schedule")
    found: list[Change] = []
    weights = dict(sources)
    for i, entry in enumerate(schedule):
        key = f"{KEY}.schedule.{i}"
        _check_entry(entry, key, [name for name, _ in sources])
        if found and entry["iteration"] <= found[-1].iteration:
            raise ConfigError(
                f"iteration {entry['iteration']} follows iteration {found[-1].iteration}: they must ascend",
                where=f"{key}.iteration",
                do="sort the entries by iteration, and give one for each",
            )
        weights |= {name: float(weight) for name, weight in entry["weights"].items()}
        if not any(weights.values()):
            raise ConfigError(
                f"from iteration {entry['iteration']} on, all weights are 0", where=f"{key}.weights",
                do="give at least one source a weight above 0",
            )  # fmt: skip
        found.append(Change(entry["iteration"], tuple(weights.values()), key))
    return found


def _check_entry(entry: Mapping[str, Any], key: str, names: list[str]) -> None:
    """Raises: ConfigError."""
    if unknown := [k for k in entry if k not in ("iteration", "weights")]:
        near = did_you_mean(str(unknown[0]), ["iteration", "weights"])
        raise ConfigError(f"a change of the weights has no setting {unknown[0]!r}.{near}", where=key)
    iteration, weights = entry.get("iteration"), entry.get("weights")
    if type(iteration) is not int or iteration < 0:
        raise ConfigError(
            f"iteration = {iteration!r} is not a whole number from 0 on",
            where=f"{key}.iteration",
            why="the weights change after this number of iterations",
        )
    if not isinstance(weights, Mapping) or not weights:
        raise ConfigError(f"weights = {weights!r} is not dict(NAME=WEIGHT, …)", where=f"{key}.weights")
    for name, weight in weights.items():
        if name not in names:
            raise ConfigError(
                f"the mixture has no source {name!r}.{did_you_mean(str(name), names)}",
                where=f"{key}.weights",
                do=f"its sources are {', '.join(names)}",
            )
        if type(weight) not in (int, float) or not math.isfinite(weight) or weight < 0:
            raise ConfigError(f"weight = {weight!r} is not a number from 0 on", where=f"{key}.weights.{name}")
