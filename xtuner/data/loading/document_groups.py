"""Divides documents: those of a pack into micro-batches, those of a micro-batch among ranks (context parallelism).

documents of a micro-batch     A B C D E F G Z
shared                         Z: its tokens are cut into one piece per rank; attention exchanges heads between ranks
local                          the others, each complete on one rank: nothing is exchanged for them

rank 0    Z… A B               all ranks have about the same number of tokens; shared documents are concatenated
rank 1    …Z… C D              and cut anywhere, as their attention is divided by heads
rank 2    …Z E F G
"""

import bisect
import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from xtuner.families.network import ALL_PAIRS, AttentionPairs

MAX_EXCHANGES = 64  # between groups of fragments; a few usually suffice
MAX_SHARED = 64  # documents; with so many of a pack's longest shared, the others are short and easily balanced


@dataclass(frozen=True)
class ContextCosts:
    """Seconds that one rank computes or communicates, forward and backward.

    Args:
        token: products and elementwise kernels of one token.
        pair: attention of two tokens of one document.
        exchanged: sending and receiving the heads of one shared token.
        pairs: their number in a document; n² without sliding windows.
    """

    token: float
    pair: float
    exchanged: float
    pairs: AttentionPairs = ALL_PAIRS

    def attention(self, length: int) -> float:
        """Seconds of one document's attention."""
        return self.pair * float(self.pairs.count(length))


@dataclass(frozen=True)
class DocumentDivision:
    """Which rank computes which documents.

    Args:
        shared: indices of documents that all ranks share, ascending.
        pieces: tokens of these, concatenated, that each rank has.
        local: indices of documents that one rank has alone, ascending, by rank.
    """

    shared: list[int]
    pieces: list[int]
    local: list[list[int]]


def divide_documents(lengths: Sequence[int], ranks: int, costs: ContextCosts) -> DocumentDivision:
    """The division with the least estimated time of the slowest rank, among those that share the m longest documents,
    for every m. It depends on the arguments only: all ranks find the same one. Empty documents are left out."""
    order = sorted((i for i, n in enumerate(lengths) if n), key=lambda i: (-lengths[i], i))
    total, attention = sum(lengths), [costs.attention(n) for n in lengths]
    best, found = float("inf"), DocumentDivision([], [0] * ranks, [[] for _ in range(ranks)])
    for count in range(min(len(order), MAX_SHARED) + 1):
        shared, alone = sorted(order[:count]), sorted(order[count:])
        sent = sum(lengths[i] for i in shared)
        if (costs.token * total + sum(attention) + costs.exchanged * sent) / ranks >= best:
            break  # sharing more cannot be faster: it is no better than perfect balance
        groups = [[alone[j] for j in group] for group in distribute([lengths[i] for i in alone], ranks)]
        tokens = [sum(lengths[i] for i in group) for group in groups]
        pieces = fill_up(tokens, sent)
        slowest = max(
            costs.token * (held + piece) + sum(attention[i] for i in group)
            for group, held, piece in zip(groups, tokens, pieces, strict=True)
        )
        seconds = slowest + (sum(attention[i] for i in shared) + costs.exchanged * sent) / ranks
        if seconds < best:
            best, found = seconds, DocumentDivision(shared, pieces, groups)
    return found


def fill_up(levels: Sequence[int], amount: int) -> list[int]:
    """How much of `amount` to add to each level so that the lowest ones become as equal as possible."""
    order = sorted(range(len(levels)), key=lambda i: (levels[i], i))
    below = 0  # sum of the levels that are filled up
    for count, i in enumerate(order, 1):
        below += levels[i]
        level, rest = divmod(below + amount, count)
        if count == len(order) or level < levels[order[count]]:
            break
    added = [0] * len(levels)
    for position, i in enumerate(order[:count]):
        added[i] = level + (position < rest) - levels[i]
    return added


def distribute(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Indices of `lengths` in `count` groups whose sums are about equal, ascending in each group.

    The longest first, each to the group with the smallest sum; then the largest group repeatedly moves or exchanges the
    element that brings it closest to another group, as long as that reduces the larger sum.
    """
    groups: list[list[int]] = [[] for _ in range(count)]
    sums = [0] * count
    heap = [(0, g) for g in range(count)]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        _, g = heapq.heappop(heap)
        groups[g].append(i)
        sums[g] += lengths[i]
        heapq.heappush(heap, (sums[g], g))
    for _ in range(MAX_EXCHANGES):
        full = max(range(count), key=sums.__getitem__)
        best = (sums[full], full, -1, -1)  # (larger of both sums, other group, index moved there, index moved back)
        for other in range(count):
            if other == full:
                continue
            back = sorted([(lengths[j], j) for j in groups[other]] + [(0, -1)])
            wanted = (sums[full] - sums[other]) / 2
            for i in groups[full]:
                at = bisect.bisect_left(back, (lengths[i] - wanted, -1))
                for length, j in back[max(at - 1, 0) : at + 1]:
                    moved = lengths[i] - length
                    best = min(best, (max(sums[full] - moved, sums[other] + moved), other, i, j))
        larger, other, i, j = best
        if larger >= sums[full]:
            break
        for group, goes, comes in ((full, i, j), (other, j, i)):
            if goes >= 0:
                groups[group].remove(goes)
                sums[group] -= lengths[goes]
            if comes >= 0:
                groups[group].append(comes)
                sums[group] += lengths[comes]
    return [sorted(group) for group in groups]
