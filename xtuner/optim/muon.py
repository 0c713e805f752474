"""Muon for the matrices of blocks, AdamW for everything else: embedding, output layer, norms and biases.

    momentum   b ← μ b + (1 − μ) g               update   u = (1 − μ) g + μ b  (nesterov; else b)
    weight     w ← (1 − lr · decay) w − lr · ratio(shape) · O(u)

O(u) has the singular vectors of u, and singular values near 1: u / ‖u‖, then `ns_steps` times x ← a x + (b G + c G²) x
with G = x xᵀ (Newton–Schulz; K. Jordan et al., 2024; names and results of `torch.optim.Muon`). It is computed in bf16
on GPUs, in fp32 on CPUs.

The rows of the joint projection `wqkv` are those of three matrices, by kv head: its query heads, its k, its v. Each of
the three is orthogonalized for itself, with the ratio of its own shape.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from xtuner.core.errors import ConfigError, did_you_mean
from xtuner.families.network import DecoderConfig
from xtuner.optim.adamw import Form, Moments, random_bits, read_master, write_master
from xtuner.optim.parameter_groups import ParameterGroup

WHERE = "optim_wrapper.optimizer"
MAX_STEPS = 100
_ADAMW = ("lr", "betas", "eps", "weight_decay")
_RATIOS = {  # by `adjust_lr_fn`, of a matrix with so many rows and columns
    None: lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
    "original": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
}


@dataclass(frozen=True)
class Muon:
    """The settings; strategies make the step.

    Args:
        params: for the form of an optimizer; not used.
        lr: of the matrices; the schedule changes it, and AdamW's in proportion.
        ns_coefficients, ns_steps, eps: of the orthogonalization; eps is the smallest norm that divides.
        adjust_lr_fn: how the rate depends on a matrix's shape: "original" (also None) multiplies it by
            √max(1, rows ÷ columns); "match_rms_adamw" by 0.2 √max(rows, columns), for rates and decay chosen for AdamW.
        adamw: lr, betas, eps and weight_decay of AdamW for all other parameters. Defaults are AdamW's; for lr, Muon's.

    Raises: ConfigError.
    """

    params: Any = None
    lr: float = 1e-3
    weight_decay: float = 0.1
    momentum: float = 0.95
    nesterov: bool = True
    ns_coefficients: Sequence[float] = (3.4445, -4.7750, 2.0315)
    eps: float = 1e-7
    ns_steps: int = 5
    adjust_lr_fn: Literal["original", "match_rms_adamw"] | None = None
    adamw: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, right, words in (
            ("lr", self.lr > 0, "above 0"),
            ("momentum", 0 <= self.momentum < 1, "at least 0 and below 1"),
            ("weight_decay", self.weight_decay >= 0, "at least 0"),
            ("eps", self.eps > 0, "above 0"),
            ("ns_steps", 1 <= self.ns_steps < MAX_STEPS, f"from 1 to {MAX_STEPS - 1}"),
            ("ns_coefficients", len(self.ns_coefficients) == 3, "three numbers"),
        ):
            if not right:
                raise ConfigError(f"{name} = {getattr(self, name)!r} is not {words}", where=f"{WHERE}.{name}")
        if self.adjust_lr_fn not in _RATIOS:
            names = [name for name in _RATIOS if name]
            raise ConfigError(
                f"adjust_lr_fn = {self.adjust_lr_fn!r} is not one of {', '.join(names)}."
                + did_you_mean(str(self.adjust_lr_fn), names),
                where=f"{WHERE}.adjust_lr_fn",
            )
        self._check_adamw()

    def _check_adamw(self) -> None:
        if not isinstance(self.adamw, Mapping):
            raise ConfigError(f"adamw = {self.adamw!r} is not a dict of {', '.join(_ADAMW)}", where=f"{WHERE}.adamw")
        for name in self.adamw:
            if name not in _ADAMW:
                near = did_you_mean(str(name), list(_ADAMW))
                raise ConfigError(f"adamw has no setting {name!r}.{near}", where=f"{WHERE}.adamw.{name}",
                                  do=f"it takes: {', '.join(_ADAMW)}")  # fmt: skip
        try:
            torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], **self.adamw)
        except (TypeError, ValueError) as e:
            raise ConfigError(f"AdamW does not take these values: {e}", where=f"{WHERE}.adamw") from None

    @property
    def adamw_scale(self) -> float:
        """AdamW's rate relative to Muon's."""
        return float(self.adamw.get("lr", self.lr)) / self.lr

    def ratio(self, rows: int, columns: int) -> float:
        return _RATIOS[self.adjust_lr_fn](rows, columns)

    def orthogonalize(self, matrix: torch.Tensor) -> torch.Tensor:
        """O(matrix), times the ratio of its shape; computed in the matrix's dtype."""
        rows, columns = matrix.shape
        x = matrix.T if rows > columns else matrix
        x = x / x.norm().clamp(min=self.eps)
        a, b, c = self.ns_coefficients
        for _ in range(self.ns_steps):
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return (x.T if rows > columns else x) * self.ratio(rows, columns)

    def flops(self, rows: int, columns: int) -> float:
        """Of `orthogonalize`."""
        short, long = sorted((rows, columns))
        return self.ns_steps * (4.0 * short * short * long + 2.0 * short**3)


def is_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether Muon updates the parameter: a matrix of a block."""
    return len(shape) == 2 and name.startswith("model.layers.")


def split_by_kind(name: str, matrix: torch.Tensor, c: DecoderConfig) -> Iterator[torch.Tensor]:
    """The matrices that a parameter consists of, as views [groups, rows of each, columns]."""
    if not name.endswith(".attention.wqkv.weight"):
        yield matrix[None]
        return
    heads = matrix.view(c.num_kv_heads, -1, matrix.shape[1])
    yield from heads.split([c.queries_per_kv_head * c.head_dim, c.head_dim, c.head_dim], dim=1)


def orthogonalize_parameter(name: str, update: torch.Tensor, muon: Muon, c: DecoderConfig) -> torch.Tensor:
    """`Muon.orthogonalize` of each matrix that a parameter consists of, [rows, columns]."""
    result = torch.empty_like(update)
    parts = zip(split_by_kind(name, update, c), split_by_kind(name, result, c), strict=True)
    for part, into in parts:
        into.copy_(muon.orthogonalize(part.reshape(-1, part.shape[-1])).view(part.shape))
    return result


def parameter_flops(name: str, shape: Sequence[int], muon: Muon, c: DecoderConfig) -> float:
    """Of `orthogonalize_parameter`."""
    whole = torch.empty(tuple(shape), device="meta")
    return sum(muon.flops(v.shape[0] * v.shape[1], v.shape[2]) for v in split_by_kind(name, whole, c))


def new_state(weight: torch.Tensor, form: Form) -> Moments:
    """Zero momentum of a parameter, and what the form stores of its master; all flat."""
    n, device = weight.numel(), weight.device
    state = {"momentum_buffer": torch.zeros(n, dtype=form.moment, device=device)}
    if form.name == "split":
        state["low"] = torch.zeros(n, dtype=torch.int16, device=device)
    if form.name == "fp32":
        state["master"] = torch.zeros(n, dtype=torch.float32, device=device)
    return state


@torch.no_grad()
def update_momentum(
    gradient: torch.Tensor, clip: torch.Tensor, state: Moments, muon: Muon, seed: int, begin: int
) -> torch.Tensor:
    """Add a gradient to the momentum of a parameter's elements from `begin` on. Returns the update u, fp32, flat."""
    g, buffer = gradient.reshape(-1).float() * clip, state["momentum_buffer"]
    momentum = buffer.float().lerp_(g, 1 - muon.momentum)  # in fp32 the buffer itself
    if buffer.dtype == torch.bfloat16:  # stochastic rounding, by other bits than the weight's
        bits = momentum.view(torch.int32) + (random_bits(len(g), seed, g.device, begin) >> 16).int()
        buffer.copy_((bits & -0x10000).view(torch.float32))
    return g.lerp(momentum, muon.momentum) if muon.nesterov else momentum


@torch.no_grad()
def update_weight(
    weight: torch.Tensor, direction: torch.Tensor, state: Moments, form: Form, lr: float, decay: float, seed: int,
    begin: int,
) -> None:  # fmt: skip
    """Move a parameter's elements from `begin` on against `direction`, which has the ratio."""
    master = read_master(weight, state, form) * (1 - lr * decay)
    write_master(weight, state, form, master.sub_(direction.reshape(-1).float(), alpha=lr), seed, begin)


def weight_decay(muon: Muon, group: ParameterGroup) -> float:
    return muon.weight_decay if group.weight_decay is None else group.weight_decay
