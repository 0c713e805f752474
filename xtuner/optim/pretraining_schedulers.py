"""Schedulers of pretraining: cosines with restarts, and warm-up–stable–decay."""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Any, ClassVar, Literal, Self

from xtuner.core.errors import ConfigError, did_you_mean
from xtuner.optim.schedule import Scheduler, Unit, check_lowest, lowest_rate, multiply

SHAPES = ("1-sqrt", "linear")


@dataclass(frozen=True)
class CosineRestartLR(Scheduler):
    """Half cosines one after another: each starts at restart_weights[i] × the optimizer's rate, whatever the rate was,
    and ends at the lowest rate. After the last period the rate stays.

    Args:
        periods: lengths, in `unit`; the last may end after the run.
        restart_weights: one for each period.
        eta_min, eta_min_ratio: the lowest rate, as in `CosineAnnealingLR`.
    """

    periods: Sequence[float] = field(kw_only=True)
    restart_weights: Sequence[float] = (1,)
    eta_min: float | None = None
    eta_min_ratio: float | None = None

    multiplies: ClassVar[bool] = False
    lengths: ClassVar[tuple[str, ...]] = ("periods",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_lowest(self)
        whole = self.lengths_in == "iterations"
        right = [math.isfinite(p) and p > 0 and not (whole and p % 1) for p in self.periods]
        if not right or not all(right):
            words = "whole numbers of at least 1" if whole else "numbers above 0"
            raise ConfigError(f"periods = {self.periods!r} are not {words}", where="periods")
        if not all(math.isfinite(w) and w >= 0 for w in self.restart_weights):
            what = f"restart_weights = {self.restart_weights!r} are not numbers of at least 0"
            raise ConfigError(what, where="restart_weights")
        if len(self.periods) != len(self.restart_weights):
            raise ConfigError(
                f"{len(self.restart_weights)} restart_weights for {len(self.periods)} periods",
                where="restart_weights",
                do="give one for each period",
            )

    def _convert(self, value: Any, per: Fraction | int) -> Any:
        ends = [int(multiply(end, per) + 1e-9) for end in accumulate(value)]
        periods = [end - begin for begin, end in pairwise([0, *ends])]
        if not all(periods):
            raise ConfigError(
                f"periods = {value!r} in {self.lengths_in} are {periods} iterations",
                where="periods",
                do="let each last at least one",
            )
        return periods

    def advance(self, rate: float, before: int, after: int, base: float) -> float:
        ends = [int(end) for end in accumulate(self.periods)]
        after = min(after, ends[-1] - 1)
        if after <= before:
            return rate
        i = bisect_right(ends, after)
        length, start = int(self.periods[i]), ends[i] - int(self.periods[i])
        if before < start:
            before, rate = start, base * self.restart_weights[i]

        def half(step: int) -> float:
            return (1 + math.cos(math.pi * (step - start) / length)) / 2

        lowest = lowest_rate(self, base)
        return lowest + (rate - lowest) * (half(after) / half(before))

    def remark(self, last: int) -> str:
        end = self.begin + sum(self.periods)
        return (
            f"its periods end at iteration {end:g}; after it the rate stays"
            if end < min(self.end or last, last)
            else ""
        )


@dataclass(frozen=True)
class WarmupStableDecayLR(Scheduler):
    """Warm-up in equal steps to the full rate, then the full rate, then a decay over the last `decay` of its length.

        warm-up   (i + 1) / warmup, for i = 0 … warmup − 1
        decay     1 − (1 − end_factor) x ("linear") or 1 − (1 − end_factor) √x ("1-sqrt"; A. Hägele et al., 2024),
                  x = 0, 1/decay, …, 1 − 1/decay: end_factor is what would follow

    Args:
        warmup, decay: lengths, in `unit`.
    """

    warmup: float = 0
    decay: float = field(kw_only=True)
    decay_shape: Literal["1-sqrt", "linear"] = "1-sqrt"
    end_factor: float = 0.0

    lengths: ClassVar[tuple[str, ...]] = ("warmup", "decay")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._in_range("warmup", 0)
        self._in_range("decay", 0, above=True)
        self._in_range("end_factor", 0, 1)
        if self.decay_shape not in SHAPES:
            near = did_you_mean(str(self.decay_shape), list(SHAPES))
            what = f"decay_shape = {self.decay_shape!r} is not one of {', '.join(SHAPES)}.{near}"
            raise ConfigError(what, where="decay_shape")
        if self.end is not None and self.warmup + self.decay > self.length * (1 + 1e-9):
            raise ConfigError(
                f"warmup = {self.warmup:g} and decay = {self.decay:g} are longer than the schedule, "
                f"{self.length:g} {self.lengths_in}",
                where="decay",
                why="the decay would begin before the full rate is reached",
                do="shorten one of them",
            )

    def _convert(self, value: Any, per: Fraction | int) -> Any:
        return int(multiply(value, per))

    def in_iterations(self, per_unit: Mapping[Unit, Fraction | int], last: int) -> Self:
        unit, per = self.lengths_in, per_unit[self.lengths_in]
        warmup, decay, begin = (self._convert(v, per) for v in (self.warmup, self.decay, self.begin))
        if decay < 1:
            raise ConfigError(f"decay = {self.decay:g} {unit} are less than an iteration", where="decay",
                              do="let it last at least one")  # fmt: skip
        if self.end is None and begin + warmup + decay > last:
            raise ConfigError(
                f"warmup = {self.warmup:g} and decay = {self.decay:g} {unit} are {warmup:g} and {decay:g} iterations, "
                f"and the run has {last:g}" + (f" of which the schedule begins at {begin:g}" if begin else ""),
                where="decay",
                why="the decay would begin before the full rate is reached",
                do="shorten one of them",
            )
        return super().in_iterations(per_unit, last)

    def _factor(self, step: int) -> float:
        if step < 0:
            return 1.0
        share = (step - (self.length - self.decay)) / self.decay
        if share <= 0:
            return min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return 1 - (1 - self.end_factor) * (share if self.decay_shape == "linear" else math.sqrt(share))

    def advance(self, rate: float, before: int, after: int, base: float) -> float:
        return rate * (self._factor(after) / self._factor(before))

    def remark(self, last: int) -> str:
        if self.end is None or self.end >= last:
            return ""
        return f"ends at iteration {self.end:g}; after it the rate stays at that of its last iteration"
