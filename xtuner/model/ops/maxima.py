"""Largest magnitudes of a gradient's rows and columns, which its conversion to fp8 needs.

The kernel that computes the gradient finds them on its way, in registers, and they travel with the tensor: a search of
their own would read it once more.
"""

import torch

from xtuner.model.ops.cublaslt import ALIGNMENT

Maxima = tuple[torch.Tensor, torch.Tensor]  # [T] and [K]: bits of fp32 numbers in int32, whose order is the same


def new_maxima(rows: int, columns: int, device: torch.device) -> Maxima:
    """Zeros, to be raised."""
    parts = align(rows), columns
    of_rows, of_columns = torch.zeros(sum(parts), dtype=torch.int32, device=device).split(parts)
    return of_rows[:rows], of_columns


def align(n: int) -> int:
    """Whatever follows begins at a multiple of ALIGNMENT: several numbers are read at once, and there is one kernel for
    all numbers of tokens."""
    return -(-n // ALIGNMENT) * ALIGNMENT


def set_maxima(x_TK: torch.Tensor, maxima: Maxima | None) -> None:
    """Attach them to the tensor."""
    x_TK.maxima = maxima, x_TK._version  # type: ignore[attr-defined]


def get_maxima(x_TK: torch.Tensor) -> Maxima | None:
    """Those that have been attached, unless the tensor has changed since."""
    maxima, version = getattr(x_TK, "maxima", (None, 0))
    return maxima if version == x_TK._version else None
