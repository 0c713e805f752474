"""AdamW with masters and moments in one of four forms; on GPUs a step is one pass over memory.

| form  | weights                             | gradient sums | moments            | bytes a parameter on a GPU |
|-------|-------------------------------------|---------------|--------------------|----------------------------|
| fp32  | fp32 masters and a compute copy     | fp32          | fp32               | 18 (16 as split)           |
| split | bf16 compute copy and the master's  | fp32          | fp32               | 16 (the same fp32 masters) |
|       | other 16 bits                       |               |                    |                            |
| bf16  | bf16, stochastic rounding           | bf16          | bf16, stochastic   | 8                          |
| 8bit  | bf16, stochastic rounding           | bf16          | 8 bits, stochastic | 6                          |

Stochastic rounding goes up or down with the probability that keeps the mean, so that small updates are not lost. The
random bits are a hash of step, parameter and element: a resumed run draws the same ones.

8-bit moments are in groups of 256 with one fp32 scale s, the largest magnitude of the group. The first moment is
s·(q/127)·|q/127|, q in −127 … 127, the second s·(q/255)^4, q in 0 … 255. Powers give small values more precision: most
moments are far smaller than the largest.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from xtuner.optim.parameter_groups import REST, ParameterGroup

GROUP = 256
SCALES = ("exp_avg_scale", "exp_avg_sq_scale")  # one element a group
Moments = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Form:
    """How AdamW's state is stored."""

    name: str
    gradient: torch.dtype
    moment: torch.dtype
    bytes: int  # a parameter, on a GPU that computes in bf16


FORMS = {
    f.name: f
    for f in (
        Form("fp32", torch.float32, torch.float32, 18),
        Form("split", torch.float32, torch.float32, 16),
        Form("bf16", torch.bfloat16, torch.bfloat16, 8),
        Form("8bit", torch.bfloat16, torch.int8, 6),
    )
}


@dataclass(frozen=True)
class Rates:
    """The hyperparameters of one step. `clip`, a scalar on the device, multiplies gradients."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int  # from 1
    clip: torch.Tensor

    @property
    def corrections(self) -> tuple[float, float]:
        return 1 - self.beta1**self.step, 1 - self.beta2**self.step


def make_seed(name: str, step: int) -> int:
    """Seed of the random bits for one parameter in one step, 31 bits."""
    return zlib.crc32(f"{name} {step}".encode()) >> 1


def new_state(weight: torch.Tensor, form: Form) -> Moments:
    """Zero moments of a parameter, and for split and fp32 the rest of its master; all flat."""
    n, device = weight.numel(), weight.device
    state = {k: torch.zeros(n, dtype=form.moment, device=device) for k in ("exp_avg", "exp_avg_sq")}
    if form.name == "8bit":
        state["exp_avg_sq"] = state["exp_avg_sq"].view(torch.uint8)
        state |= {k: torch.zeros(-(-n // GROUP), device=device) for k in SCALES}
    if form.name == "split":
        state["low"] = torch.zeros(n, dtype=torch.int16, device=device)
    if form.name == "fp32":
        state["master"] = torch.zeros(n, dtype=torch.float32, device=device)
    return state


def read_master(weight: torch.Tensor, state: Mapping[str, torch.Tensor], form: Form) -> torch.Tensor:
    """The fp32 master [n]: a view for "fp32", else a new tensor."""
    if form.name == "fp32":
        return state["master"]
    values = weight.detach().view(-1).float()
    if form.name == "split":
        return (values.view(torch.int32) + state["low"].int()).view(torch.float32)
    return values


@torch.no_grad()
def write_master(
    weight: torch.Tensor,
    state: Mapping[str, torch.Tensor],
    form: Form,
    values: torch.Tensor,
    seed: int | None = None,
    begin: int = 0,
) -> None:
    """Set the weight's master to fp32 `values` [n]. bf16 uses stochastic rounding with a seed, else rounds to
    nearest."""
    flat = weight.detach().view(-1)
    if form.name == "fp32":
        state["master"].copy_(values)
        flat.copy_(values)
        return
    bits = values.contiguous().view(torch.int32)
    if seed is not None and form.name != "split":
        high = bits + (random_bits(len(bits), seed, bits.device, begin) & 0xFFFF).int()
    else:
        high = bits + 0x8000
    high = high & -0x10000
    flat.copy_(high.view(torch.float32))
    if form.name == "split":
        state["low"].copy_(bits - high)


def random_bits(n: int, seed: int, device: torch.device, begin: int = 0) -> torch.Tensor:
    """32 random bits for each of n elements from `begin` on, in int64: a hash of the seed and the element's index in
    the full parameter ("lowbias32", C. Wellons, 2018)."""
    x = (torch.arange(begin, begin + n, dtype=torch.int64, device=device) & 0xFFFFFFFF) ^ seed
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)


@torch.no_grad()
def update(
    name: str,
    weight: torch.Tensor,
    gradient: torch.Tensor,
    state: Moments,
    form: Form,
    rates: Rates,
    begin: int = 0,
) -> None:
    """One step of a parameter, or of its elements from `begin` (a multiple of GROUP) on, in place. This is the
    reference; on GPUs a kernel does the same for all parameters at once."""
    seed, (c1, c2) = make_seed(name, rates.step), rates.corrections
    rate, kept, scale = rates.lr / c1, 1 - rates.lr * rates.weight_decay, c2**-0.5
    g = gradient.view(-1).float() * rates.clip
    m, v = _decode(state, "exp_avg"), _decode(state, "exp_avg_sq")
    m = m + (1 - rates.beta1) * (g - m)
    v = v + (1 - rates.beta2) * (g * g - v)
    w = read_master(weight, state, form) * kept - rate * m / (v.sqrt() * scale + rates.eps)
    write_master(weight, state, form, w, seed, begin)
    bits = random_bits(len(w), seed, w.device, begin)
    _encode(state, "exp_avg", m, bits >> 16 & 0xFF)
    _encode(state, "exp_avg_sq", v, bits >> 24)


def _grouped(values: torch.Tensor) -> torch.Tensor:
    """[n] → [groups, GROUP], padded with zeros."""
    return torch.nn.functional.pad(values, (0, -len(values) % GROUP)).view(-1, GROUP)


def _decode(state: Moments, key: str) -> torch.Tensor:
    codes = state[key]
    if codes.dtype == torch.int8:
        fraction = _grouped(codes.float()) * (1 / 127)
        values = fraction * fraction.abs() * state[f"{key}_scale"][:, None]
    elif codes.dtype == torch.uint8:
        values = (_grouped(codes.float()) * (1 / 255)).square().square() * state[f"{key}_scale"][:, None]
    else:
        return codes.float()
    return values.view(-1)[: len(codes)]


def _encode(state: Moments, key: str, values: torch.Tensor, bits: torch.Tensor) -> None:
    """Store moments with stochastic rounding by 8 `bits` each."""
    codes, chance = state[key], (bits.float() + 0.5) * (1 / 256)
    if codes.dtype == torch.float32:
        codes.copy_(values)
        return
    if codes.dtype == torch.bfloat16:
        raw = values.view(torch.int32) + (bits.int() << 8) + 0x80
        codes.copy_((raw & -0x10000).view(torch.float32))
        return
    levels, power = (127, 2) if codes.dtype == torch.int8 else (255, 4)
    groups = _grouped(values.abs())
    scale = groups.amax(1)
    state[f"{key}_scale"].copy_(scale)
    fraction = (groups * (1 / scale.clamp(min=1e-37))[:, None]).view(-1)[: len(values)]
    root = fraction.sqrt() if power == 2 else fraction.sqrt().sqrt()
    low = (root * levels).floor().clamp(max=levels - 1)
    below, above = ((code * (1 / levels)) ** power for code in (low, low + 1))
    code = low + (fraction - below > chance * (above - below))  # the mean of the decoded values is exact
    if codes.dtype == torch.uint8:
        code = torch.where(values > 0, code.clamp(min=1), code)  # a second moment of 0 would make a huge step
    codes.copy_(code * values.sign())


class AdamW:
    """The optimizer: `update` for all weights.

    Args:
        begins: by name, index of a weight's first element in the flattened parameter; {} for full parameters.
        groups: by name, the parameter group; other weights use the optimizer's own settings.
    """

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        form: Form,
        arguments: Mapping[str, Any],
        begins: Mapping[str, int],
        groups: Mapping[str, ParameterGroup] = MappingProxyType({}),
    ) -> None:
        self.weights, self.form, self._begins = dict(weights), form, begins
        self.beta1, self.beta2 = arguments.get("betas", (0.9, 0.999))
        self.eps = arguments.get("eps", 1e-8)
        self.weight_decay = arguments.get("weight_decay", 1e-2)
        self._groups = {name: groups.get(name, REST) for name in self.weights}
        self.steps = 0
        self.state = {name: new_state(w, form) for name, w in self.weights.items()}
        self._prepared: list[tuple[list[str], Any]] = []  # names of parameters, and the kernel's arguments for them

    def prepare(self, gradients: Mapping[str, torch.Tensor]) -> None:
        """On a GPU, do the host work of the next step that does not depend on rates, while the GPU still computes."""
        if not any(w.is_cuda for w in self.weights.values()):
            return
        from xtuner.optim import adamw_kernels

        keys = ({"fp32": "master", "split": "low"}.get(self.form.name, ""), "exp_avg", "exp_avg_sq", *SCALES)
        groups: dict[tuple[Any, ...], dict[str, adamw_kernels.Entry]] = {}  # a kernel's launch each
        for name, weight in self.weights.items():
            begin, seed = self._begins.get(name, 0), make_seed(name, self.steps + 1)
            state = [self.state[name].get(key) for key in keys]
            entry = adamw_kernels.Entry(weight, gradients[name], state, begin, seed)
            kind = (weight.dtype, gradients[name].dtype, *self._betas_and_eps(self._groups[name]))
            groups.setdefault(kind, {})[name] = entry
        self._prepared = [(list(g), adamw_kernels.prepare(list(g.values()), GROUP)) for g in groups.values()]

    def step(self, gradients: Mapping[str, torch.Tensor], lr: float, clip: torch.Tensor) -> None:
        """Update all weights. `gradients` must be those given to `prepare`, if it was called."""
        if clip.is_cuda and not self._prepared:
            self.prepare(gradients)
        self.steps += 1
        group_rates = {group: self._rates(lr, clip, group) for group in set(self._groups.values())}
        rates = {name: group_rates[group] for name, group in self._groups.items()}
        if self._prepared:
            self._step_on_gpu(rates, clip)
            return
        for name, weight in self.weights.items():
            begin = self._begins.get(name, 0)
            update(name, weight, gradients[name], self.state[name], self.form, rates[name], begin)

    def _rates(self, lr: float, clip: torch.Tensor, group: ParameterGroup) -> Rates:
        decay = self.weight_decay if group.weight_decay is None else group.weight_decay
        return Rates(lr * group.lr_scale, *self._betas_and_eps(group), decay, self.steps, clip)

    def _betas_and_eps(self, group: ParameterGroup) -> tuple[float, float, float]:
        return *(group.betas or (self.beta1, self.beta2)), self.eps if group.eps is None else group.eps

    def _step_on_gpu(self, rates: Mapping[str, Rates], clip: torch.Tensor) -> None:
        from xtuner.optim import adamw_kernels

        for names, prepared in self._prepared:
            first = rates[names[0]]
            c1, c2 = first.corrections
            each = [(rates[n].lr / c1, 1 - rates[n].lr * rates[n].weight_decay) for n in names]
            settings = first.beta1, first.beta2, first.eps, c2**-0.5
            adamw_kernels.update(prepared, self.form.name, each, clip, *settings)
        self._prepared = []
