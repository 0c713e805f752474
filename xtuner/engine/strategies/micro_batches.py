"""The loop over an iteration's micro-batches, for all strategies."""

from collections.abc import Callable, Sequence

import torch

from xtuner.core.activity import record_progress
from xtuner.data.loading.batch import Batch
from xtuner.model.context_parallel.exchange import ContextGroup
from xtuner.model.context_parallel.shared_documents import SharedDocuments
from xtuner.model.decoder import CausalLM


def run_micro_batches(
    pieces: Sequence[Batch],
    model: Callable[..., torch.Tensor] | CausalLM,
    device: torch.device,
    num_targets: int,
    backward: Callable[[torch.Tensor], object],
    before: Callable[[bool], object],
    skip: bool,
    context: ContextGroup | None = None,
    sources: int = 1,
) -> torch.Tensor:
    """Forward and backward of each micro-batch. Returns this rank's sum of losses ÷ `num_targets`, on the device, of
    each source: [sources].

    Args:
        pieces: the micro-batches.
        num_targets: of all ranks.
        before: called before each micro-batch, with whether it is the last.
        context: the ranks that share the micro-batches, if any.
        skip: whether to skip micro-batches without targets; False if other ranks wait for collectives in them.
    """
    total = torch.zeros(sources, device=device)
    for i, piece in enumerate(pieces):
        record_progress(f"forward and backward of micro-batch {i + 1} of {len(pieces)}")
        before(i == len(pieces) - 1)
        if skip and not piece.num_targets:
            continue
        b = piece.to(device)
        shared = SharedDocuments(b.shared, context) if b.shared and context else None
        loss = model(
            b.input_ids, b.cu_seqlens, b.targets, b.position_ids, b.max_seqlen, scale=1 / num_targets, shared=shared
        )
        backward(loss)
        total[piece.source] += loss.detach()
    return total
