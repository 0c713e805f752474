"""Averages over the iterations since the previous log line, so that a single odd pack does not dominate the curve."""

import math
from typing import Any

from xtuner.train.run import Iteration

SMOOTHING = 0.98  # decay of the smoothed loss: the weight of an iteration halves every 34 iterations
_RATES = ("tokens_per_s", "tokens_per_s_a_rank", "mfu")
_SECONDS = ("time", "data_time")


class Averages:
    """Collects iterations; `record` returns their averages, `restart` begins the next log line.

    - `loss`: mean over the targets of all iterations; for a single iteration exactly its own loss. Values that are not
      finite are skipped, unless all are non-finite: they were reported, and their steps not applied.
    - `loss_smoothed`: the same mean over all iterations since the start, with exponential decay (SMOOTHING).
    - `loss/NAME`, `targets/NAME`: the same of each source of a mixture; no loss if it had no target.
    - seconds: means. Rates: means weighted by seconds, so that tokens per second is tokens over seconds.
    - `targets`: their sum. `applied`: whether every step that had targets was applied.
    - Everything else that hooks have recorded: the value of the last iteration.
    """

    def __init__(self) -> None:
        self._losses = self._targets = 0.0  # decaying sums
        self._iterations: list[Iteration] = []

    def restart(self) -> None:
        self._iterations = []

    def add(self, it: Iteration) -> None:
        self._iterations.append(it)
        if it.num_targets and math.isfinite(it.loss):
            self._losses = SMOOTHING * self._losses + it.loss * it.num_targets
            self._targets = SMOOTHING * self._targets + it.num_targets

    def record(self) -> dict[str, Any]:
        last = self._iterations[-1]
        learned = [i for i in self._iterations if i.num_targets]
        record = {
            "loss": self._loss(),
            "loss_smoothed": self._losses / self._targets if self._targets else last.loss,
            "targets": sum(i.num_targets for i in learned),
            "applied": bool(learned) and all(i.applied for i in learned),
            **last.record,
        }
        record |= self._by_source()
        if len(self._iterations) > 1:
            for key in (*_SECONDS, *_RATES):
                if key in record:
                    record[key] = self._mean(key, by_seconds=key in _RATES)
        return record

    def _by_source(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for parts in zip(*(i.sources for i in self._iterations), strict=True):
            finite = [part for part in parts if part.targets and math.isfinite(part.loss)]
            if finite:
                found[f"loss/{parts[0].name}"] = sum(p.loss for p in finite) / sum(p.targets for p in finite)
            found[f"targets/{parts[0].name}"] = sum(part.targets for part in parts)
        return found

    def _loss(self) -> float:
        finite = [i for i in self._iterations if i.num_targets and math.isfinite(i.loss)]
        if len(finite) < 2:
            return (finite or self._iterations)[-1].loss
        return sum(i.loss * i.num_targets for i in finite) / sum(i.num_targets for i in finite)

    def _mean(self, key: str, by_seconds: bool) -> float:
        weights = [i.record.get("time", 1.0) if by_seconds else 1.0 for i in self._iterations]
        return sum(w * i.record[key] for w, i in zip(weights, self._iterations, strict=True)) / sum(weights)
