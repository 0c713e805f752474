"""GPU kernels that read quantized weights back (quantized.py): every byte is read once, every number written once."""

from typing import Any

import torch
import triton
import triton.language as tl

_DTYPES: dict[torch.dtype, Any] = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _dequantize_nf4(
    PACKED, FLOATS, OUT, CODES, MAXIMA, half, each, row_bytes, scales_at, held, DTYPE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Codes of BLOCK bytes of one row; FLOATS is PACKED as fp32."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < half
    packed = tl.load(PACKED + row * row_bytes + at, mask, 0).to(tl.int32)
    block = at // 32
    maximum = tl.load(PACKED + row * row_bytes + half + block, mask, 0).to(tl.int32)
    floats = FLOATS + (row * row_bytes + scales_at) // 4
    first = row * each
    group = (first + block) // 256 - first // 256
    scale = tl.load(floats + group, mask, 0.0)
    largest = tl.load(MAXIMA + maximum) * scale + tl.load(floats + held)
    high = tl.load(CODES + (packed >> 4)) * largest
    low = tl.load(CODES + (packed & 15)) * largest
    values = tl.interleave(high, low).to(DTYPE)
    to = tl.program_id(1) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    tl.store(OUT + row * (2 * half) + to, values, to < 2 * half)


def dequantize_nf4(
    packed: torch.Tensor,
    columns: int,
    scales_at: int,
    held: int,
    codes: torch.Tensor,
    maxima: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    rows, row_bytes = packed.shape
    out = torch.empty(rows, columns, dtype=dtype, device=packed.device)
    block = min(1024, triton.next_power_of_2(columns // 2))
    grid = (rows, triton.cdiv(columns // 2, block))
    shape: dict[str, Any] = dict(DTYPE=_DTYPES[dtype], BLOCK=block)
    _dequantize_nf4[grid](
        packed, packed.view(torch.float32), out, codes, maxima, columns // 2, columns // 64, row_bytes, scales_at, held,
        **shape,
    )  # fmt: skip
    return out


@triton.jit
def _dequantize_int8(PACKED, SCALES, OUT, columns, row_bytes, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < columns
    values = tl.load(PACKED + row * row_bytes + at, mask, 0).to(tl.int8, bitcast=True).to(tl.float32)
    tl.store(OUT + row * columns + at, (values * tl.load(SCALES + row)).to(DTYPE), mask)


def dequantize_int8(packed: torch.Tensor, columns: int, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Args: scale: fp32 [N, 1], of each row."""
    rows, row_bytes = packed.shape
    out = torch.empty(rows, columns, dtype=dtype, device=packed.device)
    shape: dict[str, Any] = dict(DTYPE=_DTYPES[dtype], BLOCK=1024)
    _dequantize_int8[(rows, triton.cdiv(columns, 1024))](packed, scale, out, columns, row_bytes, **shape)
    return out
