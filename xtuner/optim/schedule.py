"""Learning rates by iteration (one optimizer step), as pure functions without state to save.

They equal mmengine 0.10.7's schedulers of the same names at `accumulative_counts = 1` (a test runs both). In mmengine
each scheduler changes the current rate step by step: the rate stays where the last scheduler left it, and overlapping
schedulers act on each other's results. Here the effect of any number of a scheduler's steps is a closed expression, so
that the rate of an iteration does not depend on having computed earlier ones.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, ClassVar, Literal, Self

from xtuner.config.build import build
from xtuner.core.errors import ConfigError, did_you_mean

INF = 10**9  # mmengine's "no end"; not converted from epochs to iterations
Unit = Literal["iterations", "epochs", "tokens"]
UNITS = ("iterations", "epochs", "tokens")


@dataclass(frozen=True)
class Scheduler:
    """A scheduler that acts in iterations `begin` … `end` − 1; its steps are counted from 0.

    `unit` is that of all lengths: iterations, epochs (fractions allowed), or tokens in packs. Without it, by_epoch and
    convert_to_iter_based mean epochs, as in mmengine, and by_epoch=False iterations. `end=None`: the end of the run.
    """

    begin: float = 0
    end: float | None = None
    by_epoch: bool = True
    convert_to_iter_based: bool = False
    unit: Unit | None = field(default=None, kw_only=True)

    multiplies: ClassVar[bool] = True  # it only multiplies the rate: the order of such schedulers does not matter
    lengths: ClassVar[tuple[str, ...]] = ()  # further fields in `unit`

    def __post_init__(self) -> None:
        self._check_unit()
        if self.begin < 0:
            raise ConfigError(f"begin = {self.begin:g} is before the start of the run", where="begin")
        self._in_range("begin", 0)
        if self.end is None:
            return
        self._in_range("end", 0)
        if self.end <= self.begin:
            how = "before it begins" if self.end < self.begin else "where it begins"
            raise ConfigError(
                f"the schedule ends (end = {self.end:g}) {how} (begin = {self.begin:g} {self.lengths_in})",
                where="begin" if self.begin else "end",
                do="keep 0 <= begin < end; a warm_up_ratio lies between 0 and 1; without warm-up leave its entry out",
            )

    @property
    def lengths_in(self) -> Unit:
        return self.unit or ("epochs" if self.by_epoch else "iterations")

    def _check_unit(self) -> None:
        if self.unit is not None:
            if self.unit not in UNITS:
                near = did_you_mean(str(self.unit), list(UNITS))
                raise ConfigError(f"unit = {self.unit!r} is not one of {', '.join(UNITS)}.{near}", where="unit")
            if self.convert_to_iter_based or not self.by_epoch:
                other = "convert_to_iter_based" if self.convert_to_iter_based else "by_epoch"
                raise ConfigError(f"unit and {other} are both given", where=other, do="give unit alone")
            return
        if self.by_epoch and not self.convert_to_iter_based:
            raise ConfigError(
                "a schedule in whole epochs is not supported",
                why="the rate would change only once an epoch",
                do='set unit = "epochs" or "iterations" (as mmengine: convert_to_iter_based=True, or by_epoch=False)',
            )
        if self.convert_to_iter_based and not self.by_epoch:
            raise ConfigError(
                "there are no epochs to convert: by_epoch is False",
                where="convert_to_iter_based",
                do="leave convert_to_iter_based out, or set by_epoch=True with begin and end in epochs",
            )

    def _in_range(self, name: str, least: float, most: float = math.inf, above: bool = False) -> None:
        value = getattr(self, name)
        if not (math.isfinite(value) and least <= value <= most) or (above and value == least):
            words = f"{'above' if above else 'at least'} {least:g}" + f" and at most {most:g}" * math.isfinite(most)
            raise ConfigError(f"{name} = {value!r} is not {words}", where=name)

    def in_iterations(self, per_unit: Mapping[Unit, Fraction | int], last: int) -> Self:
        """This scheduler with all lengths in iterations.

        Args:
            per_unit: number of iterations in each unit.
            last: number of iterations of the run.

        Raises: ConfigError if it acts in no iteration.
        """
        begin, end, per, unit = self.begin, self.end, per_unit[self.lengths_in], self.lengths_in
        changed: dict[str, Any] = {}
        if unit != "iterations":
            begin = int(multiply(begin, per))
            end = end if end is None or end == INF else int(multiply(end, per))
            changed = {name: self._convert(getattr(self, name), per) for name in self.lengths}
        end = last if end is None else end
        if end <= begin:
            given = "the end of the run" if self.end is None else f"{self.end:g}"
            size = {"epochs": f"an epoch has {float(per):g} iterations", "iterations": f"the run has {last}",
                    "tokens": f"an iteration has {float(1 / Fraction(per)):,.0f} tokens"}[unit]  # fmt: skip
            raise ConfigError(
                f"the schedule has no iteration: begin = {self.begin:g} and end = {given} in {unit} are iterations "
                f"{begin:g} and {end:g}",
                where="begin" if self.begin else "end",
                why=size,
                do="let it last at least one iteration (a larger warm_up_ratio, more data), or leave this entry out",
            )
        changed |= {"begin": begin, "end": end, "by_epoch": False, "convert_to_iter_based": False, "unit": None}
        return replace(self, **changed)

    def _convert(self, value: Any, per: Fraction | int) -> Any:
        """A field of `lengths` in iterations."""
        return value and multiply(value, per)

    @property
    def length(self) -> float:
        assert self.end is not None
        return self.end - self.begin

    def advance(self, rate: float, before: int, after: int, base: float) -> float:
        """The rate after step `after`, given the rate after step `before` (-1: before the first), if this scheduler
        acts alone.

        Args:
            base: the optimizer's own rate.
        """
        raise NotImplementedError

    def remark(self, last: int) -> str:
        """A warning about effects that a user may not expect in a run of `last` iterations; "" for none."""
        return ""


@dataclass(frozen=True)
class LinearLR(Scheduler):
    """From start_factor × the rate to end_factor × the rate, in equal steps, the last one at iteration end − 1."""

    start_factor: float = 1 / 3
    end_factor: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._in_range("start_factor", 0, 1, above=True)
        self._in_range("end_factor", 0, 1)

    def _factor(self, step: int) -> float:
        if step < 0:
            return 1.0
        progress = step / (self.length - 1) if step else 0.0
        return self.start_factor + (self.end_factor - self.start_factor) * progress

    def advance(self, rate: float, before: int, after: int, base: float) -> float:
        return rate * (self._factor(after) / self._factor(before))

    def remark(self, last: int) -> str:
        if self.length > 1 or self.start_factor == self.end_factor:
            return ""
        return (
            f"lasts one iteration, so the rate stays at {self.start_factor:g} of its value and never reaches "
            f"{self.end_factor:g}: let it last at least two iterations, or leave it out"
        )


@dataclass(frozen=True)
class ConstantLR(Scheduler):
    """factor × the rate, and the original rate again at iteration end − 1."""

    factor: float = 1 / 3

    def __post_init__(self) -> None:
        super().__post_init__()
        self._in_range("factor", 0, 1, above=True)

    def advance(self, rate: float, before: int, after: int, base: float) -> float:
        if before < 0:
            rate *= self.factor
        restores = self.length - 1  # the first step does not
        return rate * (1 / self.factor) if max(before, 0) < restores <= after and restores % 1 == 0 else rate

    def remark(self, last: int) -> str:
        if self.length > 1 or self.factor == 1:
            return ""
        return f"lasts one iteration, so the rate stays at {self.factor:g} of its value: let it last at least two"


@dataclass(frozen=True)
class MultiStepLR(Scheduler):
    """gamma × the rate at each milestone, counted from begin. Milestones between two iterations have no effect."""

    gamma: float = 0.1
    milestones: Sequence[float] = field(kw_only=True)

    lengths: ClassVar[tuple[str, ...]] = ("milestones",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._in_range("gamma", 0)

    def _convert(self, value: Any, per: Fraction | int) -> Any:
        milestones = [multiply(m, per) for m in value]
        # unlike in mmengine, an epoch may end inside an iteration
        return [int(m) for m in milestones] if per.denominator > 1 else milestones

    def advance(self, rate: float, before: int, after: int, base: float) -> float:
        return rate * self.gamma ** sum(before < m <= after and m % 1 == 0 for m in self.milestones)

    def remark(self, last: int) -> str:
        end = min(self.length, last - self.begin)
        idle = [f"{m:g}" for m in self.milestones if m % 1 or not 0 <= m < end]
        return f"milestones without effect, in iterations from its begin: {', '.join(idle)}" if idle else ""


@dataclass(frozen=True)
class CosineAnnealingLR(Scheduler):
    """Half a cosine from the rate at begin to eta_min, T_max iterations (or epochs) later; then the rate rises again.

    Args:
        T_max: default `end - begin`.
        eta_min: the lowest rate, default 0.
        eta_min_ratio: the lowest rate, relative to the optimizer's rate.
    """

    eta_min: float | None = None
    eta_min_ratio: float | None = None
    T_max: float | None = None

    multiplies: ClassVar[bool] = False
    lengths: ClassVar[tuple[str, ...]] = ("T_max",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_lowest(self)
        if self.T_max is not None:
            self._in_range("T_max", 0)

    def in_iterations(self, per_unit: Mapping[Unit, Fraction | int], last: int) -> Self:
        part = super().in_iterations(per_unit, last)
        return part if part.T_max else replace(part, T_max=part.length)

    def advance(self, rate: float, before: int, after: int, base: float) -> float:
        lowest = lowest_rate(self, base)
        before = max(before, 0)  # the first step does not change the rate
        low = self._last_low(after - 1)
        if low >= before:  # after a lowest point the rate rises towards the optimizer's, wherever the cosine began
            rate = (lowest if low > before else rate) + (base - lowest) * self._half(low + 1)
            before = low + 1
        return lowest + (rate - lowest) * (self._half(after) / (self._half(before) or 1.0))

    def _half(self, step: int) -> float:
        """From 1 at the first step to 0 at the lowest."""
        assert self.T_max
        return (1 + math.cos(math.pi * step / self.T_max)) / 2

    def _last_low(self, step: int) -> int:
        """The last step up to `step` with the lowest rate: T_max, 3 T_max, … if T_max is whole; -1 for none."""
        assert self.T_max
        whole = round(self.T_max)
        if not whole or self._half(whole):
            return -1
        return whole * (2 * ((step // whole - 1) // 2) + 1) if step >= whole else -1

    def remark(self, last: int) -> str:
        assert self.T_max
        assert self.end is not None
        turn = self.begin + self.T_max
        if turn >= min(self.end, last) - 1:
            return ""
        return f"T_max ends at iteration {turn:g}; after it the rate rises again: set end there if that is not meant"


def check_lowest(part: Any) -> None:
    if part.eta_min is not None and part.eta_min_ratio is not None:
        raise ConfigError("eta_min and eta_min_ratio are both given", where="eta_min_ratio", do="give one of them")
    for name in ("eta_min", "eta_min_ratio"):
        if getattr(part, name) is not None:
            part._in_range(name, 0)


def lowest_rate(part: Any, base: float) -> float:
    return part.eta_min or 0.0 if part.eta_min_ratio is None else base * part.eta_min_ratio


def multiply(epochs: float, per_epoch: Fraction | int) -> float:
    """Epochs in iterations, rounded like mmengine if an epoch is a whole number of iterations."""
    return epochs * per_epoch.numerator / per_epoch.denominator


class Schedule:
    """The learning rate of every iteration.

    Args:
        parts: schedulers; each acts on the result of those before it in this list.
        last: number of iterations of the run.
        tokens: in the packs of an iteration.

    Raises: ConfigError if a scheduler acts in no iteration.
    """

    def __init__(
        self, base_lr: float, parts: Sequence[Any] = (), iterations_per_epoch: Fraction | int = 1, last: int = INF,
        tokens: int = 1,
    ) -> None:  # fmt: skip
        self.base_lr = base_lr
        self.parts: list[Scheduler] = []
        per_unit: dict[Unit, Fraction | int] = {
            "iterations": 1, "epochs": iterations_per_epoch, "tokens": Fraction(1, tokens)
        }  # fmt: skip
        for i, part in enumerate(parts):
            try:
                self.parts.append(part.in_iterations(per_unit, last))
            except ConfigError as e:
                where = f"param_scheduler.{i}" + (f".{e.where}" if e.where else "")
                raise ConfigError(e.what, where=where, why=e.why, do=e.do) from None
        self._begins = [math.ceil(p.begin) for p in self.parts]
        ends = [math.ceil(p.end or 0) for p in self.parts]
        # between two edges the set of active schedulers does not change
        self._edges = sorted({*self._begins, *ends})
        spans = list(zip(self.parts, self._begins, ends, strict=True))
        self._active = [[(p, begin) for p, begin, end in spans if begin <= edge < end] for edge in self._edges]
        self._entries = [base_lr]  # the rate before each edge, computed on demand
        self._walked = (-1, 0.0)  # the last (iteration, rate) where rates have no closed expression

    @classmethod
    def from_config(
        cls, base_lr: float, specs: Any, iterations_per_epoch: Fraction | int, last: int, tokens: int = 1
    ) -> "Schedule":
        """Build from a config's `param_scheduler`: a dict or a list of dicts."""
        specs = [specs] if isinstance(specs, dict) else specs or []
        parts = [build(s, f"param_scheduler.{i}") for i, s in enumerate(specs)]
        return cls(base_lr, parts, iterations_per_epoch, last, tokens)

    def __call__(self, iteration: int) -> float:
        """Rate of the step of iteration `iteration` (from 0); not negative."""
        stretch = bisect_right(self._edges, iteration) - 1
        if stretch < 0:
            return float(self.base_lr)
        while len(self._entries) <= stretch:
            done = len(self._entries) - 1
            self._entries.append(self._rate(done, self._edges[done + 1] - 1))
        return max(float(self._rate(stretch, iteration)), 0.0)

    def _rate(self, stretch: int, iteration: int) -> float:
        before, active, rate = self._edges[stretch] - 1, self._active[stretch], self._entries[stretch]
        if len(active) == 1 or all(part.multiplies for part, _ in active):
            for part, begin in active:
                rate = part.advance(rate, before - begin, iteration - begin, self.base_lr)
            return rate
        # a cosine and other schedulers in the same iterations have no closed expression; 10^6 iterations take 3 s
        if before < self._walked[0] <= iteration:
            before, rate = self._walked
        for i in range(before + 1, iteration + 1):
            for part, begin in active:
                rate = part.advance(rate, i - 1 - begin, i - begin, self.base_lr)
        self._walked = (iteration, rate)
        return rate

    def remarks(self, last: int) -> Iterator[str]:
        """Warnings about the schedule in a run of `last` iterations."""
        for i, part in enumerate(self.parts):
            if remark := part.remark(last):
                yield f"param_scheduler.{i} ({type(part).__name__}) {remark}"
