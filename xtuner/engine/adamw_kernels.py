"""`adamw.update` as one GPU kernel (Triton): everything of a parameter is read once and written once.

Random bits are those of the definition, so that both round alike. Arithmetic costs as much as memory here: divisions by
what is known before are products, and constants stay within fp32's range (1e-38 would turn all of it into fp64).
"""

import torch
import triton
import triton.language as tl

ROWS = 8  # groups a program


@triton.jit
def _random(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _chosen(share, root, chance, LEVELS: tl.constexpr, POWER: tl.constexpr):
    """The code of `share` (0 … 1), rounded so that the mean of what is decoded is right. `root`: share^(1/POWER)."""
    low = tl.minimum(tl.floor(root * LEVELS), LEVELS - 1.0)
    below, above = low * (1.0 / LEVELS), (low + 1) * (1.0 / LEVELS)
    below, above = below * below, above * above
    if POWER == 4:
        below, above = below * below, above * above
    return low + (share - below > chance * (above - below)).to(tl.float32)


@triton.jit(do_not_specialize=["seed", "begin"])
def _update(
    W, G, MASTER, LOW, M, V, M_SCALE, V_SCALE, CLIP,
    n, begin, seed, rate, keep, beta1, beta2, eps, scale2,
    FORM: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    mask = at < n
    has = group * GROUP < n
    g = tl.load(G + at, mask, 0.0).to(tl.float32) * tl.load(CLIP)
    m, v = tl.load(M + at, mask, 0).to(tl.float32), tl.load(V + at, mask, 0).to(tl.float32)
    if FORM == "8bit":
        m, v = m * (1.0 / 127), v * (1.0 / 255)
        m = m * tl.abs(m) * tl.load(M_SCALE + group, has, 0.0)[:, None]
        v = v * v
        v = v * v * tl.load(V_SCALE + group, has, 0.0)[:, None]
    if FORM == "fp32":
        w = tl.load(MASTER + at, mask, 0.0)
    else:
        w = tl.load(W + at, mask, 0.0).to(tl.float32)
    if FORM == "split":
        w = (w.to(tl.int32, bitcast=True) + tl.load(LOW + at, mask, 0).to(tl.int32)).to(tl.float32, bitcast=True)
    m = m + (1 - beta1) * (g - m)
    v = v + (1 - beta2) * (g * g - v)
    w = w * keep - rate * m / (tl.sqrt(v) * scale2 + eps)
    if FORM == "fp32":
        tl.store(MASTER + at, w, mask)
        tl.store(W + at, w.to(W.dtype.element_ty), mask)
        tl.store(M + at, m, mask)
        tl.store(V + at, v, mask)
    elif FORM == "split":
        bits = w.to(tl.int32, bitcast=True)
        high = (bits + 0x8000) & -0x10000
        tl.store(LOW + at, (bits - high).to(tl.int16), mask)
        tl.store(W + at, high.to(tl.float32, bitcast=True).to(W.dtype.element_ty), mask)
        tl.store(M + at, m, mask)
        tl.store(V + at, v, mask)
    else:
        random = _random((at.to(tl.uint32) + begin.to(tl.uint32)) ^ seed.to(tl.uint32))
        high = (w.to(tl.int32, bitcast=True) + (random & 0xFFFF).to(tl.int32)) & -0x10000
        tl.store(W + at, high.to(tl.float32, bitcast=True).to(W.dtype.element_ty), mask)
        m_bits, v_bits = ((random >> 16) & 0xFF).to(tl.int32), (random >> 24).to(tl.int32)
        if FORM == "bf16":
            raw = (m.to(tl.int32, bitcast=True) + (m_bits << 8) + 0x80) & -0x10000
            tl.store(M + at, raw.to(tl.float32, bitcast=True).to(M.dtype.element_ty), mask)
            raw = (v.to(tl.int32, bitcast=True) + (v_bits << 8) + 0x80) & -0x10000
            tl.store(V + at, raw.to(tl.float32, bitcast=True).to(V.dtype.element_ty), mask)
        else:
            size = tl.abs(m)
            m_scale, v_scale = tl.max(size, 1), tl.max(v, 1)
            tl.store(M_SCALE + group, m_scale, has)
            tl.store(V_SCALE + group, v_scale, has)
            share = size * (1 / tl.maximum(m_scale, 1e-37))[:, None]
            code = _chosen(share, tl.sqrt(share), (m_bits.to(tl.float32) + 0.5) * (1.0 / 256), 127, 2)
            tl.store(M + at, tl.where(m < 0, -code, code).to(tl.int8), mask)
            share = v * (1 / tl.maximum(v_scale, 1e-37))[:, None]
            code = _chosen(share, tl.sqrt(tl.sqrt(share)), (v_bits.to(tl.float32) + 0.5) * (1.0 / 256), 255, 4)
            code = tl.where(v > 0, tl.maximum(code, 1.0), code)
            tl.store(V + at, code.to(tl.int32).to(tl.uint8), mask)


def update(
    weight: torch.Tensor,
    gradient: torch.Tensor,
    state: dict[str, torch.Tensor],
    form: str,
    group: int,
    clip: torch.Tensor,
    seed: int,
    numbers: tuple[float, ...],
    begin: int,
) -> None:
    """See `adamw.update`. `numbers`: lr / first correction, what decay leaves, β1, β2, ε, second correction^(-1/2)."""
    n, none = weight.numel(), state["exp_avg"]
    _update[(triton.cdiv(n, ROWS * group),)](
        weight, gradient, state.get("master", none), state.get("low", none), state["exp_avg"], state["exp_avg_sq"],
        state.get("exp_avg_scale", none), state.get("exp_avg_sq_scale", none), clip, n, begin, seed, *numbers,
        FORM=form, ROWS=ROWS, GROUP=group, num_warps=8,
    )  # fmt: skip
