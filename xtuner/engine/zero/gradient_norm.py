"""The norm of all gradients under ZeRO, in place of DeepSpeed's.

DeepSpeed launches several kernels for each gradient: under stage 3 it copies it to fp64; under stages 1 and 2 it also
searches it for values that are not finite, which the norm shows. On four H100 at 7B this took 57 and 22 ms.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed

from xtuner.engine.strategies.local_optimizer import compute_norm


def replace_norm(zero: Any, stage: int) -> None:
    """
    Args:
        zero: DeepSpeed's optimizer of stage 1, 2 or 3, without offload of the optimizer.
    """
    if stage == 3:
        zero._get_norm_groups = lambda: [
            _norm_over_ranks([g for group in zero.averaged_gradients.values() for g in group])
        ]
    else:
        zero.get_grad_norm_direct = lambda gradients, parameters, norm_type=2: _norm_over_ranks(gradients)
        zero.check_overflow = lambda partition_gradients=True: None


def _norm_over_ranks(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Norm over all ranks; -1 if it is not finite, as in DeepSpeed."""
    square = compute_norm(gradients).double().square()
    distributed.all_reduce(square)
    return torch.where(square.isfinite(), square.sqrt(), -1.0).float()
