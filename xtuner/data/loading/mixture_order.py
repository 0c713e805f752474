"""The order in which a run visits the packs of a mixture.

    source of the n-th pack of an epoch     packing/source_shares.py
    which of that source's packs            its own permutations, one for each pass over the source

Each source has its own stream, `RandomState(seed + pass).permutation(packs of the source)` for pass 0, 1, 2, … end to
end. The source whose end is the end of the epoch begins a pass with each epoch; all others continue where the epoch
before has stopped, so that no pack is left out. With a single source this is the stream of its packs without a mixture.
"""

import functools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from xtuner.data.format.bin_file import Int64s
from xtuner.data.packing.mixture import MixturePlan

Permutation = Callable[[int, int], npt.NDArray[np.integer]]  # (source, pass) → the order of its packs
KEPT = 2  # permutations of each source that are kept: those around the end of a pass,
SMALL = 2**16  # and of small sources, which have many passes, those of this many packs: 256 kB


class MixtureOrder:
    """
    Args:
        permutation: the packs of a source, numbered from 0 in it, in the order of a pass.
    """

    def __init__(self, plan: MixturePlan, permutation: Permutation) -> None:
        self.plan = plan
        self._permutation = permutation
        self._sizes = np.diff(plan.first_pack)
        self._kept: list[dict[int, npt.NDArray[np.integer]]] = [{} for _ in plan.names]

    def locate(self, epoch: int, offsets: Int64s, per_epoch: int) -> tuple[Int64s, Int64s, Int64s]:
        """(source, pass over it, offset in that pass) of packs at these offsets of an epoch of `per_epoch` packs."""
        plan = self.plan
        sources, turns = plan.sequence.locate(offsets)
        before = self._each_epoch(per_epoch) * epoch  # packs of each source in the epochs before
        passes, inside = np.divmod(before[sources] + turns, self._sizes[sources])
        return sources, passes, inside

    @functools.lru_cache(2)  # noqa: B019
    def _each_epoch(self, per_epoch: int) -> Int64s:
        """By how many packs of its stream each source is further when an epoch has ended."""
        found = self.plan.sequence.counts(per_epoch)
        found[self.plan.last] = self.plan.passes * self._sizes[self.plan.last]
        return found

    def visits(self, epoch: int, offset: int, per_epoch: int) -> list[float]:
        """How often each source has been visited by all packs before a position."""
        counts = self.plan.sequence.counts(per_epoch) * epoch + self.plan.sequence.counts(offset)
        return (counts / self._sizes).tolist()

    def numbers(self, epoch: int, offsets: Int64s, per_epoch: int, reshuffle: bool = True) -> Int64s:
        """Numbers of the packs at these offsets of an epoch."""
        found = np.empty(len(offsets), np.int64)
        sources, passes, inside = self.locate(epoch, offsets, per_epoch)
        for source, one_pass in sorted({*zip(sources.tolist(), passes.tolist(), strict=True)}):
            taken = (sources == source) & (passes == one_pass)
            order = self._order(source, one_pass if reshuffle else 0)
            found[taken] = order[inside[taken]].astype(np.int64) + self.plan.first_pack[source]
        return found

    def _order(self, source: int, one_pass: int) -> npt.NDArray[np.integer]:
        kept = self._kept[source]
        if one_pass not in kept:
            if len(kept) >= max(KEPT, SMALL // int(self._sizes[source])):
                del kept[next(iter(kept))]
            kept[one_pass] = self._permutation(source, one_pass)
        return kept[one_pass]
