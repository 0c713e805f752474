"""Scaling and rounding to fp8 as GPU kernels (Triton). Defined in `matmul.py`."""

import torch
import triton
import triton.language as tl

from xtuner.model.ops.elementwise_kernels import choose_warps, raise_to
from xtuner.model.ops.maxima import Maxima, align, new_maxima

E4M3_MAX, ZERO_BELOW = tl.constexpr(448.0), tl.constexpr(1e-30)
TILE = 64
STRIP = dict(STRIP=128, BT=4, num_warps=2)  # rows of a program that looks for maxima, and of one of its steps
WIDTH, SWIGLU_WIDTH = 256, 128  # its columns
NORM_PROGRAMS, NORM_STAGES = 528, 3  # that norm and keep maxima of columns: four per multiprocessor of an H100


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


@triton.jit(do_not_specialize=["T"])
def _maxima(
    X, ROWS, COLUMNS, T, K,
    OF_ROWS: tl.constexpr, STRIP: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The largest magnitudes of columns, and OF_ROWS. A program reads STRIP rows; columns' maxima stay in registers."""
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    largest = tl.zeros([BT, BK], tl.float32)
    for i in tl.range(0, STRIP, BT, num_stages=STAGES):
        t = tl.program_id(0) * STRIP + i + tl.arange(0, BT)
        inside = (t[:, None] < T) & (k[None, :] < K)
        x = tl.abs(tl.load(X + t[:, None].to(tl.int64) * K + k[None, :], inside, 0.0).to(tl.float32))
        if OF_ROWS:
            raise_to(ROWS + t, tl.max(x, 1), t < T)
        largest = tl.maximum(largest, x)
    raise_to(COLUMNS + k, tl.max(largest, 0), k < K)


def _find_maxima(x_TK: torch.Tensor, of_rows: torch.Tensor | None, of_columns: torch.Tensor) -> None:
    """Raise them, which are zeros; x is contiguous."""
    T, K = x_TK.shape
    grid = triton.cdiv(T, STRIP["STRIP"]), triton.cdiv(K, WIDTH)
    args = (x_TK, of_columns if of_rows is None else of_rows, of_columns, T, K)
    _maxima[grid](*args, OF_ROWS=of_rows is not None, **STRIP, BK=WIDTH, STAGES=4)


def find_column_maxima(w_NK: torch.Tensor) -> torch.Tensor:
    """The largest magnitudes of columns, [K], as bits of fp32 numbers in int32."""
    largest = torch.zeros(w_NK.shape[1], dtype=torch.int32, device=w_NK.device)
    _find_maxima(w_NK.contiguous(), None, largest)
    return largest


@triton.jit(do_not_specialize=["T"])
def _columns(X, FACTORS, W, LARGE, OUT, SCALE, T, K, ALIGNED, NORM: tl.constexpr, TILE: tl.constexpr):
    """NORM: of x times a factor for each row times W, rounded as `_rms_norm` rounds (elementwise_kernels.py)."""
    t = tl.program_id(0) * TILE + tl.arange(0, TILE)
    k = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = (t[:, None] < T) & (k[None, :] < K)
    x = tl.load(X + t[:, None].to(tl.int64) * K + k[None, :], inside, 0.0)
    dtype = x.dtype
    x = x.to(tl.float32)
    if NORM:
        x = (x * tl.load(FACTORS + t, t < T, 0.0)[:, None]).to(dtype).to(tl.float32)
        x = (x * tl.load(W + k, k < K, 0.0).to(tl.float32)[None, :]).to(dtype).to(tl.float32)
    at, inside = k[:, None].to(tl.int64) * ALIGNED + t[None, :], (k[:, None] < K) & (t[None, :] < ALIGNED)
    factor = _factor(tl.load(LARGE + k, k < K, 0.0))
    _store_columns(x, factor, OUT, SCALE, at, inside, k, K, tl.program_id(0) == 0)


def _quantize_columns(
    x_TK: torch.Tensor, maxima_K: torch.Tensor, factors_T: torch.Tensor, w_K: torch.Tensor, norm: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    T, K = x_TK.shape
    out, scale = _empty_columns(x_TK), x_TK.new_empty(K, 1, dtype=torch.float32)
    args = (x_TK, factors_T, w_K, maxima_K.view(torch.float32), out, scale, T, K, out.stride(0))
    _columns[(triton.cdiv(T, TILE), triton.cdiv(K, TILE))](*args, NORM=norm, TILE=TILE, num_warps=4)
    return out, scale


def quantize_columns(x_TK: torch.Tensor, maxima_K: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Args: maxima_K: as `find_column_maxima` finds them, if they are known."""
    x_TK = x_TK.contiguous()
    return _quantize_columns(x_TK, find_column_maxima(x_TK) if maxima_K is None else maxima_K, x_TK, x_TK, False)


@triton.jit(do_not_specialize=["T"])
def _norm_rows(
    X, ADD, W, SUM, OUT, SCALE, FACTORS, LARGE, T, H, eps,
    HAS_ADD: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`_rms_norm` in fp8, rounded as there before; COLUMNS: keeps FACTORS, and raises LARGE once for all its rows."""
    at = tl.max_contiguous(tl.arange(0, BLOCK), 8)  # a thread has the numbers that it has there: sums in the same order
    mask = at < H
    w = tl.load(W + at, mask, 0.0).to(tl.float32)
    largest = tl.zeros([BLOCK], tl.float32)
    first, programs = tl.program_id(0), tl.num_programs(0)
    for i in tl.range(0, (T - first + programs - 1) // programs, num_stages=STAGES):
        t = first.to(tl.int64) + i * programs
        row = t * H
        x = tl.load(X + row + at, mask, 0.0)
        dtype = x.dtype
        x = x.to(tl.float32)
        if HAS_ADD:
            x = (x + tl.load(ADD + row + at, mask, 0.0).to(tl.float32)).to(dtype)
            tl.store(SUM + row + at, x, mask)
            x = x.to(tl.float32)
        norm = tl.rsqrt(tl.sum(x * x) / H + eps)
        x = ((x * norm).to(dtype).to(tl.float32) * w).to(dtype).to(tl.float32)
        size = tl.abs(x)
        factor = _factor(tl.max(size))
        tl.store(OUT + row + at, (x * factor).to(tl.float8e4nv), mask)
        tl.store(SCALE + t, 1 / factor)
        if COLUMNS:
            tl.store(FACTORS + t, norm)
            largest = tl.maximum(largest, size)
    if COLUMNS:
        raise_to(LARGE + at, largest, mask)


def quantize_norm_rows(
    x_TH: torch.Tensor, w_H: torch.Tensor, eps: float, add_TH: torch.Tensor | None, columns: bool
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]:
    """(x + add, `quantize_rows` of its RMS norm times w, which is not written, what `quantize_norm_columns` needs).

    Args:
        columns: whether that is needed: 1 / rms [T], and the largest magnitudes of columns [H].
    """
    x_TH, (T, H) = x_TH.contiguous(), x_TH.shape
    total = x_TH if add_TH is None else torch.empty_like(x_TH)
    out, scale = torch.empty_like(x_TH, dtype=torch.float8_e4m3fn), x_TH.new_empty(T, 1, dtype=torch.float32)
    kept: tuple[torch.Tensor, ...] = ()
    if columns:
        kept = x_TH.new_empty(T, dtype=torch.float32), torch.zeros(H, dtype=torch.int32, device=x_TH.device)
    programs, stages = (min(T, NORM_PROGRAMS), NORM_STAGES) if columns else (T, 1)
    block = triton.next_power_of_2(H)
    added = x_TH if add_TH is None else add_TH.contiguous()
    args = (x_TH, added, w_H, total, out, scale, *(kept or (scale, scale)), T, H, eps)
    shape = dict(HAS_ADD=add_TH is not None, COLUMNS=columns, BLOCK=block, STAGES=stages)
    _norm_rows[(programs,)](*args, **shape, num_warps=choose_warps(block))
    return total, (out, scale), kept


def quantize_norm_columns(
    x_TH: torch.Tensor, w_H: torch.Tensor, factors_T: torch.Tensor, maxima_H: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_columns` of the norm that `quantize_norm_rows` converted by rows."""
    return _quantize_columns(x_TH.contiguous(), maxima_H, factors_T, w_H, True)


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


def quantize_both(
    x_TK: torch.Tensor, maxima: Maxima | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The results of `quantize_rows` and `quantize_columns`; x is read twice instead of three times, and once if its
    `maxima` are known."""
    x_TK = x_TK.contiguous()
    T, K = x_TK.shape
    if maxima is None:
        maxima = new_maxima(T, K, x_TK.device)
        _find_maxima(x_TK, *maxima)
    rows, columns = torch.empty_like(x_TK, dtype=torch.float8_e4m3fn), _empty_columns(x_TK)
    scale_T, scale_K = (x_TK.new_empty(n, 1, dtype=torch.float32) for n in (T, K))
    large_T, large_K = (large.view(torch.float32) for large in maxima)
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
        raise_to(ROWS_GATE + t, tl.max(d_gate, 1), t < T)
        raise_to(ROWS_UP + t, tl.max(d_up, 1), t < T)
        gates, ups = tl.maximum(gates, d_gate), tl.maximum(ups, d_up)
        products = tl.maximum(products, tl.abs(product))
    raise_to(GATES + f, tl.max(gates, 0), f < F)
    raise_to(UPS + f, tl.max(ups, 0), f < F)
    raise_to(PRODUCTS + f, tl.max(products, 0), f < F)


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
    room = align(T)
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


def _empty_columns(x_TK: torch.Tensor) -> torch.Tensor:
    """For x^T in fp8, with rows that begin at multiples of ALIGNMENT. What is between them must be zeros."""
    T, K = x_TK.shape
    return x_TK.new_empty(K, align(T), dtype=torch.float8_e4m3fn)[:, :T]
