"""The optimizer's step on this process's rows of each parameter; on a single process these are the full parameter.

The step is made by an optimizer of PyTorch with fp32 masters, or by our own AdamW in one of its forms (adamw.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from xtuner.engine.state.shards import Shard
from xtuner.model.parameter_ranges import FlatRange
from xtuner.optim.adamw import AdamW, Form, Moments, read_master, write_master
from xtuner.optim.optim_wrapper import OptimWrapper
from xtuner.optim.optimizer_traits import pack
from xtuner.optim.parameter_groups import set_lr

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Rows:
    """Rows of a parameter in the compute dtype: its elements from `begin` on."""

    weight: torch.Tensor  # [rows, …], a view: writing to it changes the compute weight
    begin: int = 0


class LocalOptimizer(Protocol):
    def norm(self, gradients: Tensors) -> torch.Tensor:
        """2-norm of these gradients, a scalar on the device."""

    def prepare(self, gradients: Tensors) -> None:
        """Do the host work of the step that does not depend on the norm."""

    def apply(self, gradients: Tensors, lr: float, max_norm: float | None, norm: torch.Tensor) -> None:
        """Clip by the `norm` of all ranks' gradients, and step."""

    def shards(self) -> dict[str, Shard]:
        """Master and optimizer state of each parameter."""

    def restore_state(self, name: str, key: str, value: torch.Tensor) -> None:
        """Restore one key of a parameter's optimizer state, in the packed form of optimizer_traits.py."""

    def sync_weights(self) -> None:
        """Copy masters that were changed from outside to the compute weights."""


def local_optimizer(rows: Mapping[str, Rows], optim: OptimWrapper, device: torch.device) -> LocalOptimizer:
    form = optim.state_form(device)
    return OwnAdamW(rows, optim, form) if form else TorchOptimizer(rows, optim)


def compute_norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """2-norm of all tensors, in fp32, without fp32 copies."""
    return torch.stack(torch._foreach_norm(list(tensors), 2, dtype=torch.float32)).norm()


def read_clip(max_norm: float | None, norm: torch.Tensor) -> torch.Tensor:
    """What gradients of this norm are multiplied by."""
    return torch.ones_like(norm) if max_norm is None else (max_norm / (norm + 1e-6)).clamp(max=1.0)


class TorchOptimizer:
    """An optimizer of PyTorch on fp32 masters. Weights that compute in fp32 are their own masters."""

    def __init__(self, rows: Mapping[str, Rows], optim: OptimWrapper) -> None:
        self._rows = rows
        self._masters = {n: _master(r.weight) for n, r in rows.items()}
        # a rank may have no rows
        self._optimizer = optim.build(self._masters) if rows else None
        self._traits = optim.traits(next(iter(rows.values())).weight.device) if rows else None

    def norm(self, gradients: Tensors) -> torch.Tensor:
        return torch.nn.utils.get_total_norm(list(gradients.values()))

    def prepare(self, gradients: Tensors) -> None:
        pass  # PyTorch's optimizers do all work in the step

    def apply(self, gradients: Tensors, lr: float, max_norm: float | None, norm: torch.Tensor) -> None:
        if self._optimizer is None:
            return
        for name, master in self._masters.items():
            master.grad = gradients[name].to(master.dtype)
        if max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._masters.values(), max_norm, norm)
        set_lr(self._optimizer, lr)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.sync_weights()

    def shards(self) -> dict[str, Shard]:
        state = self._optimizer.state if self._optimizer else {}
        return {
            name: Shard(FlatRange(p.data.view(-1), self._rows[name].begin), pack(state.get(p, {}), p))
            for name, p in self._masters.items()
        }

    def restore_state(self, name: str, key: str, value: torch.Tensor) -> None:
        assert self._optimizer is not None
        assert self._traits is not None
        master = self._masters[name]
        self._optimizer.state[master][key] = self._traits.unpack(key, value, master)

    @torch.no_grad()
    def sync_weights(self) -> None:
        copies = {n: r.weight for n, r in self._rows.items() if r.weight.dtype != torch.float32}
        if copies:
            torch._foreach_copy_(list(copies.values()), [self._masters[n] for n in copies])


def _master(weight: torch.Tensor) -> torch.nn.Parameter:
    if weight.dtype != torch.float32:
        return torch.nn.Parameter(torch.empty_like(weight, dtype=torch.float32))
    return weight if isinstance(weight, torch.nn.Parameter) else torch.nn.Parameter(weight)


@dataclass(frozen=True, kw_only=True)
class EncodedRange(FlatRange):
    """`values` in the compute dtype; the fp32 master is assembled when it is read."""

    state: Moments
    form: Form

    def read(self) -> torch.Tensor:
        return read_master(self.values, self.state, self.form)

    @torch.no_grad()
    def copy_from(self, full: torch.Tensor) -> None:
        own = full.reshape(-1)[self.begin : self.begin + len(self.values)]
        write_master(self.values, self.state, self.form, own.to(self.values.device, torch.float32))


class OwnAdamW:
    """Our own AdamW in one of its forms."""

    def __init__(self, rows: Mapping[str, Rows], optim: OptimWrapper, form: Form) -> None:
        self._begins = {n: r.begin for n, r in rows.items()}
        groups = {n: optim.find_group(n) for n in rows}
        self._adamw = AdamW({n: r.weight for n, r in rows.items()}, form, optim.adamw_arguments, self._begins, groups)

    def norm(self, gradients: Tensors) -> torch.Tensor:
        return compute_norm(list(gradients.values()))

    def prepare(self, gradients: Tensors) -> None:
        self._adamw.prepare(gradients)

    def apply(self, gradients: Tensors, lr: float, max_norm: float | None, norm: torch.Tensor) -> None:
        self._adamw.step(gradients, lr, read_clip(max_norm, norm))

    def shards(self) -> dict[str, Shard]:
        step = torch.tensor(float(self._adamw.steps))
        not_saved = ("master", "low")  # parts of the masters, which checkpoints contain as fp32 weights
        shards = {}
        for name, state in self._adamw.state.items():
            values, begin = self._adamw.weights[name].data.view(-1), self._begins[name]
            master = EncodedRange(values, begin, state=state, form=self._adamw.form)
            shards[name] = Shard(master, {"step": step} | {k: v for k, v in state.items() if k not in not_saved})
        return shards

    def restore_state(self, name: str, key: str, value: torch.Tensor) -> None:
        if key == "step":
            self._adamw.steps = int(value)
        else:
            self._adamw.state[name][key].copy_(value)

    def sync_weights(self) -> None:
        pass  # writing a master has already written the weight
