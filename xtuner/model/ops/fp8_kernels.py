"""Scaling and rounding to fp8 as GPU kernels (Triton). Defined in `matmul.py`."""

import torch
import triton
import triton.language as tl

from xtuner.model.ops.elementwise_kernels import choose_warps

E4M3_MAX, ZERO_BELOW = tl.constexpr(448.0), tl.constexpr(1e-30)
TILE = 64


@triton.jit
def _rows(X, OUT, SCALE, C, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < C
    x = tl.load(X + row * C + at, mask, 0.0).to(tl.float32)
    largest = tl.max(tl.abs(x))
    factor = tl.where(largest > ZERO_BELOW, E4M3_MAX / largest, 1.0)
    tl.store(OUT + row * C + at, (x * factor).to(tl.float8e4nv), mask)
    tl.store(SCALE + row, 1 / factor)


def quantize_rows(x_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x_TK = x_TK.contiguous()
    T, K = x_TK.shape
    out, scale = torch.empty_like(x_TK, dtype=torch.float8_e4m3fn), x_TK.new_empty(T, 1, dtype=torch.float32)
    block = triton.next_power_of_2(K)
    _rows[(T,)](x_TK, out, scale, K, BLOCK=block, num_warps=choose_warps(block))
    return out, scale


@triton.jit
def _columns(W, LARGE, OUT, SCALE, N, K, TILE: tl.constexpr):
    n = tl.program_id(0) * TILE + tl.arange(0, TILE)
    k = tl.program_id(1) * TILE + tl.arange(0, TILE)
    largest = tl.load(LARGE + k, k < K, 0.0).to(tl.float32)
    factor = tl.where(largest > ZERO_BELOW, E4M3_MAX / largest, 1.0)
    inside = (n[:, None] < N) & (k[None, :] < K)
    w = tl.load(W + n[:, None].to(tl.int64) * K + k[None, :], inside, 0.0).to(tl.float32)
    transposed = tl.trans((w * factor[None, :]).to(tl.float8e4nv))
    tl.store(OUT + k[:, None].to(tl.int64) * N + n[None, :], transposed, (k[:, None] < K) & (n[None, :] < N))
    if tl.program_id(0) == 0:
        tl.store(SCALE + k, 1 / factor, k < K)


def quantize_columns(w_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    w_NK = w_NK.contiguous()
    N, K = w_NK.shape
    largest = torch.linalg.vector_norm(w_NK, float("inf"), dim=0)
    out = w_NK.new_empty(K, N, dtype=torch.float8_e4m3fn)
    scale = w_NK.new_empty(K, 1, dtype=torch.float32)
    _columns[(triton.cdiv(N, TILE), triton.cdiv(K, TILE))](w_NK, largest, out, scale, N, K, TILE=TILE, num_warps=4)
    return out, scale
