"""What a single process keeps of the weights' state, and how a step changes them: by any optimizer of PyTorch's with
fp32 masters, or by our own AdamW in one of its forms (adamw.py). Gradients are added up in `sums` in both.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from xtuner.engine.adamw import AdamW, Form, Moments, read_master, write_master
from xtuner.engine.optim import OptimWrapper
from xtuner.engine.shard import Shard
from xtuner.engine.trial import pack
from xtuner.model.decoder import CausalLM
from xtuner.model.linear import OwnsSums
from xtuner.model.ops.sums import GradientSum
from xtuner.model.weights import Part


class Update(Protocol):
    @property
    def sums(self) -> Mapping[str, GradientSum]:
        """By parameter."""

    def norm(self) -> torch.Tensor:
        """2-norm of all gradients, a scalar on the device."""

    def apply(self, lr: float, max_norm: float | None, norm: torch.Tensor) -> None:
        """Clip and step."""

    def shards(self) -> dict[str, Shard]:
        """Master and optimizer state of each parameter."""

    def place(self, name: str, key: str, value: torch.Tensor) -> None:
        """Restore a part of a parameter's optimizer state, packed."""

    def refresh(self) -> None:
        """Bring masters, changed from outside, to the weights that compute."""


def of(model: CausalLM, optim: OptimWrapper) -> Update:
    """The update of a model whose weights are in the dtype that computes."""
    form = optim.own_form(next(model.parameters()).device)
    return ByForm(model, optim, form) if form else ByTorch(model, optim)


def _sums(model: CausalLM, dtype: torch.dtype) -> dict[str, GradientSum]:
    """A sum for each parameter that learns. Modules that do not own sums hand over what autograd gives them."""
    sums = {}
    for prefix, module in model.named_modules():
        for key, weight in module.named_parameters(prefix, recurse=False):
            if not weight.requires_grad:
                continue
            sums[key] = total = GradientSum(torch.empty_like(weight, dtype=dtype))
            if isinstance(module, OwnsSums):
                module.gradient_sums[key.rpartition(".")[2]] = total
            else:
                weight.register_post_accumulate_grad_hook(total.take)
    return sums


class ByTorch:
    """One of `torch.optim` on fp32 masters. Weights that compute in fp32 are their own masters."""

    def __init__(self, model: CausalLM, optim: OptimWrapper) -> None:
        self._weights = dict(model.named_parameters())
        self._masters = {
            n: w if w.dtype == torch.float32 else torch.nn.Parameter(torch.empty_like(w, dtype=torch.float32))
            for n, w in self._weights.items()
        }
        self.sums = _sums(model, torch.float32)
        self._optimizer = optim.build(self._masters.values())
        self._traits = optim.traits(next(iter(self._masters.values())).device)

    def norm(self) -> torch.Tensor:
        return torch.nn.utils.get_total_norm([s.value() for s in self.sums.values()])

    def apply(self, lr: float, max_norm: float | None, norm: torch.Tensor) -> None:
        for name, master in self._masters.items():
            master.grad = self.sums[name].value()
        if max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._masters.values(), max_norm, norm)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.refresh()

    def shards(self) -> dict[str, Shard]:
        state = self._optimizer.state
        return {name: Shard(Part.whole(p), pack(state.get(p, {}), p)) for name, p in self._masters.items()}

    def place(self, name: str, key: str, value: torch.Tensor) -> None:
        master = self._masters[name]
        self._optimizer.state[master][key] = self._traits.unpack(key, value, master)

    @torch.no_grad()
    def refresh(self) -> None:
        copies = {n: w for n, w in self._weights.items() if w is not self._masters[n]}
        if copies:
            torch._foreach_copy_(list(copies.values()), [self._masters[n] for n in copies])


@dataclass(frozen=True, kw_only=True)
class _Encoded(Part):
    """A whole parameter, `values` as it computes, whose fp32 master is put together when asked for."""

    state: Moments
    form: Form

    def read(self) -> torch.Tensor:
        return read_master(self.values, self.state, self.form)

    @torch.no_grad()
    def take(self, full: torch.Tensor) -> None:
        write_master(self.values, self.state, self.form, full.reshape(-1).to(self.values.device, torch.float32))


class ByForm:
    """Our own AdamW in one of its forms."""

    def __init__(self, model: CausalLM, optim: OptimWrapper, form: Form) -> None:
        weights = dict(model.named_parameters())
        self.sums = _sums(model, form.gradient)
        self._adamw = AdamW(weights, form, optim.arguments)

    def norm(self) -> torch.Tensor:
        gradients = [s.value() for s in self.sums.values()]
        return torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)).norm()

    def apply(self, lr: float, max_norm: float | None, norm: torch.Tensor) -> None:
        clip = torch.ones_like(norm) if max_norm is None else (max_norm / (norm + 1e-6)).clamp(max=1.0)
        self._adamw.step({n: s.value() for n, s in self.sums.items()}, lr, clip)

    def shards(self) -> dict[str, Shard]:
        step = torch.tensor(float(self._adamw.steps))
        own = ("master", "low")  # in checkpoints masters are whole fp32 weights
        shards = {}
        for name, state in self._adamw.state.items():
            master = _Encoded(self._adamw.weights[name].data.view(-1), state=state, form=self._adamw.form)
            shards[name] = Shard(master, {"step": step} | {k: v for k, v in state.items() if k not in own})
        return shards

    def place(self, name: str, key: str, value: torch.Tensor) -> None:
        if key == "step":
            self._adamw.steps = int(value)
        else:
            self._adamw.state[name][key].copy_(value)

    def refresh(self) -> None:
        pass  # taking a master over has written the weight
