"""A block's products with its weights: in their own dtype, or in fp8, at up to twice the speed on Hopper and later.

    forward   x w^T   [T, K] · [N, K] → [T, N]
    back      d w     [T, N] · [N, K] → [T, K]

fp8 is e4m3 with a scale for each row of x and d and for each output of w: what is added up shares its scales. The
gradients of weights, d^T x, are summed over tokens, where large and small rows meet: they stay in bf16, as do
attention, the output layer, and all that is no training (sampling, evaluation).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch.nn import functional as F

Kind = Literal["own", "fp8"]
LARGEST = 448.0  # of e4m3
SMALLEST = 1e-30  # rows below it count as zeros: 448 over their largest would come near fp32's end
STEP = 16  # what the sides of a weight have to be multiples of


class Products(Protocol):
    """One way to multiply. `rows` prepares x or d once for all the products that it is in."""

    def rows(self, x_TK: torch.Tensor) -> "Rows": ...

    def forward(
        self, x: "Rows", w_NK: torch.Tensor, bias: torch.Tensor | None = None, add_TN: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x w^T + bias + add."""

    def back(self, d: "Rows", w_NK: torch.Tensor, add_TK: torch.Tensor | None = None) -> torch.Tensor:
        """d w + add."""


@dataclass(frozen=True)
class Rows:
    """x [T, K]: as it is, or in fp8 with a scale for each row, [T, 1]."""

    values: torch.Tensor
    scale: torch.Tensor | None = None


class Own:
    """In the weights' dtype."""

    def rows(self, x_TK: torch.Tensor) -> Rows:
        return Rows(x_TK)

    def forward(
        self, x: Rows, w_NK: torch.Tensor, bias: torch.Tensor | None = None, add_TN: torch.Tensor | None = None
    ) -> torch.Tensor:
        if add_TN is None:
            return F.linear(x.values, w_NK, bias)
        return torch.addmm(add_TN if bias is None else add_TN + bias, x.values, w_NK.T)

    def back(self, d: Rows, w_NK: torch.Tensor, add_TK: torch.Tensor | None = None) -> torch.Tensor:
        return d.values @ w_NK if add_TK is None else torch.addmm(add_TK, d.values, w_NK)


class Fp8:
    """In fp8. Weights are scaled and rounded at each use: copies of all would need as much memory as the weights."""

    def rows(self, x_TK: torch.Tensor) -> Rows:
        return quantize_rows(x_TK)

    def forward(
        self, x: Rows, w_NK: torch.Tensor, bias: torch.Tensor | None = None, add_TN: torch.Tensor | None = None
    ) -> torch.Tensor:
        return _add(_multiply(x, quantize_rows(w_NK), w_NK.dtype), bias, add_TN)

    def back(self, d: Rows, w_NK: torch.Tensor, add_TK: torch.Tensor | None = None) -> torch.Tensor:
        return _add(_multiply(d, quantize_columns(w_NK), w_NK.dtype), None, add_TK)


OWN = Own()
KINDS: dict[str, Products] = {"own": OWN, "fp8": Fp8()}


def why_not(name: str, sides: Sequence[int], device: torch.device, dtype: torch.dtype) -> str | None:
    """What keeps products of weights with such sides from being computed so; `dtype` is that of everything else."""
    if name not in KINDS:
        return f"there is {' and '.join(KINDS)}"
    if name != "fp8":
        return None
    if device.type not in ("cpu", "cuda"):
        return f"they are not built for {device.type}"
    if device.type == "cuda" and (torch.version.hip or torch.cuda.get_device_capability(device) < (9, 0)):
        return f"a {torch.cuda.get_device_name(device)} cannot scale them row by row"
    if device.type == "cuda" and dtype != torch.bfloat16:
        return "they come out in bf16, and everything else is not"
    if any(side % STEP for side in sides):
        return f"sides of weights, {', '.join(map(str, sides))}, have to be multiples of {STEP}"
    return None


def quantize_rows(x_TK: torch.Tensor) -> Rows:
    """Each row times 448 over its largest magnitude, in e4m3."""
    if x_TK.is_cuda:
        from xtuner.model.ops import fp8_kernels

        return Rows(*fp8_kernels.quantize_rows(x_TK))
    x32 = x_TK.float()
    largest = x32.abs().amax(1, keepdim=True)
    factor = torch.where(largest > SMALLEST, LARGEST / largest, 1.0)
    return Rows((x32 * factor).to(torch.float8_e4m3fn), 1 / factor)


def quantize_columns(w_NK: torch.Tensor) -> Rows:
    """`quantize_rows` of w^T, [K, N]."""
    if w_NK.is_cuda:
        from xtuner.model.ops import fp8_kernels

        return Rows(*fp8_kernels.quantize_columns(w_NK))
    return quantize_rows(w_NK.T)


def _multiply(a: Rows, b: Rows, dtype: torch.dtype) -> torch.Tensor:
    """a b^T."""
    assert a.scale is not None
    assert b.scale is not None
    if a.values.is_cuda:
        scales = dict(scale_a=a.scale, scale_b=b.scale.T)
        return torch._scaled_mm(a.values, b.values.T, **scales, out_dtype=dtype, use_fast_accum=True)
    return ((a.values.float() * a.scale) @ (b.values.float() * b.scale).T).to(dtype)


def _add(product: torch.Tensor, bias: torch.Tensor | None, add: torch.Tensor | None) -> torch.Tensor:
    for other in (bias, add):
        if other is not None:
            product += other
    return product
