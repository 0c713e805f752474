"""The functions of `elementwise.py` as GPU kernels (Triton): each reads and writes memory once.

They round where the PyTorch definitions round, so that results differ by the order of sums alone. The number of tokens
is an ordinary argument, so that a new number does not trigger a compilation.

Those that compute the gradient of a product's result also find its largest magnitudes, if `maxima` are given, zeros.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from xtuner.data.packing.raw_pack import IGNORE
from xtuner.model.ops.maxima import Maxima

PROGRAMS = 264  # that keep sums or maxima of columns in registers: two per multiprocessor of an H100


def choose_warps(block: int) -> int:
    """Warps of a program that processes `block` numbers."""
    return 16 if block >= 8192 else 8 if block >= 2048 else 4


@triton.jit
def raise_to(LARGE, x, mask):
    """LARGE = max(LARGE, x), x ≥ 0: as the bits of such numbers are ordered like integers, one operation of memory."""
    tl.atomic_max(LARGE, x.to(tl.int32, bitcast=True), mask, sem="relaxed")


@triton.jit
def _store_maximum(ROW, x):
    """The largest of a row's numbers, x ≥ 0, as its bits."""
    tl.store(ROW, tl.max(x).to(tl.int32, bitcast=True))


@triton.jit
def _raise_heads(ROW, first, second, largest_first, largest_second):
    """Both halves of the heads: the row's maximum is stored, those of columns are returned."""
    first, second = tl.abs(first.to(tl.float32)), tl.abs(second.to(tl.float32))
    _store_maximum(ROW, tl.maximum(first, second))
    return tl.maximum(largest_first, first), tl.maximum(largest_second, second)


@triton.jit
def _rms_norm(X, ADD, W, SUM, OUT, H, eps, HAS_ADD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * H
    at = tl.arange(0, BLOCK)
    mask = at < H
    x = tl.load(X + row + at, mask, 0.0)
    dtype = x.dtype
    x = x.to(tl.float32)
    if HAS_ADD:
        x = (x + tl.load(ADD + row + at, mask, 0.0).to(tl.float32)).to(dtype)
        tl.store(SUM + row + at, x, mask)
        x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x) / H + eps)
    w = tl.load(W + at, mask, 0.0).to(tl.float32)
    tl.store(OUT + row + at, ((x * scale).to(dtype).to(tl.float32) * w).to(dtype), mask)


def rms_norm(
    x_TH: torch.Tensor, w_H: torch.Tensor, eps: float, add_TH: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    T, H = x_TH.shape
    total = x_TH if add_TH is None else torch.empty_like(x_TH)
    out, block = torch.empty_like(x_TH), triton.next_power_of_2(H)
    args = (x_TH, x_TH if add_TH is None else add_TH, w_H, total, out, H, eps)
    _rms_norm[(T,)](*args, HAS_ADD=add_TH is not None, BLOCK=block, num_warps=choose_warps(block))
    return total, out


@triton.jit(do_not_specialize=["T"])
def _rms_norm_backward(
    D, X, W, RES, DX, DW, ROWS, COLUMNS, T, H, eps,
    HAS_RES: tl.constexpr, MAXIMA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """MAXIMA: ROWS and COLUMNS are raised to the largest magnitudes in x's gradient."""
    at = tl.arange(0, BLOCK)
    mask = at < H
    w = tl.load(W + at, mask, 0.0).to(tl.float32)
    dw, largest = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    first, programs = tl.program_id(0), tl.num_programs(0)
    for i in range(0, (T - first + programs - 1) // programs):
        t = first.to(tl.int64) + i * programs
        row = t * H
        x = tl.load(X + row + at, mask, 0.0)
        dtype = x.dtype
        x = x.to(tl.float32)
        d = tl.load(D + row + at, mask, 0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x) / H + eps)
        normed = x * scale
        dw += d * normed.to(dtype).to(tl.float32)
        d = d * w
        dx = scale * tl.fma(-normed, tl.sum(d * normed) / H, d)
        if HAS_RES:
            dx += tl.load(RES + row + at, mask, 0.0).to(tl.float32)
        dx = dx.to(dtype)
        tl.store(DX + row + at, dx, mask)
        if MAXIMA:
            size = tl.where(mask, tl.abs(dx.to(tl.float32)), 0.0)
            _store_maximum(ROWS + t, size)
            largest = tl.maximum(largest, size)
    if MAXIMA:
        raise_to(COLUMNS + at, largest, mask)
    tl.store(DW + first.to(tl.int64) * H + at, dw, mask)


def rms_norm_backward(
    d_TH: torch.Tensor, x_TH: torch.Tensor, w_H: torch.Tensor, eps: float, residual_TH: torch.Tensor | None,
    maxima: Maxima | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    T, H = x_TH.shape
    programs = min(T, PROGRAMS)
    dx, dw = torch.empty_like(x_TH), torch.empty(programs, H, dtype=torch.float32, device=x_TH.device)
    block = triton.next_power_of_2(H)
    residual = x_TH if residual_TH is None else residual_TH.contiguous()
    args = (d_TH.contiguous(), x_TH, w_H, residual, dx, dw, *(maxima or (dw, dw)), T, H, eps)
    shape: dict[str, Any] = dict(HAS_RES=residual_TH is not None, MAXIMA=maxima is not None, BLOCK=block)
    _rms_norm_backward[(programs,)](*args, **shape, num_warps=choose_warps(block))
    return dx, dw.sum(0)


@triton.jit
def _rotate(a, b, cos, sin):
    """Both halves of heads, fp32. As in all gradients that may come with maxima, it is fixed which product is rounded
    before another is added: compilers choose either, not the same in all variants of a kernel."""
    return tl.fma(a, cos, b * -sin), tl.fma(b, cos, a * sin)


@triton.jit(do_not_specialize=["T"])
def _split_rotate(
    QKV, COS, SIN, Q, K, V, WQ, WK, ROWS, COLUMNS, T, eps,
    KV: tl.constexpr, G: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    BACKWARD: tl.constexpr, NORM: tl.constexpr, MAXIMA: tl.constexpr,
):  # fmt: skip
    """One token. QKV has the heads group by group: G queries, k, v. Q, K and V have one kind of heads each.

    NORM: q and k are normalized and multiplied by WQ and WK before the rotation (forward only).
    MAXIMA: several tokens; ROWS and COLUMNS are raised to the largest magnitudes in QKV (backward only).
    """
    head = tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, WIDTH)[None, :]
    inside = (head < KV * (G + 2)) & (pair < HALF)
    group, member = head // (G + 2), head % (G + 2)
    is_q, is_k, is_v = inside & (member < G), inside & (member == G), inside & (member == G + 1)
    largest_first, largest_second = tl.zeros([HEADS, WIDTH], tl.float32), tl.zeros([HEADS, WIDTH], tl.float32)
    program, programs = tl.program_id(0), tl.num_programs(0)
    for i in range(0, (T - program + programs - 1) // programs if MAXIMA else 1):
        token = program.to(tl.int64) + i * programs
        joint = QKV + (token * (KV * (G + 2)) + head) * (2 * HALF) + pair
        q = Q + (token * (KV * G) + group * G + member) * (2 * HALF) + pair
        k = K + (token * KV + group) * (2 * HALF) + pair
        v = V + (token * KV + group) * (2 * HALF) + pair
        cos = tl.load(COS + token * HALF + pair, pair < HALF, 0.0)
        sin = tl.load(SIN + token * HALF + pair, pair < HALF, 0.0)
        if BACKWARD:
            a = tl.load(q, is_q, 0.0) + tl.load(k, is_k, 0.0) + tl.load(v, is_v, 0.0)  # one of the three
            b = tl.load(q + HALF, is_q, 0.0) + tl.load(k + HALF, is_k, 0.0) + tl.load(v + HALF, is_v, 0.0)
            sin = -sin
        else:
            a = tl.load(joint, inside, 0.0)
            b = tl.load(joint + HALF, inside, 0.0)
        a32, b32 = a.to(tl.float32), b.to(tl.float32)
        if NORM:
            scale = tl.rsqrt(tl.sum(a32 * a32 + b32 * b32, 1) / (2 * HALF) + eps)[:, None]
            w_first, w_second = _load_head_weights(WQ, WK, member < G, pair, HALF)
            a32 = ((a32 * scale).to(a.dtype).to(tl.float32) * w_first).to(a.dtype).to(tl.float32)
            b32 = ((b32 * scale).to(a.dtype).to(tl.float32) * w_second).to(a.dtype).to(tl.float32)
        a32, b32 = _rotate(a32, b32, cos, sin)
        first, second = tl.where(is_v, a, a32.to(a.dtype)), tl.where(is_v, b, b32.to(a.dtype))
        if BACKWARD:
            tl.store(joint, first, inside)
            tl.store(joint + HALF, second, inside)
        else:
            tl.store(q, first, is_q)
            tl.store(q + HALF, second, is_q)
            tl.store(k, first, is_k)
            tl.store(k + HALF, second, is_k)
            tl.store(v, first, is_v)
            tl.store(v + HALF, second, is_v)
        if MAXIMA:
            largest_first, largest_second = _raise_heads(ROWS + token, first, second, largest_first, largest_second)
    if MAXIMA:
        column = COLUMNS + head * (2 * HALF) + pair
        raise_to(column, largest_first, inside)
        raise_to(column + HALF, largest_second, inside)


@triton.jit
def _load_head_weights(WQ, WK, is_q, pair, HALF: tl.constexpr):
    """Both halves of each head's weights, fp32 [HEADS, WIDTH]."""
    first = tl.where(is_q, tl.load(WQ + pair, pair < HALF, 0.0), tl.load(WK + pair, pair < HALF, 0.0))
    second = tl.where(is_q, tl.load(WQ + HALF + pair, pair < HALF, 0.0), tl.load(WK + HALF + pair, pair < HALF, 0.0))
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit(do_not_specialize=["T"])
def _split_norm_rotate_backward(
    D, QKV, COS, SIN, Q, K, V, WQ, WK, DW, ROWS, COLUMNS, T, eps,
    KV: tl.constexpr, G: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    MAXIMA: tl.constexpr,
):  # fmt: skip
    """Several tokens. Q, K and V are gradients, D that of QKV; DW has a program's sums of those of WQ and WK.

    MAXIMA: ROWS and COLUMNS are raised to the largest magnitudes in D.
    """
    head = tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, WIDTH)[None, :]
    inside = (head < KV * (G + 2)) & (pair < HALF)
    group, member = head // (G + 2), head % (G + 2)
    is_q, is_k, is_v = inside & (member < G), inside & (member == G), inside & (member == G + 1)
    w_first, w_second = _load_head_weights(WQ, WK, member < G, pair, HALF)
    dw_first, dw_second = tl.zeros([HEADS, WIDTH], tl.float32), tl.zeros([HEADS, WIDTH], tl.float32)
    largest_first, largest_second = tl.zeros([HEADS, WIDTH], tl.float32), tl.zeros([HEADS, WIDTH], tl.float32)
    program, programs = tl.program_id(0), tl.num_programs(0)
    for i in range(0, (T - program + programs - 1) // programs):
        token = program.to(tl.int64) + i * programs
        joint = (token * (KV * (G + 2)) + head) * (2 * HALF) + pair
        q = Q + (token * (KV * G) + group * G + member) * (2 * HALF) + pair
        k = K + (token * KV + group) * (2 * HALF) + pair
        v = V + (token * KV + group) * (2 * HALF) + pair
        cos = tl.load(COS + token * HALF + pair, pair < HALF, 0.0)
        sin = tl.load(SIN + token * HALF + pair, pair < HALF, 0.0)
        a = tl.load(q, is_q, 0.0) + tl.load(k, is_k, 0.0) + tl.load(v, is_v, 0.0)  # one of the three
        b = tl.load(q + HALF, is_q, 0.0) + tl.load(k + HALF, is_k, 0.0) + tl.load(v + HALF, is_v, 0.0)
        dtype = a.dtype
        first, second = _rotate(a.to(tl.float32), b.to(tl.float32), cos, -sin)
        first, second = first.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32)
        x_first = tl.load(QKV + joint, inside, 0.0).to(tl.float32)
        x_second = tl.load(QKV + joint + HALF, inside, 0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(tl.fma(x_second, x_second, x_first * x_first), 1) / (2 * HALF) + eps)[:, None]
        x_first, x_second = x_first * scale, x_second * scale
        dw_first += first * x_first.to(dtype).to(tl.float32)
        dw_second += second * x_second.to(dtype).to(tl.float32)
        first, second = first * w_first, second * w_second
        mean = (tl.sum(tl.fma(second, x_second, first * x_first), 1) / (2 * HALF))[:, None]
        first = tl.where(is_v, a, (scale * tl.fma(-x_first, mean, first)).to(dtype))
        second = tl.where(is_v, b, (scale * tl.fma(-x_second, mean, second)).to(dtype))
        tl.store(D + joint, first, inside)
        tl.store(D + joint + HALF, second, inside)
        if MAXIMA:
            largest_first, largest_second = _raise_heads(ROWS + token, first, second, largest_first, largest_second)
    if MAXIMA:
        column = COLUMNS + head * (2 * HALF) + pair
        raise_to(column, largest_first, inside)
        raise_to(column + HALF, largest_second, inside)
    out = DW + program.to(tl.int64) * (4 * HALF) + tl.arange(0, WIDTH)
    valid = tl.arange(0, WIDTH) < HALF
    tl.store(out, tl.sum(tl.where(is_q, dw_first, 0.0), 0), valid)
    tl.store(out + HALF, tl.sum(tl.where(is_q, dw_second, 0.0), 0), valid)
    tl.store(out + 2 * HALF, tl.sum(tl.where(is_k, dw_first, 0.0), 0), valid)
    tl.store(out + 3 * HALF, tl.sum(tl.where(is_k, dw_second, 0.0), 0), valid)


def _head_shape(num_heads: int, kv_heads: int, head_dim: int) -> dict[str, Any]:
    groups = num_heads // kv_heads
    return dict(
        KV=kv_heads, G=groups, HALF=head_dim // 2, HEADS=triton.next_power_of_2(kv_heads * (groups + 2)),
        WIDTH=triton.next_power_of_2(max(head_dim // 2, 16)),
    )  # fmt: skip


def _split(qkv: torch.Tensor, kv_heads: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Buffers for q, k and v."""
    T, width = qkv.shape
    q, k, v = (qkv.new_empty(T, n, head_dim) for n in (width // head_dim - 2 * kv_heads, kv_heads, kv_heads))
    return q, k, v


def split_rotate(
    qkv: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor, kv_heads: int, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    heads = q, _, _ = _split(qkv, kv_heads, head_dim)
    shape = _head_shape(q.shape[1], kv_heads, head_dim)
    args = (qkv, cos_TD, sin_TD, *heads, qkv, qkv, qkv, qkv, len(qkv), 0.0)
    _split_rotate[(len(qkv),)](*args, **shape, BACKWARD=False, NORM=False, MAXIMA=False, num_warps=8)
    return heads


def split_norm_rotate(
    qkv: torch.Tensor, wq_D: torch.Tensor, wk_D: torch.Tensor, eps: float, cos_TD: torch.Tensor, sin_TD: torch.Tensor,
    kv_heads: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    heads = q, _, _ = _split(qkv, kv_heads, len(wq_D))
    shape = _head_shape(q.shape[1], kv_heads, len(wq_D))
    args = (qkv, cos_TD, sin_TD, *heads, wq_D, wk_D, qkv, qkv, len(qkv), eps)
    _split_rotate[(len(qkv),)](*args, **shape, BACKWARD=False, NORM=True, MAXIMA=False, num_warps=8)
    return heads


def split_rotate_backward(
    dq_TND: torch.Tensor, dk_TKD: torch.Tensor, dv_TKD: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor,
    maxima: Maxima | None = None,
) -> torch.Tensor:  # fmt: skip
    T, kv_heads, head_dim = dk_TKD.shape
    d = dq_TND.new_empty(T, (dq_TND.shape[1] + 2 * kv_heads) * head_dim)
    heads = tuple(x.contiguous() for x in (dq_TND, dk_TKD, dv_TKD))
    shape = _head_shape(dq_TND.shape[1], kv_heads, head_dim)
    args = (d, cos_TD, sin_TD, *heads, d, d, *(maxima or (d, d)), T, 0.0)
    programs = min(T, PROGRAMS) if maxima else T
    _split_rotate[(programs,)](*args, **shape, BACKWARD=True, NORM=False, MAXIMA=maxima is not None, num_warps=8)
    return d


def split_norm_rotate_backward(
    dq_TND: torch.Tensor, dk_TKD: torch.Tensor, dv_TKD: torch.Tensor, qkv: torch.Tensor, wq_D: torch.Tensor,
    wk_D: torch.Tensor, eps: float, cos_TD: torch.Tensor, sin_TD: torch.Tensor, maxima: Maxima | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    T, kv_heads, head_dim = dk_TKD.shape
    programs = min(T, PROGRAMS)
    d, dw = torch.empty_like(qkv), torch.empty(programs, 2, head_dim, dtype=torch.float32, device=qkv.device)
    heads = tuple(x.contiguous() for x in (dq_TND, dk_TKD, dv_TKD))
    args = (d, qkv, cos_TD, sin_TD, *heads, wq_D, wk_D, dw, *(maxima or (d, d)), T, eps)
    shape = _head_shape(dq_TND.shape[1], kv_heads, head_dim)
    _split_norm_rotate_backward[(programs,)](*args, **shape, MAXIMA=maxima is not None, num_warps=16)
    dwq, dwk = dw.sum(0)
    return d, dwq, dwk


@triton.jit
def _swiglu(GATE, UP, OUT, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    gate, up = tl.load(GATE + at, mask, 0.0), tl.load(UP + at, mask, 0.0)
    g = gate.to(tl.float32)
    silu = (g * tl.sigmoid(g)).to(gate.dtype).to(tl.float32)
    tl.store(OUT + at, (silu * up.to(tl.float32)).to(gate.dtype), mask)


@triton.jit
def _swiglu_backward(GATE, UP, D, n, BLOCK: tl.constexpr):
    """GATE and UP become their gradients, D becomes silu(gate) · up."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    gate = tl.load(GATE + at, mask, 0.0)
    dtype = gate.dtype
    g, u, d = gate.to(tl.float32), tl.load(UP + at, mask, 0.0).to(tl.float32), tl.load(D + at, mask, 0.0).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    silu = (g * sigmoid).to(dtype).to(tl.float32)
    tl.store(GATE + at, (d * u * (sigmoid * (1 + g * (1 - sigmoid)))).to(dtype), mask)
    tl.store(UP + at, (d * silu).to(dtype), mask)
    tl.store(D + at, (silu * u).to(dtype), mask)


_BLOCK = 2048


def swiglu(gate_TF: torch.Tensor, up_TF: torch.Tensor) -> torch.Tensor:
    out, n = torch.empty_like(gate_TF), gate_TF.numel()
    _swiglu[(triton.cdiv(n, _BLOCK),)](gate_TF, up_TF, out, n, BLOCK=_BLOCK, num_warps=8)
    return out


def swiglu_backward_(
    gate_TF: torch.Tensor, up_TF: torch.Tensor, d_TF: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n = gate_TF.numel()
    _swiglu_backward[(triton.cdiv(n, _BLOCK),)](gate_TF, up_TF, d_TF, n, BLOCK=_BLOCK, num_warps=8)
    return gate_TF, up_TF, d_TF


@triton.jit
def _cross_entropy(
    LOGITS, TARGETS, LOSSES, scale, V, UNLEARNED: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One token: the largest logit and the sum of exponentials in a first pass, the gradient in a second."""
    token = tl.program_id(0).to(tl.int64)
    row = LOGITS + token * V
    at = tl.arange(0, BLOCK)
    target = tl.load(TARGETS + token)
    learned = target != UNLEARNED
    largest = float("-inf")
    total = 0.0
    for begin in range(0, V, BLOCK):
        x = tl.load(row + begin + at, begin + at < V, float("-inf")).to(tl.float32)
        new = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(largest - new) + tl.sum(tl.exp(x - new), 0)
        largest = new
    target_logit = tl.load(row + target, learned, 0.0).to(tl.float32)
    tl.store(LOSSES + token, tl.where(learned, tl.log(total) + largest - target_logit, 0.0))
    if GRADIENT:
        tl.debug_barrier()  # all threads have read the target's logit before it is overwritten
        factor = tl.where(learned, scale, 0.0)
        for begin in range(0, V, BLOCK):
            mask = begin + at < V
            x = tl.load(row + begin + at, mask, float("-inf"))
            d = tl.exp(x.to(tl.float32) - largest) / total
            d = tl.where(begin + at == target, d - 1.0, d)
            tl.store(row + begin + at, tl.where(learned, d * factor, 0.0).to(x.dtype), mask)


def cross_entropy_(logits_TV: torch.Tensor, targets_T: torch.Tensor, scale: float | None) -> torch.Tensor:
    T, V = logits_TV.shape
    losses = torch.empty(T, dtype=torch.float32, device=logits_TV.device)
    block = min(8192, triton.next_power_of_2(V))
    shape: dict[str, Any] = dict(UNLEARNED=IGNORE, GRADIENT=scale is not None, BLOCK=block)
    _cross_entropy[(T,)](logits_TV, targets_T, losses, scale or 0.0, V, **shape, num_warps=16)
    return losses
