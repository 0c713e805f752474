"""The input of the model: one pack, or some of its document fragments."""

import bisect
import heapq
from dataclasses import dataclass, replace

import numpy as np
import torch

from xtuner.data.packing.pack import IGNORE, LabelRule, RawPack

MAX_EXCHANGES = 64  # between groups of fragments; a few usually suffice


@dataclass(frozen=True)
class Batch:
    """T tokens of n concatenated document fragments.

    `num_targets` is the number of positions with a target; `pack` is the pack's number, for messages and replays.
    """

    input_ids: torch.Tensor  # int64 [T]
    targets: torch.Tensor  # int64 [T], already shifted, -100 without loss
    position_ids: torch.Tensor  # int64 [T], from 0 in each fragment
    cu_seqlens: torch.Tensor  # int32 [n + 1], fragment borders from 0 to T
    max_seqlen: int  # longest fragment
    num_targets: int
    pack: int = -1

    @classmethod
    def from_item(cls, pack: dict[str, torch.Tensor], number: int = -1) -> "Batch":
        """From an item of `PackedDataset`."""
        cu_seqlens, targets = pack["cumulative_len"], pack["targets"]
        return cls(
            input_ids=pack["input_ids"],
            targets=targets,
            position_ids=pack["position_ids"],
            cu_seqlens=cu_seqlens,
            max_seqlen=int(cu_seqlens.diff().max()),
            num_targets=int((targets != IGNORE).sum()),
            pack=number,
        )

    @classmethod
    def from_raw(cls, raw: RawPack, rule: LabelRule, number: int = -1, pin: bool = False) -> "Batch":
        """From the result of `PackedDataset.raw`. `pin`: in pinned memory, for asynchronous copies to a GPU."""
        block = torch.empty((3, len(raw.signed)), dtype=torch.int64, pin_memory=pin)
        input_ids, targets, position_ids = block.numpy()
        raw.input_ids(input_ids)
        num_targets = raw.targets(rule, targets)
        raw.position_ids(position_ids)
        borders = torch.from_numpy(raw.borders)
        return cls(
            input_ids=block[0],
            targets=block[1],
            position_ids=block[2],
            cu_seqlens=borders.pin_memory() if pin else borders,
            max_seqlen=int(np.diff(raw.borders).max()),
            num_targets=num_targets,
            pack=number,
        )

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def attention_pairs(self) -> int:
        """Σ len² over fragments, to which the cost of attention is proportional."""
        return int(self.cu_seqlens.diff().long().square().sum())

    def num_parts(self, most: int) -> int:
        """Smallest number of parts of complete fragments with at most `most` tokens; a longer fragment is alone."""
        lengths = self.cu_seqlens.diff().tolist()

        def fits(group: list[int]) -> bool:
            found = [lengths[i] for i in group]
            return sum(found) <= max([most, *found])

        count = -(-sum(min(n, most) for n in lengths) // most)  # a lower bound
        while not all(map(fits, distribute(lengths, count))):
            count += 1
        return count

    def split(self, count: int) -> list["Batch"]:
        """`count` parts of complete fragments, about equally long; if there are too few fragments, dummies follow.

        The part with the most attention comes first: ranks that synchronise in every part wait least if all compute
        their costly parts at the same time.
        """
        if count == 1:
            return [self]
        lengths = self.cu_seqlens.diff().tolist()
        groups = distribute(lengths, count)
        parts = [self._part(group) for group in groups if any(lengths[i] for i in group)]  # documents may be empty
        parts.sort(key=lambda part: -part.attention_pairs)
        return parts + [self._dummy()] * (count - len(parts))

    def _dummy(self) -> "Batch":
        """Dummy micro-batch without targets, so that this rank joins the same collectives as the others."""
        tokens = slice(0, min(self.num_tokens, 16))
        ids = self.input_ids[tokens]
        borders = torch.tensor([0, len(ids)], dtype=torch.int32)
        positions = torch.arange(len(ids))
        return Batch(ids, torch.full_like(ids, IGNORE), positions, borders, len(ids), 0, self.pack)

    def _part(self, chosen: list[int]) -> "Batch":
        """The chosen fragments, in ascending order."""
        borders = self.cu_seqlens.tolist()
        lengths = torch.tensor([borders[i + 1] - borders[i] for i in chosen])
        tokens = torch.cat([torch.arange(borders[i], borders[i + 1]) for i in chosen])
        targets = self.targets[tokens]
        return replace(
            self,
            input_ids=self.input_ids[tokens],
            targets=targets,
            position_ids=self.position_ids[tokens],
            cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(self.cu_seqlens.dtype),
            max_seqlen=int(lengths.max()),
            num_targets=int((targets != IGNORE).sum()),
        )

    def to(self, device: torch.device) -> "Batch":
        """Copy to a device asynchronously."""
        if device.type == "cpu":
            return self
        names = ("input_ids", "targets", "position_ids", "cu_seqlens")
        pinned = {n: t if (t := getattr(self, n)).is_pinned() else t.pin_memory() for n in names}
        return replace(self, **{n: t.to(device, non_blocking=True) for n, t in pinned.items()})


def distribute(lengths: list[int], count: int) -> list[list[int]]:
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
