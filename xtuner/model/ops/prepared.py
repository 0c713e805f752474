"""What matrix products read: tensors as they are, or converted to fp8.

A norm that only products in fp8 read is not written itself. Between modules a stand-in takes its place: a tensor of its
shape, for autograd, without values and without memory. It carries the `Normed`, which `Matmul.prepare` and
`Matmul.prepare_columns` find.
"""

from dataclasses import dataclass
from functools import cache

import torch

from xtuner.model.ops import elementwise


@dataclass(frozen=True)
class PreparedRows:
    """x [T, K], unchanged, or in fp8 with a scale for each row, [T, 1]."""

    values: torch.Tensor
    scale: torch.Tensor | None = None

    def take(self, tile: slice) -> "PreparedRows":
        """Of these rows."""
        return PreparedRows(self.values[tile], None if self.scale is None else self.scale[tile])


@dataclass(frozen=True)
class PreparedColumns:
    """x [T, K], unchanged; or x^T in fp8, [K, T], with a scale for each column of x, [K, 1]."""

    values: torch.Tensor
    scale: torch.Tensor | None = None


@dataclass(frozen=True)
class SwiGLUGradients:
    """The gradients of gate and up, each for both products that need it, and silu(gate) · up for w2's gradient."""

    gate: tuple[PreparedRows, PreparedColumns]
    up: tuple[PreparedRows, PreparedColumns]
    product: PreparedColumns


@dataclass(frozen=True)
class Normed:
    """An RMS norm that is not written: x [T, H] / rms(x) · w.

    Args:
        rows: the norm in fp8; None in a backward.
        columns: what its conversion by columns needs in the backward, found in the forward: 1 / rms(x) [T], fp32, and
            the norm's largest magnitudes by column [H], as in maxima.py. Empty if there is no such conversion.
    """

    x_TH: torch.Tensor
    w_H: torch.Tensor
    eps: float
    rows: PreparedRows | None = None
    columns: tuple[torch.Tensor, ...] = ()

    def take(self, tile: slice) -> "Normed":
        """Of these rows. They have other maxima."""
        return Normed(self.x_TH[tile], self.w_H, self.eps, self.rows and self.rows.take(tile))

    def compute(self) -> torch.Tensor:
        """The norm in x's dtype."""
        return elementwise.rms_norm(self.x_TH, self.w_H, self.eps)[1]


@cache
def _no_value(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.full((1, 1), torch.nan, dtype=dtype, device=device)


def stand_in(normed: Normed) -> torch.Tensor:
    """The tensor that carries a norm. Whatever reads its values finds NaN."""
    tensor = _no_value(normed.x_TH.dtype, normed.x_TH.device).expand(normed.x_TH.shape)
    tensor.normed = normed  # type: ignore[attr-defined]
    return tensor


def get_normed(x_TH: torch.Tensor) -> Normed | None:
    """The norm for which this tensor stands."""
    return getattr(x_TH, "normed", None)


def get_values(x_TH: torch.Tensor) -> torch.Tensor:
    """The tensor, or what it stands for."""
    normed = get_normed(x_TH)
    return x_TH if normed is None else normed.compute()


def take_rows(x_TK: torch.Tensor, tile: slice) -> torch.Tensor:
    """x[tile], also of a stand-in; x itself, with all that it carries, if these are all rows."""
    if tile.stop - tile.start == len(x_TK):
        return x_TK
    normed = get_normed(x_TK)
    return x_TK[tile] if normed is None else stand_in(normed.take(tile))
