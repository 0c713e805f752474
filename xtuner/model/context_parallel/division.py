"""Which heads, and which queries of them, each of the ranks computes that share documents."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class HeadShare:
    """The heads that one rank computes in one turn: every key-value head has the same number of query heads.

    Args:
        part, parts: which part of each document's queries it computes; all of them if `parts` is 1.
    """

    queries: slice
    keys: slice
    part: int = 0
    parts: int = 1

    @property
    def num_queries(self) -> int:
        return self.queries.stop - self.queries.start

    @property
    def num_keys(self) -> int:
        return self.keys.stop - self.keys.start


def divide_heads(num_heads: int, num_kv_heads: int, ranks: int, divide_queries: bool = False) -> list[HeadShare]:
    """The heads of each rank, about equally many.

    Args:
        divide_queries: with more ranks than query heads, whether ranks divide a head's queries; else some have none.
    """
    groups = num_heads // num_kv_heads
    if ranks <= num_kv_heads:
        keys = _cut(0, num_kv_heads, ranks)
        return [HeadShare(slice(k.start * groups, k.stop * groups), k) for k in keys]
    found = []
    if ranks > num_heads and divide_queries:
        for head, copies in enumerate(_cut(0, ranks, num_heads)):
            count, kv = copies.stop - copies.start, head // groups
            found += [HeadShare(slice(head, head + 1), slice(kv, kv + 1), part, count) for part in range(count)]
        return found
    for kv, copies in enumerate(_cut(0, ranks, num_kv_heads)):
        for queries in _cut(kv * groups, (kv + 1) * groups, copies.stop - copies.start):
            none = queries.start == queries.stop
            found.append(HeadShare(queries, slice(kv, kv if none else kv + 1)))
    return found


def _cut(begin: int, end: int, parts: int) -> list[slice]:
    """[begin, end) in parts whose lengths differ by at most one, the longer ones first."""
    size, more = divmod(end - begin, parts)
    borders = [begin + i * size + min(i, more) for i in range(parts + 1)]
    return [slice(a, b) for a, b in pairwise(borders)]


def divide_turns(share: HeadShare, turns: int) -> list[HeadShare]:
    """A rank's heads in turns of complete key-value heads; later turns may be empty."""
    if not share.num_keys or turns == 1:
        return [share] * turns
    groups = share.num_queries // share.num_keys
    first = share.queries.start - share.keys.start * groups
    return [
        HeadShare(slice(first + k.start * groups, first + k.stop * groups), k)
        for k in _cut(share.keys.start, share.keys.stop, turns)
    ]


@dataclass(frozen=True)
class Queries:
    """The queries of one part of every shared document, in the order of the tokens.

    Args:
        ranges: [begin, end) of the S tokens, ascending: an early and a late one of each document.
        documents: first token of the document of each range; its keys are those from there to the range's end.
    """

    ranges: list[tuple[int, int]]
    documents: list[int]

    @property
    def keys(self) -> list[tuple[int, int]]:
        return [(first, end) for first, (_, end) in zip(self.documents, self.ranges, strict=True)]

    def count_within(self, begin: int, count: int) -> int:
        return sum(end - start for start, end in self.ranges_within(begin, count))

    def ranges_within(self, begin: int, count: int) -> list[tuple[int, int]]:
        """The parts of the ranges inside [begin, begin + count), relative to `begin`."""
        cut = [(max(a, begin) - begin, min(b, begin + count) - begin) for a, b in self.ranges]
        return [(a, b) for a, b in cut if a < b]


def divide_queries(borders: Sequence[int], part: int, parts: int) -> Queries:
    """Of 2·parts consecutive ranges of each document, number `part` from the beginning and from the end."""
    ranges, documents = [], []
    for first, last in pairwise(borders):
        cuts = [first + (last - first) * i // (2 * parts) for i in range(2 * parts + 1)]
        for i in (part, 2 * parts - 1 - part):
            if cuts[i] < cuts[i + 1]:
                ranges.append((cuts[i], cuts[i + 1]))
                documents.append(first)
    return Queries(ranges, documents)
