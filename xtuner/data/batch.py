"""What the model sees: one pack, or a part of one cut at document borders."""

from dataclasses import dataclass, replace

import torch

from xtuner.data.pack import IGNORE


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

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def attention_pairs(self) -> int:
        """Σ len² over fragments: what the cost of attention goes with."""
        return int(self.cu_seqlens.diff().long().square().sum())

    def to(self, device: torch.device) -> "Batch":
        """Copy to a device without waiting."""
        if device.type == "cpu":
            return self
        moved = {
            name: getattr(self, name).pin_memory().to(device, non_blocking=True)
            for name in ("input_ids", "targets", "position_ids", "cu_seqlens")
        }
        return replace(self, **moved)
