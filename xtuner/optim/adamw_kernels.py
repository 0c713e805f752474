"""`adamw.update` as a single GPU kernel (Triton) for all parameters; all memory is read once and written once.

For a small parameter the launch takes longer than the work: one kernel for each of 171 parameters (1.8B over 4 GPUs)
took 19 ms of launches for 5 ms of work. So one kernel serves all of them, with a table of addresses that is sent in
advance.

Random bits are those of the reference, so that both round the same way. Arithmetic costs as much as memory access here:
divisions by known numbers are multiplications, and constants stay within fp32's range (1e-38 would promote to fp64).
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

ROWS = 8  # groups per program
RUN = 32  # programs that share a row of the table of runs
COLUMNS = 10  # of a parameter's row in the table of addresses
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
KINDS = {"fp32": tl.float32, "split": tl.float32, "bf16": tl.bfloat16, "8bit": tl.int8}  # of first moments


class Entry(NamedTuple):
    """The arguments of a parameter's update."""

    weight: torch.Tensor
    gradient: torch.Tensor
    state: Sequence[torch.Tensor | None]  # the rest of the master, both moments, their scales
    begin: int  # index of the first element in the full parameter
    seed: int


class Prepared(NamedTuple):
    """A step's arguments on the GPU, without rates, for parameters of one dtype with gradients of one dtype."""

    table: torch.Tensor  # [parameters, COLUMNS] int64
    runs: torch.Tensor  # [runs, 2] int32
    unit: int  # all addresses and lengths are multiples of it
    weight: tl.dtype
    gradient: tl.dtype
    group: int  # elements that share a scale
    index: tl.dtype  # of elements' indices: int64 if a parameter is too large for int32, which is faster


@triton.jit
def _random(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _round_stochastically(fraction, root, chance, LEVELS: tl.constexpr, POWER: tl.constexpr):
    """The code of `fraction` (0 … 1), rounded so that the mean of decoded values is exact; root =
    fraction^(1/POWER)."""
    low = tl.minimum(tl.floor(root * LEVELS), LEVELS - 1.0)
    below, above = low * (1.0 / LEVELS), (low + 1) * (1.0 / LEVELS)
    below, above = below * below, above * above
    if POWER == 4:
        below, above = below * below, above * above
    return low + (fraction - below > chance * (above - below)).to(tl.float32)


@triton.jit
def _address(TABLE, line, COLUMN: tl.constexpr, TYPE: tl.constexpr, UNIT: tl.constexpr):
    return tl.multiple_of(tl.load(TABLE + line + COLUMN).to(tl.pointer_type(TYPE)), UNIT)


@triton.jit
def _update(
    TABLE, RUNS, RATES, CLIP, beta1, beta2, eps, scale2,
    FORM: tl.constexpr, W_TYPE: tl.constexpr, G_TYPE: tl.constexpr, M_TYPE: tl.constexpr, INDEX: tl.constexpr,
    UNIT: tl.constexpr, COLUMNS: tl.constexpr, RUN: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    run = tl.program_id(0) // RUN * 2
    parameter = tl.load(RUNS + run)
    line = parameter * COLUMNS
    first = (tl.load(RUNS + run + 1).to(INDEX) * RUN + tl.program_id(0) % RUN) * ROWS
    n = tl.multiple_of(tl.load(TABLE + line + 7).to(INDEX), UNIT)
    if first * GROUP >= n:
        return
    begin, seed = tl.load(TABLE + line + 8).to(tl.uint32), tl.load(TABLE + line + 9).to(tl.uint32)
    rate, keep = tl.load(RATES + parameter * 2), tl.load(RATES + parameter * 2 + 1)
    W, G = _address(TABLE, line, 0, W_TYPE, UNIT), _address(TABLE, line, 1, G_TYPE, UNIT)
    M = _address(TABLE, line, 3, M_TYPE, UNIT)
    V = _address(TABLE, line, 4, tl.uint8 if FORM == "8bit" else M_TYPE, UNIT)
    if FORM == "8bit":
        M_SCALE, V_SCALE = _address(TABLE, line, 5, tl.float32, UNIT), _address(TABLE, line, 6, tl.float32, UNIT)
    elif FORM == "split":
        LOW = _address(TABLE, line, 2, tl.int16, UNIT)
    elif FORM == "fp32":
        MASTER = _address(TABLE, line, 2, tl.float32, UNIT)
    group = first + tl.arange(0, ROWS)
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
        tl.store(W + at, w.to(W_TYPE), mask)
        tl.store(M + at, m, mask)
        tl.store(V + at, v, mask)
    elif FORM == "split":
        bits = w.to(tl.int32, bitcast=True)
        high = (bits + 0x8000) & -0x10000
        tl.store(LOW + at, (bits - high).to(tl.int16), mask)
        tl.store(W + at, high.to(tl.float32, bitcast=True).to(W_TYPE), mask)
        tl.store(M + at, m, mask)
        tl.store(V + at, v, mask)
    else:
        random = _random((at.to(tl.uint32) + begin) ^ seed)
        high = (w.to(tl.int32, bitcast=True) + (random & 0xFFFF).to(tl.int32)) & -0x10000
        tl.store(W + at, high.to(tl.float32, bitcast=True).to(W_TYPE), mask)
        m_bits, v_bits = ((random >> 16) & 0xFF).to(tl.int32), (random >> 24).to(tl.int32)
        if FORM == "bf16":
            raw = (m.to(tl.int32, bitcast=True) + (m_bits << 8) + 0x80) & -0x10000
            tl.store(M + at, raw.to(tl.float32, bitcast=True).to(M_TYPE), mask)
            raw = (v.to(tl.int32, bitcast=True) + (v_bits << 8) + 0x80) & -0x10000
            tl.store(V + at, raw.to(tl.float32, bitcast=True).to(M_TYPE), mask)
        else:
            size = tl.abs(m)
            m_scale, v_scale = tl.max(size, 1), tl.max(v, 1)
            tl.store(M_SCALE + group, m_scale, has)
            tl.store(V_SCALE + group, v_scale, has)
            fraction = size * (1 / tl.maximum(m_scale, 1e-37))[:, None]
            code = _round_stochastically(
                fraction, tl.sqrt(fraction), (m_bits.to(tl.float32) + 0.5) * (1.0 / 256), 127, 2
            )
            tl.store(M + at, tl.where(m < 0, -code, code).to(tl.int8), mask)
            fraction = v * (1 / tl.maximum(v_scale, 1e-37))[:, None]
            code = _round_stochastically(
                fraction, tl.sqrt(tl.sqrt(fraction)), (v_bits.to(tl.float32) + 0.5) * (1.0 / 256), 255, 4
            )
            code = tl.where(v > 0, tl.maximum(code, 1.0), code)
            tl.store(V + at, code.to(tl.int32).to(tl.uint8), mask)


@lru_cache(8)
def _runs(sizes: tuple[int, ...], group: int, device: torch.device) -> torch.Tensor:
    """[runs, 2] int32: for each RUN programs their parameter, and the index of their run in it."""
    counts = [triton.cdiv(n, RUN * ROWS * group) for n in sizes]
    lines = [(i, run) for i, count in enumerate(counts) for run in range(count)]
    return torch.tensor(lines, dtype=torch.int32).to(device)


def prepare(entries: Sequence[Entry], group: int) -> Prepared:
    """Send the table: host work that does not depend on pending GPU work."""
    lines = []
    for weight, gradient, state, begin, seed in entries:
        addresses = (0 if t is None else t.data_ptr() for t in (weight, gradient, *state))
        lines.append([*addresses, weight.numel(), begin, seed])
    # without aligned addresses and lengths, elements are read one by one
    unit = 1 if any(number % 16 for line in lines for number in line[:8]) else 16
    weight, gradient = entries[0].weight, entries[0].gradient
    runs = _runs(tuple(line[7] for line in lines), group, weight.device)
    types = TYPES[weight.dtype], TYPES[gradient.dtype]
    index = tl.int32 if max(line[7] for line in lines) + RUN * ROWS * group < 2**31 else tl.int64
    return Prepared(_send(lines, torch.int64, weight.device), runs, unit, *types, group, index)


def _send(numbers: Sequence[Sequence[float]], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Copy to the device without waiting for it."""
    return torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def update(
    prepared: Prepared,
    form: str,
    rates: Sequence[tuple[float, float]],
    clip: torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    scale: float,
) -> None:
    """See `adamw.update`.

    Args:
        rates: for each parameter lr / first bias correction, and the factor of weight decay.
        scale: second bias correction^(-1/2).
    """
    table, runs, unit, weight, gradient, group, index = prepared
    _update[(len(runs) * RUN,)](
        table, runs, _send(rates, torch.float32, clip.device), clip, beta1, beta2, eps, scale,
        FORM=form, W_TYPE=weight, G_TYPE=gradient, M_TYPE=KINDS[form], INDEX=index,
        UNIT=unit, COLUMNS=COLUMNS, RUN=RUN, ROWS=ROWS, GROUP=group, num_warps=8,
    )  # fmt: skip
