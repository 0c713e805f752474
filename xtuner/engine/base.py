"""The contract between the training loop and the strategies that run forward, backward and step.

After an iteration's `forward_backward`, gradients are the sum over the targets of all ranks and micro-batches, divided
by the number of these targets, whatever averaging an engine does itself. Checkpoints contain fp32 masters; with states
"bf16" or "8bit", whose weights have no other master, these are the bf16 weights cast to fp32.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from xtuner.data.loading.batch import Batch
from xtuner.engine.memory import MemoryPlan
from xtuner.engine.state.snapshot import Snapshot
from xtuner.model.decoder import CausalLM


class Strategy(Protocol):
    """A way to train: our own on any mesh, or DeepSpeed."""

    name: str
    device: torch.device
    compute_dtype: torch.dtype
    memory: MemoryPlan
    source_losses: list[float]  # of the last iteration: each source's part of the loss; their sum is the loss

    @property
    def model(self) -> CausalLM:
        """The network in the compute dtype, for sampling and evaluation."""

    def count_micro_batches(self, batch: Sequence[Batch]) -> list[int]:
        """For each pack, the number of micro-batches that fit into this rank's memory."""

    def forward_backward(
        self, batch: Sequence[Batch], num_targets: int, parts: Sequence[int] | None = None, iteration: int = 0,
        sources: int = 1,
    ) -> float:  # fmt: skip
        """Forward and backward of this rank's packs of one iteration. When memory runs out, our own strategy repeats
        the iteration with smaller micro-batches, as long as that is possible.

        Args:
            num_targets: of all ranks; if 0, nothing is computed.
            parts: number of micro-batches of each pack, the same on all ranks: the maximum that any of them needs.
                None: what this rank needs.
            iteration: its number, for messages.
            sources: of the mixture, if there is one.

        Returns the mean loss over all targets of all ranks, in nats, the same on every rank; 0 without targets.
        """

    def step(self, lr: float, max_norm: float | None) -> tuple[float, bool]:
        """Clip to `max_norm` and update the weights.

        Returns (gradient norm before clipping, whether the step was applied). A step with a non-finite norm, or after
        an iteration without targets, is not applied.
        """

    def reserve_host_memory(self, optimizer: bool) -> None:
        """Start to allocate the host memory of snapshots in the background. Call it after the first step."""

    def snapshot(self, optimizer: bool) -> Snapshot:
        """This rank's part of a checkpoint, copied to host memory: `weights/` (a Hugging Face folder of fp32 masters)
        and, with `optimizer`, `optimizer/`. It may overwrite the copy of an earlier snapshot. All ranks call it
        together."""

    def load(self, folder: Path) -> None:
        """Restore the state that a snapshot with the optimizer has written, bit for bit."""

    def load_weights(self, folder: Path) -> None:
        """Load the weights of a Hugging Face folder; the optimizer's state stays new."""
