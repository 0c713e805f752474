"""The input of the model: one pack, or some of its document fragments."""

from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TypeVar

import numpy as np
import torch

from xtuner.data.loading.document_groups import ContextCosts, DocumentDivision, distribute, divide_documents
from xtuner.data.packing.raw_pack import IGNORE, LabelRule, RawPack


@dataclass(frozen=True)
class SharedTokens:
    """The documents of a micro-batch that several ranks share (document_groups.py): S tokens, concatenated.

    The row of a rank begins with its piece of them; complete documents follow.
    """

    borders: tuple[int, ...]  # of the shared documents, from 0 to S
    cu_seqlens: torch.Tensor  # the same, int32 [m + 1]
    max_seqlen: int
    pieces: tuple[int, ...]  # tokens of each rank; their sum is S
    largest_row: int  # tokens of the longest row of all ranks: they decide alike what the backward exchanges again
    row_borders: (
        torch.Tensor
    )  # int32 [k + 1], of all fragments in this rank's row: parts of shared documents, and others
    row_lengths: torch.Tensor  # int32 [k], length of the document of each fragment


@dataclass(frozen=True)
class Batch:
    """T tokens of n concatenated document fragments.

    `num_targets` is the number of positions with a target; `pack` is the pack's number, for messages and replays;
    `source` is the number of its source in a mixture.
    With `shared`, the first tokens are this rank's piece of shared documents, and `cu_seqlens` has the others.
    """

    input_ids: torch.Tensor  # int64 [T]
    targets: torch.Tensor  # int64 [T], already shifted, -100 without loss
    position_ids: torch.Tensor  # int64 [T], from 0 in each fragment
    cu_seqlens: torch.Tensor  # int32 [n + 1], fragment borders from 0 to T
    max_seqlen: int  # longest fragment
    num_targets: int
    pack: int = -1
    shared: SharedTokens | None = None
    source: int = 0

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
    def from_raw(cls, raw: RawPack, rule: LabelRule, number: int = -1, pin: bool = False, source: int = 0) -> "Batch":
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
            source=source,
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

    def _dummy(self, most: int = 16) -> "Batch":
        """Dummy micro-batch without targets, so that this rank joins the same collectives as the others."""
        tokens = slice(0, min(self.num_tokens, most))
        ids = self.input_ids[tokens]
        borders = torch.tensor([0, len(ids)], dtype=torch.int32)
        positions = torch.arange(len(ids))
        return Batch(ids, torch.full_like(ids, IGNORE), positions, borders, len(ids), 0, self.pack)

    def _part(self, chosen: list[int]) -> "Batch":
        """The chosen fragments, in ascending order."""
        borders = self.cu_seqlens.tolist()
        lengths = [borders[i + 1] - borders[i] for i in chosen]
        return self._take([(borders[i], n) for i, n in zip(chosen, lengths, strict=True)], lengths)

    def _take(self, ranges: list[tuple[int, int]], lengths: list[int], shared: SharedTokens | None = None) -> "Batch":
        """The tokens of ranges (first, count), of which the last are complete fragments of these lengths."""
        tokens = torch.cat([torch.arange(first, first + count) for first, count in ranges])
        targets = self.targets[tokens]
        return replace(
            self,
            input_ids=self.input_ids[tokens],
            targets=targets,
            position_ids=self.position_ids[tokens],
            cu_seqlens=make_borders(lengths),
            max_seqlen=max(lengths, default=0),
            num_targets=int((targets != IGNORE).sum()),
            shared=shared,
        )

    def share(self, ranks: int, rank: int, costs: ContextCosts) -> "Batch":
        """What one of the ranks that share this micro-batch computes. A rank without tokens gets one without target."""
        borders = self.cu_seqlens.tolist()
        lengths = [end - begin for begin, end in pairwise(borders)]
        division = divide_documents(lengths, ranks, costs)
        begin = sum(division.pieces[:rank])
        fragments = cut_range([(borders[i], lengths[i]) for i in division.shared], begin, division.pieces[rank])
        fragments += [(borders[i], lengths[i], lengths[i]) for i in division.local[rank]]
        if not fragments:
            return replace(self._dummy(1), shared=self._shared_tokens(division, [(0, 1, 1)], lengths))
        ranges, local = [(first, count) for first, count, _ in fragments], [lengths[i] for i in division.local[rank]]
        return self._take(ranges, local, self._shared_tokens(division, fragments, lengths))

    def _shared_tokens(
        self, division: DocumentDivision, fragments: list[tuple[int, int, int]], lengths: list[int]
    ) -> SharedTokens | None:
        if not division.shared:
            return None
        shared = [lengths[i] for i in division.shared]
        return SharedTokens(
            borders=(0, *accumulate(shared)),
            cu_seqlens=make_borders(shared),
            max_seqlen=max(shared),
            pieces=tuple(division.pieces),
            largest_row=max(
                piece + sum(lengths[i] for i in local)
                for piece, local in zip(division.pieces, division.local, strict=True)
            ),
            row_borders=make_borders([count for _, count, _ in fragments]),
            row_lengths=torch.tensor([length for _, _, length in fragments], dtype=torch.int32),
        )

    def to(self, device: torch.device) -> "Batch":
        """Copy to a device asynchronously."""
        if device.type == "cpu":
            return self
        shared = self.shared and copy_tensors(self.shared, device, "cu_seqlens", "row_borders", "row_lengths")
        batch = copy_tensors(self, device, "input_ids", "targets", "position_ids", "cu_seqlens")
        return replace(batch, shared=shared)


R = TypeVar("R", Batch, SharedTokens)


def copy_tensors(record: R, device: torch.device, *names: str) -> R:
    """Copy the named fields to a GPU asynchronously."""
    pinned = {n: t if (t := getattr(record, n)).is_pinned() else t.pin_memory() for n in names}
    return replace(record, **{n: t.to(device, non_blocking=True) for n, t in pinned.items()})


def make_borders(lengths: list[int]) -> torch.Tensor:
    """int32 [n + 1], from 0."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def cut_range(documents: list[tuple[int, int]], begin: int, count: int) -> list[tuple[int, int, int]]:
    """The part [begin, begin + count) of concatenated documents, as (first token, tokens, length of the document).

    Args:
        documents: (first token in the pack, length).
    """
    found = []
    for first, length in documents:
        low, high = max(begin, 0), min(begin + count, length)
        if low < high:
            found.append((first + low, high - low, length))
        begin -= length
    return found
