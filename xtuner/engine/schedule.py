"""Learning rates by iteration (one optimizer step), as pure functions: nothing to save, nothing to restore.

The formulas agree with mmengine's schedulers of the same names, which the documented configs use.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xtuner.config.build import build
from xtuner.core.errors import ConfigError


@dataclass(frozen=True)
class _Part:
    """A scheduler active from `begin` to `end`.

    With by_epoch and convert_to_iter_based these are epochs (fractions allowed), else iterations.
    """

    begin: float = 0
    end: float = math.inf
    by_epoch: bool = True
    convert_to_iter_based: bool = False

    def __post_init__(self) -> None:
        if self.by_epoch and not self.convert_to_iter_based:
            raise ConfigError(
                "a schedule in whole epochs is not supported",
                where="param_scheduler",
                why="the rate would change once an epoch only",
                do="set convert_to_iter_based=True, or by_epoch=False with begin and end in iterations",
            )
        if not 0 <= self.begin <= self.end:
            raise ConfigError(f"begin = {self.begin} and end = {self.end}", where="param_scheduler")

    def span(self, iterations_per_epoch: float) -> tuple[int, float]:
        """(begin, end) in iterations."""
        unit = iterations_per_epoch if self.by_epoch else 1
        return int(self.begin * unit), self.end if math.isinf(self.end) else int(self.end * unit)


@dataclass(frozen=True)
class LinearLR(_Part):
    """From start_factor × the rate to end_factor × it, in equal steps; the last one lies at iteration end − 1."""

    start_factor: float = 1 / 3
    end_factor: float = 1.0

    def rate(self, rate: float, done: int, length: float) -> float:
        steps = length - 1
        part = min(done / steps, 1.0) if 0 < steps < math.inf else float(steps <= 0)
        return rate * (self.start_factor + (self.end_factor - self.start_factor) * part)


@dataclass(frozen=True)
class CosineAnnealingLR(_Part):
    """Half a cosine from the rate at begin to eta_min at end."""

    eta_min: float = 0.0

    def rate(self, rate: float, done: int, length: float) -> float:
        part = min(done / length, 1.0) if length else 1.0
        return self.eta_min + (rate - self.eta_min) * (1 + math.cos(math.pi * part)) / 2


class Schedule:
    """The rate of every iteration: schedulers one after another, each starting from where the last one ended."""

    def __init__(self, base_lr: float, parts: Sequence[Any], iterations_per_epoch: float) -> None:
        self.base_lr = base_lr
        self.parts = [(p, *p.span(iterations_per_epoch)) for p in parts]

    @classmethod
    def of(cls, base_lr: float, specs: Any, iterations_per_epoch: float) -> "Schedule":
        """From a config's `param_scheduler`: one dict or a list of them."""
        specs = [specs] if isinstance(specs, dict) else specs or []
        parts = [build(s, f"param_scheduler.{i}") for i, s in enumerate(specs)]
        return cls(base_lr, parts, iterations_per_epoch)

    def __call__(self, iteration: int) -> float:
        """Rate of the step that iteration number `iteration` (from 0) makes."""
        lr = self.base_lr
        for part, begin, end in self.parts:
            if iteration >= begin and end > begin:
                lr = part.rate(lr, min(iteration, end) - begin, end - begin)
        return float(lr)
