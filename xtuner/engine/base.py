"""The contract between the loop and whatever runs forward, backward and step.

After an iteration's `forward_backward`, gradients are the sum over all learned targets of all ranks and micro-batches,
divided by their number, whatever an engine averages by itself. Weights have fp32 masters; checkpoints keep those.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from xtuner.data.loading.batch import Batch
from xtuner.engine.memory import Memory
from xtuner.engine.state.snapshot import Snapshot
from xtuner.model.decoder import CausalLM


class Strategy(Protocol):
    """One way to train: our own on any mesh, or DeepSpeed."""

    name: str
    device: torch.device
    compute_dtype: torch.dtype
    memory: Memory  # what is known of it before the first step

    @property
    def model(self) -> CausalLM:
        """The network as it computes, for sampling and evaluation."""

    def parts(self, batch: Sequence[Batch]) -> list[int]:
        """How many micro-batches this rank's memory needs each pack cut into."""

    def forward_backward(
        self, batch: Sequence[Batch], num_targets: int, parts: Sequence[int] | None = None, iteration: int = 0
    ) -> float:
        """One iteration's packs on this rank. Our own strategy repeats it with less memory where that ran out, as long
        as there is a way to.

        Args:
            num_targets: of all ranks; when 0, nothing is computed.
            parts: micro-batches to cut each pack into, on all ranks the same: the most that any of them needs. None:
                what this rank needs.
            iteration: its number, for messages.

        Returns the mean loss over all targets of all ranks, in nats: the same number on every rank; 0 without targets.
        """

    def step(self, lr: float, max_norm: float | None) -> tuple[float, bool]:
        """Clip to `max_norm` and update the weights.

        Returns (gradient norm before clipping, whether the step was applied). A step with a non-finite norm, or after
        an iteration without targets, is not applied.
        """

    def reserve(self, optimizer: bool) -> None:
        """Begin to take the host memory that snapshots need, beside training. To be called after the first step."""

    def snapshot(self, optimizer: bool) -> Snapshot:
        """This rank's part of a checkpoint, copied to host memory: `weights/` (a Hugging Face folder of fp32 masters)
        and, if asked, `optimizer/`. The copy of an earlier snapshot may be overwritten. All ranks call it together."""

    def load(self, folder: Path) -> None:
        """Restore what a snapshot with the optimizer has written, bit for bit."""

    def load_weights(self, folder: Path) -> None:
        """Take over the weights of a Hugging Face folder; the optimizer stays new."""
