"""Frozen weights in 4 or 8 bits, read back to the compute dtype just before each product.

A weight [N, K] becomes uint8 [N, bytes]: every row has all that reading it needs, so that weights are sharded, sent and
freed by rows like any other.

    nf4    K/2 bytes of codes │ K/64 codes of block maxima │ their scales, fp32 │ their mean, fp32 │ padding
    int8   K bytes │ the row's scale, fp32 │ padding

nf4 is QLoRA's (arXiv:2305.14314): blocks of 64 numbers, each divided by its largest magnitude and rounded to one of 16
quantiles; the maxima of 256 blocks, minus the mean of all, are rounded to 8 bits in the same way. int8 has one scale
for each row. Both have the values of bitsandbytes (`quantize_4bit` with compressed statistics,
`int8_vectorwise_quant`), but for its lookup of 8-bit codes on CPUs, which rounds what is next to the middle of two
codes either way. bitsandbytes itself keeps scales of the flat tensor, without which a rank cannot read its rows, and
is a download of 125 MB for some versions of CUDA.
"""

import functools
from typing import Literal, Protocol

import torch

from xtuner.model.ops.gradient_sums import GradientSum
from xtuner.model.ops.matmul import Matmul
from xtuner.model.ops.maxima import Maxima
from xtuner.model.ops.prepared import PreparedColumns, PreparedRows, SwiGLUGradients

WeightKind = Literal["own", "int8", "nf4"]  # values of `model.frozen_weights`
BLOCK = 64  # numbers that share a maximum
GROUP = 256  # blocks that share a scale of their maxima
ALIGNMENT = 16  # bytes
MAX_INT8 = 127.0
# quantiles of the normal distribution, in [-1, 1], with an exact zero (appendix E of QLoRA's paper)
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class QuantizedFormat(Protocol):
    """How rows are kept."""

    multiple: int  # columns are a multiple of it

    def row_bytes(self, columns: int) -> int: ...

    def quantize(self, w_NK: torch.Tensor) -> torch.Tensor:
        """uint8 [N, bytes]."""

    def dequantize(self, packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[N, K]."""


class Nf4:
    multiple = BLOCK

    @staticmethod
    def layout(columns: int) -> tuple[int, int, int]:
        """(first byte of the scales, number of scales, bytes) of a row. A row has blocks of at most so many groups."""
        blocks = columns // BLOCK
        scales_at, groups = -(-33 * blocks // 4) * 4, (blocks + GROUP - 2) // GROUP + 1
        return scales_at, groups, -(-(scales_at + 4 * (groups + 1)) // ALIGNMENT) * ALIGNMENT

    def row_bytes(self, columns: int) -> int:
        return self.layout(columns)[2]

    @staticmethod
    @functools.lru_cache(256)
    def columns(row_bytes: int) -> int:
        """The inverse of `row_bytes`."""
        most = row_bytes * BLOCK // 33 // BLOCK * BLOCK
        return next(c for c in range(most, 0, -BLOCK) if Nf4.layout(c)[2] == row_bytes)

    def quantize(self, w_NK: torch.Tensor) -> torch.Tensor:
        rows, columns = w_NK.shape
        blocks = w_NK.float().reshape(-1, BLOCK)
        largest = blocks.abs().amax(1)
        codes = _nearest(blocks / largest.clamp(min=torch.finfo(torch.float32).tiny)[:, None], _nf4(w_NK.device))
        packed = (codes[:, 0::2] << 4) | codes[:, 1::2]
        mean = largest.mean()
        groups = torch.nn.functional.pad(largest - mean, (0, -len(largest) % GROUP)).view(-1, GROUP)
        scales = groups.abs().amax(1)
        maxima = _nearest(groups / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None], _dynamic(w_NK.device))
        at, held, size = self.layout(columns)
        out = w_NK.new_zeros((rows, size), dtype=torch.uint8)
        half, each = columns // 2, columns // BLOCK
        out[:, :half] = packed.view(rows, half)
        out[:, half : half + each] = maxima.view(-1)[: len(largest)].view(rows, each)
        own = torch.cat((scales[self._groups(rows, each, held, len(scales), w_NK.device)], mean.expand(rows, 1)), dim=1)
        out[:, at : at + 4 * (held + 1)] = own.contiguous().view(torch.uint8)
        return out

    @staticmethod
    def _groups(rows: int, each: int, held: int, last: int, device: torch.device) -> torch.Tensor:
        """The groups whose scales each row has, [N, held]."""
        first = torch.arange(rows, device=device) * each // GROUP
        return (first[:, None] + torch.arange(held, device=device)).clamp(max=last - 1)

    def dequantize(self, packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        rows, columns = len(packed), self.columns(packed.shape[1])
        at, held, _ = self.layout(columns)
        if packed.is_cuda:
            from xtuner.model.ops import quantized_kernels

            tables = _nf4(packed.device), _dynamic(packed.device)
            return quantized_kernels.dequantize_nf4(packed, columns, at, held, *tables, dtype)
        half, each = columns // 2, columns // BLOCK
        own = packed[:, at : at + 4 * (held + 1)].contiguous().view(torch.float32)
        block = torch.arange(rows, device=packed.device)[:, None] * each + torch.arange(each, device=packed.device)
        scales = own[:, :-1].gather(1, block // GROUP - block[:, :1] // GROUP)
        maxima = _dynamic(packed.device)[packed[:, half : half + each].int()] * scales + own[:, -1:]  # [N, K/64]
        codes = packed[:, :half]
        values = _nf4(packed.device)[torch.stack((codes >> 4, codes & 15), dim=2).int()]
        return (values.view(rows, each, BLOCK) * maxima[:, :, None]).view(rows, columns).to(dtype)


class Int8:
    multiple = ALIGNMENT

    def row_bytes(self, columns: int) -> int:
        return columns + ALIGNMENT

    def quantize(self, w_NK: torch.Tensor) -> torch.Tensor:
        rows, columns = w_NK.shape
        w = w_NK.float()
        largest = w.abs().amax(1, keepdim=True)
        factor = torch.where(largest > 0, MAX_INT8 / largest, 0.0)
        out = w_NK.new_zeros((rows, self.row_bytes(columns)), dtype=torch.uint8)
        out[:, :columns] = (w * factor).round().to(torch.int8).view(torch.uint8)
        out[:, columns : columns + 4] = largest.contiguous().view(torch.uint8)
        return out

    def dequantize(self, packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        columns = packed.shape[1] - ALIGNMENT
        scale = packed[:, columns : columns + 4].contiguous().view(torch.float32) / MAX_INT8
        if packed.is_cuda:
            from xtuner.model.ops import quantized_kernels

            return quantized_kernels.dequantize_int8(packed, columns, scale, dtype)
        return (packed[:, :columns].view(torch.int8) * scale).to(dtype)


FORMATS: dict[str, QuantizedFormat] = {"nf4": Nf4(), "int8": Int8()}


class DequantizingMatmul:
    """A kind of product with weights of this format: reads one weight back at a time, for the time of a product."""

    def __init__(self, inner: Matmul, form: QuantizedFormat, dtype: torch.dtype) -> None:
        self._inner, self._form, self._dtype = inner, form, dtype
        self.swiglu_bytes = inner.swiglu_bytes

    def prepare(self, x_TK: torch.Tensor) -> PreparedRows:
        return self._inner.prepare(x_TK)

    def forward(
        self, x: PreparedRows, w_NK: torch.Tensor, bias: torch.Tensor | None = None, add_TN: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self._inner.forward(x, self.read(w_NK), bias, add_TN)

    def backward(
        self,
        d: PreparedRows,
        w_NK: torch.Tensor,
        add_TK: torch.Tensor | None = None,
        into: GradientSum | None = None,
    ) -> torch.Tensor:
        return self._inner.backward(d, self.read(w_NK), add_TK, into)

    def prepare_columns(self, x_TK: torch.Tensor) -> PreparedColumns:
        return self._inner.prepare_columns(x_TK)

    def prepare_both(self, d_TN: torch.Tensor) -> tuple[PreparedRows, PreparedColumns]:
        return self._inner.prepare_both(d_TN)

    def add_gradient(
        self, into: GradientSum | None, d: PreparedColumns, x: PreparedColumns, dtype: torch.dtype
    ) -> torch.Tensor | None:
        return self._inner.add_gradient(into, d, x, dtype)

    def add_norm(
        self, x_TH: torch.Tensor, w_H: torch.Tensor, eps: float, add_TH: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._inner.add_norm(x_TH, w_H, eps, add_TH)

    def new_maxima(self, rows: int, columns: int, device: torch.device) -> Maxima | None:
        return self._inner.new_maxima(rows, columns, device)

    def prepare_swiglu(self, gate_TF: torch.Tensor, up_TF: torch.Tensor) -> PreparedRows:
        return self._inner.prepare_swiglu(gate_TF, up_TF)

    def prepare_swiglu_gradients(
        self, gate_TF: torch.Tensor, up_TF: torch.Tensor, d_TF: torch.Tensor
    ) -> SwiGLUGradients | None:
        return self._inner.prepare_swiglu_gradients(gate_TF, up_TF, d_TF)

    def read(self, w_NK: torch.Tensor) -> torch.Tensor:
        return self._form.dequantize(w_NK, self._dtype)


class Dequantizer:
    """Reads a network's quantized weights in a dtype. One object for all of a network's modules."""

    def __init__(self, kind: str, dtype: torch.dtype) -> None:
        self.form, self._dtype = FORMATS[kind], dtype
        self._wrapped: dict[int, DequantizingMatmul] = {}

    def wrap(self, matmul: Matmul) -> Matmul:
        if id(matmul) not in self._wrapped:
            self._wrapped[id(matmul)] = DequantizingMatmul(matmul, self.form, self._dtype)
        return self._wrapped[id(matmul)]


def round_trip(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """A weight as it is read back."""
    if kind == "own":
        return weight
    return FORMATS[kind].dequantize(FORMATS[kind].quantize(weight), torch.float32)


def why_unsupported(kind: str, columns: list[int], device: torch.device) -> str | None:
    """Why weights with these numbers of columns cannot be kept in a format, or None."""
    if kind == "own":
        return None
    if device.type not in ("cpu", "cuda", "meta"):
        return f"{kind} is not supported on {device.type}"
    multiple = FORMATS[kind].multiple
    if wrong := [str(c) for c in columns if c % multiple]:
        return f"{kind} needs rows of a multiple of {multiple} numbers, and the model has rows of {', '.join(wrong)}"
    return None


def _nearest(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """uint8: the index of the nearest entry of a sorted table."""
    return torch.bucketize(values, (table[1:] + table[:-1]) / 2).to(torch.uint8)


@functools.lru_cache(8)
def _nf4(device: torch.device) -> torch.Tensor:
    return torch.tensor(NF4, device=device)


@functools.lru_cache(8)
def _dynamic(device: torch.device) -> torch.Tensor:
    """256 numbers in [-1, 1], dense near 0 ("dynamic" quantization, arXiv:1511.04561): in each decade from 1e-6 on, the
    middles of twice as many equal steps as in the one before; and 0 and 1."""
    decades = []
    for i in range(7):
        borders = torch.linspace(0.1, 1.0, 2**i + 1)
        decades.append(10.0 ** (i - 6) * (borders[1:] + borders[:-1]) / 2)
    positive = torch.cat(decades)
    return torch.cat((-positive.flip(0), torch.tensor([0.0]), positive, torch.tensor([1.0]))).to(device)
