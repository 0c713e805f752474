"""Scaling and rounding to fp8 as GPU kernels (Triton). Defined in `matmul.py`."""

from functools import cache

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from xtuner.model.ops.elementwise_kernels import choose_warps

E4M3_MAX, ZERO_BELOW = tl.constexpr(448.0), tl.constexpr(1e-30)
TILE = 64
ALIGNMENT = 16  # bytes: rows that the device copies by itself begin at multiples of it


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
def _columns(W, LARGE, OUT, SCALE, N, K, ALIGNED, TILE: tl.constexpr):
    n = tl.program_id(0) * TILE + tl.arange(0, TILE)
    k = tl.program_id(1) * TILE + tl.arange(0, TILE)
    largest = tl.load(LARGE + k, k < K, 0.0).to(tl.float32)
    factor = tl.where(largest > ZERO_BELOW, E4M3_MAX / largest, 1.0)
    inside = (n[:, None] < N) & (k[None, :] < K)
    w = tl.load(W + n[:, None].to(tl.int64) * K + k[None, :], inside, 0.0).to(tl.float32)
    transposed = tl.trans((w * factor[None, :]).to(tl.float8e4nv))
    tl.store(OUT + k[:, None].to(tl.int64) * ALIGNED + n[None, :], transposed, (k[:, None] < K) & (n[None, :] < N))
    if tl.program_id(0) == 0:
        tl.store(SCALE + k, 1 / factor, k < K)


def quantize_columns(w_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    w_NK = w_NK.contiguous()
    N, K = w_NK.shape
    largest = torch.linalg.vector_norm(w_NK, float("inf"), dim=0)
    aligned = triton.cdiv(N, ALIGNMENT) * ALIGNMENT
    out = w_NK.new_empty(K, aligned, dtype=torch.float8_e4m3fn)[:, :N]
    scale = w_NK.new_empty(K, 1, dtype=torch.float32)
    _columns[(triton.cdiv(N, TILE), triton.cdiv(K, TILE))](w_NK, largest, out, scale, N, K, aligned, TILE=TILE, num_warps=4)
    return out, scale


@triton.jit
def _add_product(
    A, B, C, SCALE_A, SCALE_B, M, N, K, programs,
    ADD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Tiles of C in groups of rows, so that what is read again is still in the cache."""
    rows, columns = tl.cdiv(M, BM), tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), rows * columns, programs, flatten=True):
        first = tile // (GROUP * columns) * GROUP
        size = min(rows - first, GROUP)
        m = (first + tile % (GROUP * columns) % size) * BM
        n = tile % (GROUP * columns) // size * BN
        total = tl.zeros((BM, BN), tl.float32)
        for k in range(0, tl.cdiv(K, BK)):
            total = tl.dot(A.load([m, k * BK]), B.load([n, k * BK]).T, total)
        at_m, at_n = m + tl.arange(0, BM), n + tl.arange(0, BN)
        scale_m, scale_n = tl.load(SCALE_A + at_m, at_m < M, 0.0), tl.load(SCALE_B + at_n, at_n < N, 0.0)
        total = total * scale_m[:, None] * scale_n[None, :]
        at = C + at_m[:, None].to(tl.int64) * N + at_n[None, :]
        inside = (at_m[:, None] < M) & (at_n[None, :] < N)
        if ADD:
            total += tl.load(at, inside, 0.0).to(tl.float32)
        tl.store(at, total.to(C.dtype.element_ty), inside)


def add_product(
    c_MN: torch.Tensor, a_MK: torch.Tensor, b_NK: torch.Tensor, scale_M: torch.Tensor, scale_N: torch.Tensor, add: bool
) -> None:
    """c = a b^T, each row of a and b times its scale; with `add`, added to what c contains, in fp32."""
    (M, K), N = a_MK.shape, len(b_NK)
    a, b = (TensorDescriptor(x, [len(x), K], [x.stride(0), 1], [rows, 128]) for x, rows in ((a_MK, 128), (b_NK, 256)))
    programs = _multiprocessors(c_MN.device)
    tiles = dict(BM=128, BN=256, BK=128, GROUP=8)
    _add_product[(programs,)](
        a, b, c_MN, scale_M, scale_N, M, N, K, programs, ADD=add, **tiles, num_warps=8, num_stages=3
    )


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
