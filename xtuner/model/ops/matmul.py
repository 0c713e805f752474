"""Matrix products with a block's weights: in the weights' dtype, or in fp8, up to twice as fast on Hopper and later.

    forward    x w^T   [T, K] · [N, K] → [T, N]
    backward   d w     [T, N] · [N, K] → [T, K]
    gradient   d^T x   [N, T] · [T, K] → [N, K]

fp8 is e4m3 with scales that all terms of a sum share: one for each row of x and d, and for each output of w; in a
gradient, a sum over tokens, one for each column of d and x. "fp8" leaves gradients in bf16, "fp8_full" does not.
Attention, the output layer, sampling and evaluation stay in bf16.
"""

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch.nn import functional as F

from xtuner.model.ops import cublaslt, elementwise
from xtuner.model.ops.gradient_sums import GradientSum, add_gradient_product
from xtuner.model.ops.maxima import Maxima, get_maxima, new_maxima
from xtuner.model.ops.prepared import (
    Normed,
    PreparedColumns,
    PreparedRows,
    SwiGLUGradients,
    get_normed,
    get_values,
    stand_in,
)

MatmulKind = Literal["own", "fp8", "fp8_full"]  # values of `model.products`
E4M3_MAX = 448.0
ZERO_BELOW = 1e-30  # rows whose largest magnitude is below it get scale 1: 448 / largest would near fp32's maximum
SIDE_MULTIPLE = 16  # both dimensions of a weight must be multiples of this


class Matmul(Protocol):
    """A kind of matrix product. `prepare` converts x or d once for all products that use it.

    Attributes:
        swiglu_bytes: what `prepare_swiglu_gradients` allocates, for each number of gate.
    """

    swiglu_bytes: int

    def prepare(self, x_TK: torch.Tensor) -> PreparedRows: ...

    def forward(
        self,
        x: PreparedRows,
        w_NK: torch.Tensor,
        bias: torch.Tensor | None = None,
        add_TN: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x w^T + bias + add."""

    def backward(
        self,
        d: PreparedRows,
        w_NK: torch.Tensor,
        add_TK: torch.Tensor | None = None,
        into: GradientSum | None = None,
    ) -> torch.Tensor:
        """d w + add, whose memory the result may take. Args: into: the weight's sum, which remembers its maxima."""

    def prepare_columns(self, x_TK: torch.Tensor) -> PreparedColumns:
        """Convert x once for all gradients that use it."""

    def prepare_both(self, d_TN: torch.Tensor) -> tuple[PreparedRows, PreparedColumns]:
        """Convert d for `backward` and for `add_gradient`."""

    def add_gradient(
        self, into: GradientSum | None, d: PreparedColumns, x: PreparedColumns, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """Add d^T x to a weight's sum; without a sum, return it to autograd in the weight's dtype."""

    def add_norm(
        self, x_TH: torch.Tensor, w_H: torch.Tensor, eps: float, add_TH: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(x + add, its RMS norm times w, which nothing but these products reads: it may be a stand-in)."""

    def new_maxima(self, rows: int, columns: int, device: torch.device) -> Maxima | None:
        """Where to put the maxima of a gradient, so that `prepare_both` need not search them; None if it does not."""

    def prepare_swiglu(self, gate_TF: torch.Tensor, up_TF: torch.Tensor) -> PreparedRows:
        """Convert silu(gate) · up for `forward`."""

    def prepare_swiglu_gradients(
        self, gate_TF: torch.Tensor, up_TF: torch.Tensor, d_TF: torch.Tensor
    ) -> SwiGLUGradients | None:
        """From d, that of silu(gate) · up; None where nothing is gained over converting one tensor after another."""

    def read(self, w_NK: torch.Tensor) -> torch.Tensor:
        """The weight in the compute dtype."""


class PlainMatmul:
    """Multiplies in the weights' dtype."""

    swiglu_bytes = 0

    def prepare(self, x_TK: torch.Tensor) -> PreparedRows:
        return PreparedRows(x_TK)

    def forward(
        self, x: PreparedRows, w_NK: torch.Tensor, bias: torch.Tensor | None = None, add_TN: torch.Tensor | None = None
    ) -> torch.Tensor:
        if add_TN is None:
            return F.linear(x.values, w_NK, bias)
        return torch.addmm(add_TN if bias is None else add_TN + bias, x.values, w_NK.T)

    def backward(
        self,
        d: PreparedRows,
        w_NK: torch.Tensor,
        add_TK: torch.Tensor | None = None,
        into: GradientSum | None = None,
    ) -> torch.Tensor:
        return d.values @ w_NK if add_TK is None else torch.addmm(add_TK, d.values, w_NK)

    def prepare_columns(self, x_TK: torch.Tensor) -> PreparedColumns:
        return PreparedColumns(get_values(x_TK))

    def prepare_both(self, d_TN: torch.Tensor) -> tuple[PreparedRows, PreparedColumns]:
        return self.prepare(d_TN), PreparedColumns(d_TN)

    def add_gradient(
        self, into: GradientSum | None, d: PreparedColumns, x: PreparedColumns, dtype: torch.dtype
    ) -> torch.Tensor | None:
        return add_gradient_product(into, d.values, x.values)

    def add_norm(
        self, x_TH: torch.Tensor, w_H: torch.Tensor, eps: float, add_TH: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return elementwise.rms_norm(x_TH, w_H, eps, add_TH)

    def new_maxima(self, rows: int, columns: int, device: torch.device) -> Maxima | None:
        return None

    def prepare_swiglu(self, gate_TF: torch.Tensor, up_TF: torch.Tensor) -> PreparedRows:
        return self.prepare(elementwise.swiglu(gate_TF, up_TF))

    def prepare_swiglu_gradients(
        self, gate_TF: torch.Tensor, up_TF: torch.Tensor, d_TF: torch.Tensor
    ) -> SwiGLUGradients | None:
        return None

    def read(self, w_NK: torch.Tensor) -> torch.Tensor:
        return w_NK


class Fp8Matmul(PlainMatmul):
    """Multiplies in fp8. Weights are quantized at each use: copies of all would take half the weights' memory.

    Attributes:
        norm_columns: whether norms are converted by columns too.
    """

    norm_columns = False

    def prepare(self, x_TK: torch.Tensor) -> PreparedRows:
        normed = get_normed(x_TK)
        if normed is None:
            return quantize_rows(x_TK)
        return normed.rows or self._quantize_norm(normed.x_TH, normed.w_H, normed.eps, None)[1]

    def forward(
        self, x: PreparedRows, w_NK: torch.Tensor, bias: torch.Tensor | None = None, add_TN: torch.Tensor | None = None
    ) -> torch.Tensor:
        product = _multiply(x, quantize_rows(w_NK), w_NK.dtype)
        for other in (bias, add_TN):
            if other is not None:
                product += other
        return product

    def backward(
        self,
        d: PreparedRows,
        w_NK: torch.Tensor,
        add_TK: torch.Tensor | None = None,
        into: GradientSum | None = None,
    ) -> torch.Tensor:
        w_KN = _quantize_weight_columns(w_NK, into)
        if add_TK is None:
            return _multiply(d, w_KN, w_NK.dtype)
        _add_product(add_TK, d, w_KN, True)
        return add_TK

    def add_norm(
        self, x_TH: torch.Tensor, w_H: torch.Tensor, eps: float, add_TH: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total, rows, columns = self._quantize_norm(x_TH, w_H, eps, add_TH)
        return total, stand_in(Normed(total, w_H, eps, rows, columns))

    def _quantize_norm(
        self, x_TH: torch.Tensor, w_H: torch.Tensor, eps: float, add_TH: torch.Tensor | None
    ) -> tuple[torch.Tensor, PreparedRows, tuple[torch.Tensor, ...]]:
        """(x + add, its norm, what `Normed.columns` holds)."""
        if not x_TH.is_cuda:
            total, normed_TH = elementwise.rms_norm(x_TH, w_H, eps, add_TH)
            return total, quantize_rows(normed_TH), ()
        from xtuner.model.ops import fp8_kernels

        total, rows, columns = fp8_kernels.quantize_norm_rows(x_TH, w_H, eps, add_TH, self.norm_columns)
        return total, PreparedRows(*rows), columns

    def prepare_swiglu(self, gate_TF: torch.Tensor, up_TF: torch.Tensor) -> PreparedRows:
        if not gate_TF.is_cuda:
            return super().prepare_swiglu(gate_TF, up_TF)
        from xtuner.model.ops import fp8_kernels

        return PreparedRows(*fp8_kernels.quantize_swiglu_rows(gate_TF, up_TF))


class Fp8FullMatmul(Fp8Matmul):
    """Multiplies in fp8, gradients of weights too."""

    swiglu_bytes = 5  # two gradients for two products, and the product
    norm_columns = True

    def prepare_columns(self, x_TK: torch.Tensor) -> PreparedColumns:
        normed = get_normed(x_TK)
        if normed is None or not normed.columns:
            prepared = quantize_columns(get_values(x_TK))
            return PreparedColumns(prepared.values, prepared.scale)
        from xtuner.model.ops import fp8_kernels

        return PreparedColumns(*fp8_kernels.quantize_norm_columns(normed.x_TH, normed.w_H, *normed.columns))

    def new_maxima(self, rows: int, columns: int, device: torch.device) -> Maxima | None:
        return new_maxima(rows, columns, device) if device.type == "cuda" else None

    def prepare_both(self, d_TN: torch.Tensor) -> tuple[PreparedRows, PreparedColumns]:
        if not d_TN.is_cuda:
            return quantize_rows(d_TN), self.prepare_columns(d_TN)
        from xtuner.model.ops import fp8_kernels

        rows, scale_T, columns, scale_N = fp8_kernels.quantize_both(d_TN, get_maxima(d_TN))
        return PreparedRows(rows, scale_T), PreparedColumns(columns, scale_N)

    def prepare_swiglu_gradients(
        self, gate_TF: torch.Tensor, up_TF: torch.Tensor, d_TF: torch.Tensor
    ) -> SwiGLUGradients | None:
        if not gate_TF.is_cuda:
            d_gate, d_up, product = elementwise.swiglu_backward(gate_TF, up_TF, d_TF)
            return SwiGLUGradients(self.prepare_both(d_gate), self.prepare_both(d_up), self.prepare_columns(product))
        from xtuner.model.ops import fp8_kernels

        of_gate, of_up, of_product = fp8_kernels.quantize_swiglu_backward(gate_TF, up_TF, d_TF)
        gate, up = ((PreparedRows(*of[:2]), PreparedColumns(*of[2:])) for of in (of_gate, of_up))
        return SwiGLUGradients(gate, up, PreparedColumns(*of_product))

    def add_gradient(
        self, into: GradientSum | None, d: PreparedColumns, x: PreparedColumns, dtype: torch.dtype
    ) -> torch.Tensor | None:
        if into is None:
            gradient = torch.empty(len(d.values), len(x.values), dtype=dtype, device=d.values.device)
            _add_product(gradient, d, x, False)
            return gradient
        _add_product(into.buffer, d, x, into.begin())
        return None


PLAIN = PlainMatmul()
MATMULS: dict[str, Matmul] = {"own": PLAIN, "fp8": Fp8Matmul(), "fp8_full": Fp8FullMatmul()}


def why_unsupported(name: str, sides: Sequence[int], device: torch.device, dtype: torch.dtype) -> str | None:
    """Why weights with these dimensions cannot be multiplied this way, or None; `dtype`: the compute dtype."""
    if name not in MATMULS:
        return f"it is not one of {', '.join(MATMULS)}"
    if name == "own":
        return None
    if device.type not in ("cpu", "cuda"):
        return f"fp8 is not supported on {device.type}"
    if device.type == "cuda" and (torch.version.hip or torch.cuda.get_device_capability(device) < (9, 0)):
        return f"a {torch.cuda.get_device_name(device)} does not support scales by row"
    if device.type == "cuda" and dtype != torch.bfloat16:
        return "its results are in bf16, and everything else is not"
    if any(side % SIDE_MULTIPLE for side in sides):
        return f"dimensions of weights, {', '.join(map(str, sides))}, must be multiples of {SIDE_MULTIPLE}"
    return None


def quantize_rows(x_TK: torch.Tensor) -> PreparedRows:
    """Each row times 448 / its largest magnitude, in e4m3."""
    if x_TK.is_cuda:
        from xtuner.model.ops import fp8_kernels

        return PreparedRows(*fp8_kernels.quantize_rows(x_TK))
    x32 = x_TK.float()
    largest = x32.abs().amax(1, keepdim=True) if x32.numel() else x32.new_zeros(len(x32), 1)
    factor = torch.where(largest > ZERO_BELOW, E4M3_MAX / largest, 1.0)
    return PreparedRows((x32 * factor).to(torch.float8_e4m3fn), 1 / factor)


def quantize_columns(w_NK: torch.Tensor) -> PreparedRows:
    """`quantize_rows` of w^T, [K, N]."""
    if w_NK.is_cuda:
        from xtuner.model.ops import fp8_kernels

        return PreparedRows(*fp8_kernels.quantize_columns(w_NK))
    return quantize_rows(w_NK.T)


def _quantize_weight_columns(w_NK: torch.Tensor, into: GradientSum | None) -> PreparedRows:
    """`quantize_columns`, which searches maxima once an iteration if the weight has a gradient sum."""
    if into is None or not w_NK.is_cuda:
        return quantize_columns(w_NK)
    from xtuner.model.ops import fp8_kernels

    if into.weight_maxima is None:
        into.weight_maxima = fp8_kernels.find_column_maxima(w_NK)
    return PreparedRows(*fp8_kernels.quantize_columns(w_NK, into.weight_maxima))


def _multiply(a: PreparedRows, b: PreparedRows, dtype: torch.dtype) -> torch.Tensor:
    """a b^T."""
    assert a.scale is not None
    assert b.scale is not None
    if a.values.is_cuda:
        return _multiply_on_gpu(a.values, b.values, a.scale, b.scale, dtype)
    return ((a.values.float() * a.scale) @ (b.values.float() * b.scale).T).to(dtype)


def _multiply_on_gpu(
    a_MK: torch.Tensor, b_NK: torch.Tensor, scale_M: torch.Tensor, scale_N: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    return torch._scaled_mm(a_MK, b_NK.T, scale_M, scale_N.T, out_dtype=dtype, use_fast_accum=True)


def _add_product(
    total: torch.Tensor, a: PreparedRows | PreparedColumns, b: PreparedRows | PreparedColumns, add: bool
) -> None:
    """total = a b^T, plus its contents with `add`."""
    assert a.scale is not None
    assert b.scale is not None
    if not a.values.is_cuda:
        product = (a.values.float() * a.scale) @ (b.values.float() * b.scale).T
        total.copy_(total + product if add else product)
        return
    if not a.values.numel():  # no tokens
        if not add:
            total.zero_()
        return
    if total.data_ptr() % cublaslt.ALIGNMENT:  # a part of a larger buffer
        aligned = total.clone()
        _add_product(aligned, a, b, add)
        total.copy_(aligned)
        return
    left, right = (x.values.as_strided((len(x.values), x.values.stride(0)), x.values.stride()) for x in (a, b))
    if cublaslt.can_add_product(total.device):
        cublaslt.add_product(total, left, right, a.scale, b.scale, add)
    else:  # before CUDA 12.9
        product = _multiply_on_gpu(left, right, a.scale, b.scale, torch.bfloat16)
        total.copy_(total + product if add else product)
