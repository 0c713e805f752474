"""The one loop over an iteration's micro-batches."""

from collections.abc import Callable, Sequence

import torch

from xtuner.core.progress import record_progress
from xtuner.data.loading.batch import Batch
from xtuner.model.decoder import CausalLM


def run_micro_batches(
    pieces: Sequence[Batch],
    model: Callable[..., torch.Tensor] | CausalLM,
    device: torch.device,
    num_targets: int,
    backward: Callable[[torch.Tensor], object],
    before: Callable[[bool], object],
    skip: bool,
) -> torch.Tensor:
    """Forward and backward of each piece. Returns this rank's sum of losses ÷ `num_targets`, a scalar on the device.

    Args:
        num_targets: of all ranks.
        before: called before each piece, with whether it is the last.
        skip: whether pieces without targets may be left out; not where other ranks wait for collectives in them.
    """
    total = torch.zeros((), device=device)
    for i, piece in enumerate(pieces):
        record_progress(f"forward and backward of micro-batch {i + 1} of {len(pieces)}")
        before(i == len(pieces) - 1)
        if skip and not piece.num_targets:
            continue
        b = piece.to(device)
        loss = model(b.input_ids, b.cu_seqlens, b.targets, b.position_ids, b.max_seqlen, scale=1 / num_targets)
        backward(loss)
        total += loss.detach()
    return total
