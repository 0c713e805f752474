"""What the model sees: one pack, or a part of one cut at document borders."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from xtuner.data.pack import IGNORE, LabelRule, RawPack


@dataclass(frozen=True)
class Batch:
    """T tokens of n document fragments laid end to end.

    `num_targets` counts the positions with a target; `pack` is the pack's number, for messages and replays.
    """

    input_ids: torch.Tensor  # int64 [T]
    targets: torch.Tensor  # int64 [T], already shifted, -100 where there is no loss
    position_ids: torch.Tensor  # int64 [T], from 0 in each fragment
    cu_seqlens: torch.Tensor  # int32 [n + 1], fragment borders from 0 to T
    max_seqlen: int  # longest fragment
    num_targets: int
    pack: int = -1

    @classmethod
    def of(cls, pack: dict[str, torch.Tensor], number: int = -1) -> "Batch":
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
    def of_raw(cls, raw: RawPack, rule: LabelRule, number: int = -1, pin: bool = False) -> "Batch":
        """From what `PackedDataset.raw` gives. `pin`: in memory from which a GPU copies without waiting."""
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
        """Σ len² over fragments: what the cost of attention goes with."""
        return int(self.cu_seqlens.diff().long().square().sum())

    def num_parts(self, most: int) -> int:
        """How many parts of at most `most` tokens there are, cut at fragment borders; a longer fragment is one."""
        return 1 if self.num_tokens <= most else len(_cut(self.cu_seqlens.diff().tolist(), most))

    def split(self, count: int) -> list["Batch"]:
        """So many parts, cut at fragment borders, about equally long; where fragments are too few, idle ones follow."""
        if count == 1:
            return [self]
        lengths = self.cu_seqlens.diff().tolist()
        low, high = 1, self.num_tokens  # the least capacity that needs no more parts
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if len(_cut(lengths, middle)) <= count else (middle + 1, high)
        parts = [self._part(begin, end) for begin, end in _cut(lengths, high)]
        return parts + [self._idle()] * (count - len(parts))

    def _idle(self) -> "Batch":
        """Some tokens to go through the motions with, where other ranks have another part."""
        tokens = slice(0, min(self.num_tokens, 16))
        ids = self.input_ids[tokens]
        borders = torch.tensor([0, len(ids)], dtype=torch.int32)
        positions = torch.arange(len(ids))
        return Batch(ids, torch.full_like(ids, IGNORE), positions, borders, len(ids), 0, self.pack)

    def _part(self, begin: int, end: int) -> "Batch":
        """Fragments `begin` to `end`."""
        borders = self.cu_seqlens[begin : end + 1]
        tokens = slice(int(borders[0]), int(borders[-1]))
        targets = self.targets[tokens]
        return replace(
            self,
            input_ids=self.input_ids[tokens],
            targets=targets,
            position_ids=self.position_ids[tokens],
            cu_seqlens=borders - borders[0],
            max_seqlen=int(borders.diff().max()),
            num_targets=int((targets != IGNORE).sum()),
        )

    def to(self, device: torch.device) -> "Batch":
        """Copy to a device without waiting."""
        if device.type == "cpu":
            return self
        names = ("input_ids", "targets", "position_ids", "cu_seqlens")
        pinned = {n: t if (t := getattr(self, n)).is_pinned() else t.pin_memory() for n in names}
        return replace(self, **{n: t.to(device, non_blocking=True) for n, t in pinned.items()})


def _cut(lengths: list[int], capacity: int) -> list[tuple[int, int]]:
    """Consecutive fragments, filled up one part after another: (first, end) of each."""
    parts, begin, held = [], 0, 0
    for i, length in enumerate(lengths):
        if held and held + length > capacity:
            parts.append((begin, i))
            begin, held = i, 0
        held += length
    return [*parts, (begin, len(lengths))]
