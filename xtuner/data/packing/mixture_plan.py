"""What an epoch of a mixture takes from each source: where it ends, and how often each source is visited."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Literal

from xtuner.core.errors import ConfigError
from xtuner.data.packing.source_shares import (
    MOST,
    NEVER,
    PeriodicSequence,
    SourceSequence,
    arrange,
    divide_period,
    follow,
)

KEY = "train_dataloader.dataset.dataset_cfg"
EpochEnd = Literal["first", "all"]


@dataclass(frozen=True)
class Phase:
    """Shares of the packs, one for each source, from an iteration on; key: the setting that says so."""

    iteration: int
    shares: tuple[Fraction, ...]
    key: str


@dataclass(frozen=True)
class EpochShare:
    """What an epoch takes of one source.

    Args:
        requested: its share of the packs, by the weights; obtained: that of the epoch.
        packs: of the epoch; available: packs that it has.
    """

    name: str
    requested: float
    obtained: float
    packs: int
    available: int

    @property
    def visits(self) -> float:
        return self.packs / self.available


@dataclass(frozen=True)
class MixturePlan:
    """The packs of a mixture's epoch.

    Args:
        names: of the sources.
        first_pack: number of each source's first pack, and the number of all packs, [sources + 1].
        phases: the shares, from iteration 0 on, and packs_per_iteration, which converts their iterations into packs.
        last: the source whose end is the end of the epoch; passes: how often the epoch visits it.
        packs: of an epoch, before they are divided over ranks.
        problem: why there can be no such epoch. With a schedule it may depend on packs_per_iteration, which only a
            checkpoint to resume decides.
    """

    names: tuple[str, ...]
    first_pack: tuple[int, ...]
    phases: tuple[Phase, ...]
    packs_per_iteration: int
    sequence: SourceSequence
    last: int
    passes: int
    packs: int
    problem: ConfigError | None

    def require_possible(self) -> None:
        """Raises: ConfigError for repeats or a schedule that are impossible."""
        if self.problem:
            raise self.problem

    def packs_of(self, source: int) -> int:
        return self.first_pack[source + 1] - self.first_pack[source]

    def source_of(self, pack: int) -> int:
        return bisect_right(self.first_pack, pack) - 1

    def epoch_shares(self, packs: int) -> list[EpochShare]:
        """What the first `packs` packs of an epoch take of each source."""
        ends = [*(p.iteration * self.packs_per_iteration for p in self.phases[1:]), packs]
        lengths = [b - a for a, b in pairwise([0, *ends])]
        found = []
        for s, count in enumerate(self.sequence.counts(packs).tolist()):
            due = sum(phase.shares[s] * n for phase, n in zip(self.phases, lengths, strict=True))
            found.append(EpochShare(self.names[s], float(due / packs), count / packs, count, self.packs_of(s)))
        return found

    def describe(self, packs: int, packed_length: int) -> list[str]:
        """The first `packs` packs of an epoch, its end, each source and each change of the shares, a line each."""
        lines = [f"{packs:,} packs an epoch, which ends with source {self.names[self.last]!r}"]
        for part in self.epoch_shares(packs):
            lines.append(
                f"{part.name}: {part.requested:.2%} of packs, {part.packs:,} of an epoch, {part.obtained:.2%} "
                f"({part.packs * packed_length:,} tokens), {part.visits:.2f} times its {part.available:,}"
            )
        return lines + (self.describe_phases() if len(self.phases) > 1 else [])

    def describe_phases(self) -> list[str]:
        found = []
        for phase in self.phases:
            shares = ", ".join(f"{n} {float(share):.2%}" for n, share in zip(self.names, phase.shares, strict=True))
            found.append(f"from iteration {phase.iteration:,} on: {shares}")
        return found


@dataclass(frozen=True)
class SourcePacks:
    """
    Args:
        max_repeats: how often an epoch may visit its packs; None: once, or with epoch="all" any number of times.
    """

    name: str
    packs: int
    max_repeats: int | None


def plan_epoch(
    sources: Sequence[SourcePacks], phases: Sequence[Phase], packs_per_iteration: int, epoch: EpochEnd
) -> MixturePlan:
    """Raises: ConfigError for shares that are too small. Others: `MixturePlan.require_possible`."""
    begins = [phase.iteration * packs_per_iteration for phase in phases]
    sequence = follow(begins, [_arrange(sources, phase) for phase in phases])
    problem: ConfigError | None = None
    if epoch == "first":
        limits = [s.max_repeats or 1 for s in sources]
        ends = [sequence.position(i, s.packs * limits[i]) for i, s in enumerate(sources)]
        last = ends.index(min(ends))
        passes, length = limits[last], ends[last]
    else:
        ends = [sequence.position(i, s.packs - 1) for i, s in enumerate(sources)]
        last = ends.index(max(ends))
        passes, length = 1, ends[last] + 1
        problem = _find_wrong_visits(sources, sequence, last, ends[last])
    problem = problem or _find_unreached(phases, length // packs_per_iteration, packs_per_iteration, sources[last].name)
    names = tuple(s.name for s in sources)
    first_pack = (0, *accumulate(s.packs for s in sources))
    return MixturePlan(names, first_pack, tuple(phases), packs_per_iteration, sequence, last, passes, length, problem)


def _find_unreached(phases: Sequence[Phase], iterations: int, each: int, last: str) -> ConfigError | None:
    """A change of the schedule that an epoch of so many iterations does not reach."""
    phase = next((phase for phase in phases if phase.iteration and phase.iteration >= iterations), None)
    if phase is None:
        return None
    return ConfigError(
        f"iteration {phase.iteration:,} of the schedule is never reached: an epoch has {iterations:,} iterations, "
        f"{each:,} packs each",
        where=f"{phase.key}.iteration",
        do=f"lower it, leave the entry out, or raise max_repeats of {last!r}, whose end is the end of the epoch",
    )


def _find_wrong_visits(
    sources: Sequence[SourcePacks], sequence: SourceSequence, last: int, end: int
) -> ConfigError | None:
    """Why an epoch cannot visit all of source `last`, at `end`: it is endless, or repeats another source too often."""
    name = sources[last].name
    if end == NEVER:
        return ConfigError(
            f"an epoch that visits all sources never ends: the schedule sets the weight of {name!r} to 0 before all of "
            f"its {sources[last].packs:,} packs have been visited",
            where=f"{KEY}.schedule",
            do=f'raise the weight of {name!r} before that, or set epoch = "first"',
        )
    for i, count in enumerate(sequence.counts(end + 1).tolist()):
        most = sources[i].max_repeats
        if most is not None and count > most * sources[i].packs:
            return ConfigError(
                f"an epoch that visits all of {name!r} repeats {sources[i].name!r} "
                f"{count / sources[i].packs:.2f} times, and its max_repeats is {most}",
                where=f"{KEY}.sources.{i}.max_repeats",
                do='raise it, lower the weight of this source, or set epoch = "first"',
            )
    return None


def _arrange(sources: Sequence[SourcePacks], phase: Phase) -> PeriodicSequence:
    slots = divide_period(phase.shares)
    for source, slot, share in zip(sources, slots, phase.shares, strict=True):
        if share and not slot:
            at = f" from iteration {phase.iteration:,} on" if phase.iteration else ""
            raise ConfigError(
                f"the weight of {source.name!r}{at} is less than 1 of {MOST:,} packs",
                where=phase.key,
                do="raise it, or leave the source out",
            )
    return arrange(slots)
