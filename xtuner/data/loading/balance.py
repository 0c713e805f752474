"""Assigns packs to iterations and ranks so that the attention cost is balanced.

A pack costs a constant + b · Σ len² over its document fragments, and all ranks of an iteration wait for the slowest.

    stream       p0 p1 p2 p3 │ p4 p5 p6 p7 │ p8 …            an iteration: P packs of all ranks
    window       iterations [0:k], [k:2k], … of the run, or since P or k changed; cut at the end of an epoch
    iterations   k > 1: the packs of a window sorted by cost, P neighbours per iteration        depends on P only
    ranks        an iteration's packs by descending cost, each to the rank with the least cost  depends on P and ranks

With k = 1 every iteration has the same packs as without balancing. No window extends from one epoch into the next, so
that an iteration never contains the same pack twice.
"""

import heapq
from collections.abc import Callable, Iterator
from itertools import count, groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from xtuner.families.network import ALL_PAIRS, AttentionPairs

Ints = npt.NDArray[np.integer[Any]]
Int64s = npt.NDArray[np.int64]
Costs = npt.NDArray[Any]
BLOCK = 2**20  # tokens of packs whose documents are processed together; bounds the memory


def attention_costs(
    ends: Int64s, starts: Ints, packed_length: int, pairs: AttentionPairs = ALL_PAIRS, stops: Ints | None = None
) -> Int64s:
    """Σ len² over the fragments of packs that begin at tokens `starts` of a file whose documents end at `ends`; with
    sliding windows, the pairs that they leave.

    Args:
        stops: where the packs end, if not all are full; padding is a fragment of its own.
    """
    if stops is None:
        stops = starts + packed_length
    found = np.empty(len(starts), np.int64)
    step = max(BLOCK // packed_length, 1)
    for i in range(0, len(starts), step):
        begins, limits = starts[i : i + step], stops[i : i + step]
        first, last = np.searchsorted(ends, begins, "right"), np.searchsorted(ends, limits, "left")
        counts = last - first + 1  # fragments of each pack
        heads = np.cumsum(counts) - counts  # index of each pack's first fragment among all fragments
        inside = np.arange(int(counts.sum())) + np.repeat(first - heads, counts)
        cuts = np.minimum(ends[inside], np.repeat(limits, counts))
        lengths = np.diff(cuts, prepend=0)
        lengths[heads] = cuts[heads] - begins
        found[i : i + step] = np.add.reduceat(pairs.count(lengths), heads)
    return found + pairs.count(packed_length - (stops - starts))


def windows(begin: int, origin: int, packs: int, per_epoch: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Windows from pack `begin` of the stream on: (first pack, iterations, iterations of it that lie before `begin`).

    Args:
        origin: pack of the stream from which windows are counted.
        packs: P.
        per_epoch: packs per epoch; windows are cut at its end, and an iteration with packs of two epochs is a window
            of its own.
        size: k, iterations of a full window.
    """
    done = (begin - origin) // packs
    offset = begin - done * packs

    def epochs(i: int) -> tuple[int, int]:
        """(epoch of an iteration's first pack, of its last pack): the key by which windows are cut."""
        return (offset + i * packs) // per_epoch, (offset + (i + 1) * packs - 1) // per_epoch

    for start in count(done // size * size, size):
        for _, group in groupby(range(start, start + size), epochs):
            together = list(group)
            if together[-1] >= done:
                yield offset + together[0] * packs, len(together), max(done - together[0], 0)


def assign_to_iterations(costs: Costs, packs: int) -> Ints:
    """Indices into a window [iterations, P]: packs of similar cost together, each group in the order of the stream.

    Iterations are ordered by their first packs in the stream, so that their order is independent of the cost.
    """
    groups = np.sort(np.argsort(costs, kind="stable").reshape(-1, packs), axis=1)
    return groups[np.argsort(groups[:, 0])]


def assign_to_ranks(costs: Costs, ranks: int) -> Ints:
    """Indices into an iteration [ranks, packs per rank], each rank's costliest pack first; unchanged for one rank.

    Greedy: the costliest remaining pack goes to the rank with the least cost that needs more packs.
    """
    per_rank = len(costs) // ranks
    if 1 in (per_rank, ranks):
        return np.arange(len(costs)).reshape(ranks, per_rank)
    taken: list[list[int]] = [[] for _ in range(ranks)]
    least = [(0, rank) for rank in range(ranks)]
    for i in np.argsort(-costs, kind="stable").tolist():
        cost, rank = heapq.heappop(least)
        taken[rank].append(i)
        if len(taken[rank]) < per_rank:
            heapq.heappush(least, (cost + costs[i].item(), rank))
    return np.array(taken)


def waiting_share(costs: Costs, time: Callable[[Costs], Costs], ranks: int, each: int = 1, window: int = 0) -> float:
    """Share of an iteration during which the mean rank waits for the slowest, over packs in the order of the stream.

    Args:
        costs: of each pack; those of a last incomplete iteration are left out.
        time: costs → durations, in any unit.
        each: packs per rank.
        window: iterations balanced together; 0: no balancing.
    """
    packs = ranks * each
    costs = costs[: len(costs) // packs * packs]
    if not window:
        dealt = costs.reshape(-1, each, ranks).swapaxes(1, 2)
    else:
        rows = []
        for first in range(0, len(costs), packs * window):
            inside = costs[first : first + packs * window]
            rows += [inside[row][assign_to_ranks(inside[row], ranks)] for row in assign_to_iterations(inside, packs)]
        dealt = np.array(rows)
    times = time(dealt).sum(axis=2)
    return float(1 - times.mean() / times.max(axis=1).mean())
