"""Which source of a mixture each pack comes from: a periodic sequence in which shares are exact at every prefix.

    shares 3/5, 2/5     a b a b a │ a b a b a │ …      a period of 5 packs, repeated

In the first n packs every source has fewer than one pack more or less than n times its share. The sequence is a table
of one period, so that the n-th pack is found without looking at those before it. Where shares change at some pack, a
sequence of its own begins there.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from xtuner.data.format.bin_file import Int64s

MOST = 2**16  # packs of a period; shares without so small a common denominator are rounded to multiples of 1 / MOST
NEVER = 2**62  # the position of a pack of a source that has no share (any more)


class SourceSequence(Protocol):
    """The sources of packs 0, 1, 2, … without end."""

    def locate(self, packs: Int64s) -> tuple[Int64s, Int64s]:
        """(source of each of these packs, its number among all packs of that source), from 0."""

    def counts(self, packs: int) -> Int64s:
        """Packs of each source among the first `packs`."""

    def position(self, source: int, number: int) -> int:
        """The position of a source's pack `number` in the sequence, or NEVER."""


@dataclass(frozen=True)
class PeriodicSequence:
    """See `SourceSequence`.

    Args:
        slots: packs of each source in a period, int64 [sources].
        sources: of each pack of a period, [period].
        turns: number of that pack among those of its source in the period, [period].
        positions: of each source's packs in the period.
    """

    slots: Int64s
    sources: npt.NDArray[np.uint16]
    turns: npt.NDArray[np.uint32]
    positions: tuple[Int64s, ...]

    @property
    def period(self) -> int:
        return len(self.sources)

    def locate(self, packs: Int64s) -> tuple[Int64s, Int64s]:
        """See `SourceSequence`, as of all methods."""
        periods, inside = np.divmod(packs, self.period)
        sources = self.sources[inside].astype(np.int64)
        return sources, periods * self.slots[sources] + self.turns[inside]

    def counts(self, packs: int) -> Int64s:
        periods, inside = divmod(packs, self.period)
        return periods * self.slots + np.array([np.searchsorted(p, inside) for p in self.positions], np.int64)

    def position(self, source: int, number: int) -> int:
        if not self.slots[source]:
            return NEVER
        periods, inside = divmod(number, int(self.slots[source]))
        return periods * self.period + int(self.positions[source][inside])


@dataclass(frozen=True)
class ScheduledSequence:
    """Sequences that follow each other; see `SourceSequence`.

    Args:
        begins: the first pack of each, from 0, int64 [sequences].
    """

    begins: Int64s
    parts: tuple[PeriodicSequence, ...]

    @cached_property
    def _before(self) -> Int64s:
        """Packs of each source before each sequence, [sequences, sources]."""
        lengths = np.diff(self.begins).tolist()
        inside = [part.counts(n) for part, n in zip(self.parts, lengths, strict=False)]
        return np.cumsum([np.zeros_like(self.parts[0].slots), *inside], axis=0)

    def locate(self, packs: Int64s) -> tuple[Int64s, Int64s]:
        numbers = np.searchsorted(self.begins, packs, "right") - 1
        sources, turns = np.empty((2, len(packs)), np.int64)
        for i in np.unique(numbers):
            taken = numbers == i
            found, turn = self.parts[i].locate(packs[taken] - self.begins[i])
            sources[taken], turns[taken] = found, turn + self._before[i][found]
        return sources, turns

    def counts(self, packs: int) -> Int64s:
        i = int(np.searchsorted(self.begins, packs, "right")) - 1
        return self._before[i] + self.parts[i].counts(packs - int(self.begins[i]))

    def position(self, source: int, number: int) -> int:
        i = int(np.searchsorted(self._before[:, source], number, "right")) - 1
        found = self.parts[i].position(source, number - int(self._before[i, source]))
        return NEVER if found == NEVER else int(self.begins[i]) + found


def follow(begins: Sequence[int], parts: Sequence[PeriodicSequence]) -> SourceSequence:
    """These sequences, each from its first pack on."""
    return parts[0] if len(parts) == 1 else ScheduledSequence(np.array(begins, np.int64), tuple(parts))


def divide_period(shares: Sequence[Fraction]) -> list[int]:
    """Packs of each source in a period: the smallest exact one, else the nearest one of MOST packs. May contain 0."""
    total = sum(shares)
    exact = [share / total for share in shares]
    period = math.lcm(*(share.denominator for share in exact))
    if period <= MOST:
        return [int(share * period) for share in exact]
    slots = [math.floor(share * MOST) for share in exact]
    by_rest = sorted(range(len(exact)), key=lambda i: slots[i] - exact[i] * MOST)
    for i in by_rest[: MOST - sum(slots)]:
        slots[i] += 1
    return slots


def arrange(slots: Sequence[int]) -> PeriodicSequence:
    """The sequence of a period with this number of packs of each source.

    Pack j of a source with a of D slots may come from position floor(j D / a) on and must come before
    ceil((j + 1) D / a): within these windows its count stays within one of its share. Of the packs that may come, that
    which must come first is taken: with shares that add up to 1, this meets every window (Baruah et al., 1996).
    """
    period = sum(slots)
    sources, turns = np.zeros(period, np.uint16), np.zeros(period, np.uint32)
    waiting = [(0, s, 0) for s in range(len(slots)) if slots[s]]  # (first position, source, turn)
    ready: list[tuple[int, int, int]] = []  # (position before which it must come, source, turn)
    for position in range(period):
        while waiting and waiting[0][0] <= position:
            _, s, turn = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(turn + 1) * period // slots[s]), s, turn))
        _, s, turn = heapq.heappop(ready)
        sources[position], turns[position] = s, turn
        if turn + 1 < slots[s]:
            heapq.heappush(waiting, ((turn + 1) * period // slots[s], s, turn + 1))
    places = tuple(np.flatnonzero(sources == s) for s in range(len(slots)))
    return PeriodicSequence(np.array(slots, np.int64), sources, turns, places)
