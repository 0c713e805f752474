"""Scaling and rounding to fp8 as GPU kernels (Triton). Defined in `matmul.py`."""

import torch
import triton
import triton.language as tl

from xtuner.model.ops.cublaslt import ALIGNMENT
from xtuner.model.ops.elementwise_kernels import choose_warps

E4M3_MAX, ZERO_BELOW = tl.constexpr(448.0), tl.constexpr(1e-30)
TILE = 64
STRIP = dict(STRIP=128, BT=4, num_warps=2)  # rows of a program that looks for maxima, and of one of its steps
WIDTH, SWIGLU_WIDTH = 256, 128  # its columns


@triton.jit
def _factor(largest):
    """What numbers are multiplied by, so that the largest becomes the largest of e4m3."""
    return tl.where(largest > ZERO_BELOW, E4M3_MAX / largest, 1.0)


@triton.jit
def _rows(X, OUT, SCALE, C, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < C
    x = tl.load(X + row * C + at, mask, 0.0).to(tl.float32)
    largest = tl.max(tl.abs(x))
    factor = _factor(largest)
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
def _store_rows(x, factor, OUT, SCALE, at, inside, t, T, first):
    """x in fp8, times a factor for each row; the scales by the program that is the first of its rows."""
    tl.store(OUT + at, (x * factor[:, None]).to(tl.float8e4nv), inside)
    if first:
        tl.store(SCALE + t, 1 / factor, t < T)


@triton.jit
def _store_columns(x, factor, OUT, SCALE, at, inside, f, F, first):
    """x in fp8, transposed, times a factor for each column."""
    tl.store(OUT + at, tl.trans((x * factor[None, :]).to(tl.float8e4nv)), inside)
    if first:
        tl.store(SCALE + f, 1 / factor, f < F)


@triton.jit
def _raise_to(LARGE, x, mask):
    """LARGE = max(LARGE, x), x ≥ 0: as the bits of such numbers are ordered like integers, one operation of memory."""
    tl.atomic_max(LARGE, x.to(tl.int32, bitcast=True), mask, sem="relaxed")


@triton.jit(do_not_specialize=["T"])
def _maxima(
    X, ROWS, COLUMNS, T, K, STRIP: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    """The largest magnitudes of rows and columns. A program reads STRIP rows; those of columns stay in registers."""
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    largest = tl.zeros([BT, BK], tl.float32)
    for i in tl.range(0, STRIP, BT, num_stages=STAGES):
        t = tl.program_id(0) * STRIP + i + tl.arange(0, BT)
        inside = (t[:, None] < T) & (k[None, :] < K)
        x = tl.abs(tl.load(X + t[:, None].to(tl.int64) * K + k[None, :], inside, 0.0).to(tl.float32))
        _raise_to(ROWS + t, tl.max(x, 1), t < T)
        largest = tl.maximum(largest, x)
    _raise_to(COLUMNS + k, tl.max(largest, 0), k < K)


@triton.jit(do_not_specialize=["N"])
def _columns(W, LARGE, OUT, SCALE, N, K, ALIGNED, TILE: tl.constexpr):
    n = tl.program_id(0) * TILE + tl.arange(0, TILE)
    k = tl.program_id(1) * TILE + tl.arange(0, TILE)
    factor = _factor(tl.load(LARGE + k, k < K, 0.0).to(tl.float32))
    inside = (n[:, None] < N) & (k[None, :] < K)
    w = tl.load(W + n[:, None].to(tl.int64) * K + k[None, :], inside, 0.0).to(tl.float32)
    at, inside = k[:, None].to(tl.int64) * ALIGNED + n[None, :], (k[:, None] < K) & (n[None, :] < ALIGNED)
    _store_columns(w, factor, OUT, SCALE, at, inside, k, K, tl.program_id(0) == 0)


def quantize_columns(w_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    w_NK = w_NK.contiguous()
    N, K = w_NK.shape
    largest = torch.linalg.vector_norm(w_NK, float("inf"), dim=0) if N else w_NK.new_zeros(K)
    out = _empty_columns(w_NK)
    scale = w_NK.new_empty(K, 1, dtype=torch.float32)
    _columns[(triton.cdiv(N, TILE), triton.cdiv(K, TILE))](
        w_NK, largest, out, scale, N, K, out.stride(0), TILE=TILE, num_warps=4
    )
    return out, scale


@triton.jit(do_not_specialize=["T"])
def _both(X, LARGE_T, LARGE_K, ROWS, SCALE_T, COLUMNS, SCALE_K, T, K, ALIGNED, TILE: tl.constexpr):
    t, k = tl.program_id(1) * TILE + tl.arange(0, TILE), tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = (t[:, None] < T) & (k[None, :] < K)
    at = t[:, None].to(tl.int64) * K + k[None, :]
    x = tl.load(X + at, inside, 0.0).to(tl.float32)
    factor_t, factor_k = _factor(tl.load(LARGE_T + t, t < T, 0.0)), _factor(tl.load(LARGE_K + k, k < K, 0.0))
    _store_rows(x, factor_t, ROWS, SCALE_T, at, inside, t, T, tl.program_id(0) == 0)
    at, inside = k[:, None].to(tl.int64) * ALIGNED + t[None, :], (k[:, None] < K) & (t[None, :] < ALIGNED)
    _store_columns(x, factor_k, COLUMNS, SCALE_K, at, inside, k, K, tl.program_id(1) == 0)


def quantize_both(x_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The results of `quantize_rows` and `quantize_columns`; x is read twice instead of three times."""
    x_TK = x_TK.contiguous()
    T, K = x_TK.shape
    parts = _align(T), K
    largest = torch.zeros(sum(parts), dtype=torch.int32, device=x_TK.device)
    large_T, large_K = largest.view(torch.float32).split(parts)
    grid = triton.cdiv(T, STRIP["STRIP"]), triton.cdiv(K, WIDTH)
    _maxima[grid](x_TK, *largest.split(parts), T, K, **STRIP, BK=WIDTH, STAGES=4)
    rows, columns = torch.empty_like(x_TK, dtype=torch.float8_e4m3fn), _empty_columns(x_TK)
    scale_T, scale_K = (x_TK.new_empty(n, 1, dtype=torch.float32) for n in (T, K))
    args = (x_TK, large_T, large_K, rows, scale_T, columns, scale_K, T, K, columns.stride(0))
    _both[(triton.cdiv(K, TILE), triton.cdiv(T, TILE))](*args, TILE=TILE, num_warps=4)
    return rows, scale_T, columns, scale_K


@triton.jit
def _swiglu_rows(GATE, UP, OUT, SCALE, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < F
    gate = tl.load(GATE + row * F + at, mask, 0.0)
    g, u = gate.to(tl.float32), tl.load(UP + row * F + at, mask, 0.0).to(tl.float32)
    silu = (g * tl.sigmoid(g)).to(gate.dtype).to(tl.float32)
    product = (silu * u).to(gate.dtype).to(tl.float32)
    factor = _factor(tl.max(tl.abs(product)))
    tl.store(OUT + row * F + at, (product * factor).to(tl.float8e4nv), mask)
    tl.store(SCALE + row, 1 / factor)


def quantize_swiglu_rows(gate_TF: torch.Tensor, up_TF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_rows` of silu(gate) · up, which is not written."""
    T, F = gate_TF.shape
    out, scale = torch.empty_like(gate_TF, dtype=torch.float8_e4m3fn), gate_TF.new_empty(T, 1, dtype=torch.float32)
    block = triton.next_power_of_2(F)
    _swiglu_rows[(T,)](gate_TF, up_TF, out, scale, F, BLOCK=block, num_warps=choose_warps(block))
    return out, scale


@triton.jit
def _swiglu_gradients(GATE, UP, D, at, inside):
    """The gradients of gate and up, and silu(gate) · up, rounded as where each is written (elementwise_kernels.py)."""
    gate = tl.load(GATE + at, inside, 0.0)
    dtype = gate.dtype
    g, u = gate.to(tl.float32), tl.load(UP + at, inside, 0.0).to(tl.float32)
    d = tl.load(D + at, inside, 0.0).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    silu = (g * sigmoid).to(dtype).to(tl.float32)
    d_gate = (d * u * (sigmoid * (1 + g * (1 - sigmoid)))).to(dtype).to(tl.float32)
    return d_gate, (d * silu).to(dtype).to(tl.float32), (silu * u).to(dtype).to(tl.float32)


@triton.jit(do_not_specialize=["T"])
def _swiglu_maxima(
    GATE, UP, D, ROWS_GATE, ROWS_UP, GATES, UPS, PRODUCTS, T, F,
    STRIP: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`_maxima` of rows and columns of both gradients, and of columns of the product."""
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    gates, ups, products = (
        tl.zeros([BT, BF], tl.float32),
        tl.zeros([BT, BF], tl.float32),
        tl.zeros([BT, BF], tl.float32),
    )
    for i in tl.range(0, STRIP, BT, num_stages=STAGES):
        t = tl.program_id(0) * STRIP + i + tl.arange(0, BT)
        inside = (t[:, None] < T) & (f[None, :] < F)
        d_gate, d_up, product = _swiglu_gradients(GATE, UP, D, t[:, None].to(tl.int64) * F + f[None, :], inside)
        d_gate, d_up = tl.abs(d_gate), tl.abs(d_up)
        _raise_to(ROWS_GATE + t, tl.max(d_gate, 1), t < T)
        _raise_to(ROWS_UP + t, tl.max(d_up, 1), t < T)
        gates, ups = tl.maximum(gates, d_gate), tl.maximum(ups, d_up)
        products = tl.maximum(products, tl.abs(product))
    _raise_to(GATES + f, tl.max(gates, 0), f < F)
    _raise_to(UPS + f, tl.max(ups, 0), f < F)
    _raise_to(PRODUCTS + f, tl.max(products, 0), f < F)


@triton.jit(do_not_specialize=["T"])
def _swiglu_both(
    GATE, UP, D, LARGE, SCALES, GATE_ROWS, UP_ROWS, GATE_COLUMNS, UP_COLUMNS, PRODUCT_COLUMNS, T, F, ALIGNED,
    ROOM, BT: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """LARGE and SCALES: of rows of both gradients, each in ROOM numbers, then of columns of both and of the product."""
    t, f = tl.program_id(1) * BT + tl.arange(0, BT), tl.program_id(0) * BF + tl.arange(0, BF)
    inside = (t[:, None] < T) & (f[None, :] < F)
    at = t[:, None].to(tl.int64) * F + f[None, :]
    d_gate, d_up, product = _swiglu_gradients(GATE, UP, D, at, inside)
    first = tl.program_id(0) == 0
    _store_rows(d_gate, _factor(tl.load(LARGE + t, t < T, 0.0)), GATE_ROWS, SCALES, at, inside, t, T, first)
    _store_rows(d_up, _factor(tl.load(LARGE + ROOM + t, t < T, 0.0)), UP_ROWS, SCALES + ROOM, at, inside, t, T, first)
    at = f[:, None].to(tl.int64) * ALIGNED + t[None, :]
    inside, first = (f[:, None] < F) & (t[None, :] < ALIGNED), tl.program_id(1) == 0
    LARGE += 2 * ROOM
    SCALES += 2 * ROOM
    _store_columns(d_gate, _factor(tl.load(LARGE + f, f < F, 0.0)), GATE_COLUMNS, SCALES, at, inside, f, F, first)
    _store_columns(d_up, _factor(tl.load(LARGE + F + f, f < F, 0.0)), UP_COLUMNS, SCALES + F, at, inside, f, F, first)
    LARGE += 2 * F
    SCALES += 2 * F
    _store_columns(product, _factor(tl.load(LARGE + f, f < F, 0.0)), PRODUCT_COLUMNS, SCALES, at, inside, f, F, first)


def quantize_swiglu_backward(
    gate_TF: torch.Tensor, up_TF: torch.Tensor, d_TF: torch.Tensor
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...], tuple[torch.Tensor, torch.Tensor]]:
    """`quantize_both` of the gradients of gate and up, and `quantize_columns` of silu(gate) · up.

    None of the three is written: they are computed twice, once for their maxima.
    """
    T, F = gate_TF.shape
    room = _align(T)
    parts = room, room, F, F, F
    largest = torch.zeros(sum(parts), dtype=torch.int32, device=gate_TF.device)
    scales = torch.empty_like(largest, dtype=torch.float32)
    given = gate_TF, up_TF, d_TF.contiguous()
    grid = triton.cdiv(T, STRIP["STRIP"]), triton.cdiv(F, SWIGLU_WIDTH)
    _swiglu_maxima[grid](*given, *largest.split(parts), T, F, **STRIP, BF=SWIGLU_WIDTH, STAGES=3)
    rows = [torch.empty_like(gate_TF, dtype=torch.float8_e4m3fn) for _ in range(2)]
    columns = [_empty_columns(gate_TF) for _ in range(3)]
    args = (*given, largest.view(torch.float32), scales, *rows, *columns, T, F, columns[0].stride(0), room)
    _swiglu_both[(triton.cdiv(F, 64), triton.cdiv(T, 32))](*args, BT=32, BF=64, num_warps=4)
    gate_T, up_T, gate_F, up_F, product_F = (scale[:, None] for scale in scales.split(parts))
    gate, up = (rows[0], gate_T[:T], columns[0], gate_F), (rows[1], up_T[:T], columns[1], up_F)
    return gate, up, (columns[2], product_F)


def _align(n: int) -> int:
    """Whatever follows begins at a multiple of ALIGNMENT: several numbers are read at once, and there is one kernel for
    all numbers of tokens."""
    return triton.cdiv(n, ALIGNMENT) * ALIGNMENT


def _empty_columns(x_TK: torch.Tensor) -> torch.Tensor:
    """For x^T in fp8, with rows that begin at multiples of ALIGNMENT. What is between them must be zeros."""
    T, K = x_TK.shape
    return x_TK.new_empty(K, _align(T), dtype=torch.float8_e4m3fn)[:, :T]
