"""The functions of `elementwise.py` as GPU kernels (Triton): each reads and writes memory once.

They round where the PyTorch definitions round, so that results differ by the order of sums alone. The number of tokens
is an ordinary argument, so that a new number does not trigger a compilation.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from xtuner.data.packing.pack import IGNORE


def choose_warps(block: int) -> int:
    """Warps of a program that processes `block` numbers."""
    return 16 if block >= 8192 else 8 if block >= 2048 else 4


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
def _rms_norm_backward(D, X, W, RES, DX, DW, T, H, eps, HAS_RES: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    mask = at < H
    w = tl.load(W + at, mask, 0.0).to(tl.float32)
    dw = tl.zeros([BLOCK], tl.float32)
    first, programs = tl.program_id(0), tl.num_programs(0)
    for i in range(0, (T - first + programs - 1) // programs):
        row = (first.to(tl.int64) + i * programs) * H
        x = tl.load(X + row + at, mask, 0.0)
        dtype = x.dtype
        x = x.to(tl.float32)
        d = tl.load(D + row + at, mask, 0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x) / H + eps)
        normed = x * scale
        dw += d * normed.to(dtype).to(tl.float32)
        d = d * w
        dx = scale * (d - normed * (tl.sum(d * normed) / H))
        if HAS_RES:
            dx += tl.load(RES + row + at, mask, 0.0).to(tl.float32)
        tl.store(DX + row + at, dx.to(dtype), mask)
    tl.store(DW + first.to(tl.int64) * H + at, dw, mask)


def rms_norm_backward(
    d_TH: torch.Tensor, x_TH: torch.Tensor, w_H: torch.Tensor, eps: float, residual_TH: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    T, H = x_TH.shape
    programs = min(T, 264)  # two per multiprocessor of an H100
    dx, dw = torch.empty_like(x_TH), torch.empty(programs, H, dtype=torch.float32, device=x_TH.device)
    block = triton.next_power_of_2(H)
    args = (d_TH.contiguous(), x_TH, w_H, x_TH if residual_TH is None else residual_TH.contiguous(), dx, dw, T, H, eps)
    _rms_norm_backward[(programs,)](*args, HAS_RES=residual_TH is not None, BLOCK=block, num_warps=choose_warps(block))
    return dx, dw.sum(0)


@triton.jit
def _split_rotate(
    QKV, COS, SIN, Q, K, V,
    KV: tl.constexpr, G: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    BACKWARD: tl.constexpr,
):  # fmt: skip
    """One token. QKV has the heads group by group: G queries, k, v. Q, K and V have one kind of heads each."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, WIDTH)[None, :]
    inside = (head < KV * (G + 2)) & (pair < HALF)
    group, member = head // (G + 2), head % (G + 2)
    is_q, is_k, is_v = inside & (member < G), inside & (member == G), inside & (member == G + 1)
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
    first = tl.where(is_v, a, (a32 * cos - b32 * sin).to(a.dtype))
    second = tl.where(is_v, b, (b32 * cos + a32 * sin).to(a.dtype))
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


def _rotate(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: tuple[torch.Tensor, ...], backward: bool
) -> None:
    q, k, v = heads
    T, kv_heads, head_dim = k.shape
    groups = q.shape[1] // kv_heads
    shape: dict[str, Any] = dict(KV=kv_heads, G=groups, HALF=head_dim // 2)
    shape |= dict(
        HEADS=triton.next_power_of_2(kv_heads * (groups + 2)), WIDTH=triton.next_power_of_2(max(head_dim // 2, 16))
    )
    _split_rotate[(T,)](qkv, cos, sin, q, k, v, **shape, BACKWARD=backward, num_warps=8)


def split_rotate(
    qkv: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor, kv_heads: int, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    T, width = qkv.shape
    queries = width // head_dim - 2 * kv_heads
    heads = tuple(qkv.new_empty(T, n, head_dim) for n in (queries, kv_heads, kv_heads))
    _rotate(qkv, cos_TD, sin_TD, heads, backward=False)
    return heads  # type: ignore[return-value]


def split_rotate_backward(
    dq_TND: torch.Tensor, dk_TKD: torch.Tensor, dv_TKD: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor
) -> torch.Tensor:
    T, kv_heads, head_dim = dk_TKD.shape
    d = dq_TND.new_empty(T, (dq_TND.shape[1] + 2 * kv_heads) * head_dim)
    heads = tuple(x.contiguous() for x in (dq_TND, dk_TKD, dv_TKD))
    _rotate(d, cos_TD, sin_TD, heads, backward=True)
    return d


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
