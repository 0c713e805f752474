"""One process, one device. fp32 masters; on a GPU a copy of the weights in bf16 computes.

Memory a parameter on a GPU: master 4 B, gradient sum 4 B, two moments 8 B, bf16 copy 2 B: 18 B. On a CPU the masters
compute themselves: 16 B.
"""

import math
from collections.abc import Sequence

import torch

from xtuner.data.batch import Batch
from xtuner.engine.optim import OptimWrapper
from xtuner.engine.shard import Shard, ShardedStrategy, beside
from xtuner.model.decoder import CausalLM
from xtuner.model.source import ModelSource
from xtuner.model.weights import Part


class SingleStrategy(ShardedStrategy):
    name = "single"

    def __init__(self, source: ModelSource, optim: OptimWrapper, device: torch.device) -> None:
        self.compute_dtype = optim.compute_dtype(device)
        masters = source.build(device, torch.float32)
        self.masters: dict[str, torch.nn.Parameter] = dict(masters.named_parameters())
        super().__init__(source.config, {n: p.shape for n, p in self.masters.items()}, device)
        self.optimizer = optim.build(self.masters.values())
        if self.compute_dtype == torch.float32:
            self._model = masters
        else:
            self._model = source.empty(device, self.compute_dtype)
            self._refresh()
            for name, weight in self._model.named_parameters():
                weight.register_post_accumulate_grad_hook(_Into(self.masters[name]))
        self._model.train()
        self._may_step = False

    @property
    def model(self) -> CausalLM:
        return self._model

    def forward_backward(self, batch: Sequence[Batch], num_targets: int) -> float:
        self._may_step = False
        if not num_targets:
            return 0.0
        total = torch.zeros((), device=self.device)
        for pack in batch:
            if not pack.num_targets:
                continue
            b = pack.to(self.device)
            loss = self._model(b.input_ids, b.cu_seqlens, b.targets, b.position_ids, b.max_seqlen) / num_targets
            loss.backward()
            total += loss.detach()
        self._may_step = math.isfinite(loss_sum := total.item())
        return loss_sum

    def step(self, lr: float, max_norm: float | None) -> tuple[float, bool]:
        grads = [p.grad for p in self.masters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads) if grads else torch.zeros(())
        applied = self._may_step and bool(norm.isfinite())
        if applied:
            if max_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(self.masters.values(), max_norm, norm)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self._refresh()
        else:
            self.optimizer.zero_grad(set_to_none=True)
        return norm.item(), applied

    def _shards(self) -> dict[str, Shard]:
        state = self.optimizer.state
        return {
            name: Shard(Part.whole(p), {k: v.view(-1) if v.dim() else v for k, v in state.get(p, {}).items()})
            for name, p in self.masters.items()
        }

    def _place(self, name: str, key: str, value: torch.Tensor) -> None:
        master = self.masters[name]
        value = value.view(master.shape) if value.dim() else beside(value, master, self.optimizer)
        self.optimizer.state[master][key] = value

    @torch.no_grad()
    def _refresh(self) -> None:
        if self.compute_dtype != torch.float32:
            targets = [p.data for p in self._model.parameters()]
            torch._foreach_copy_(targets, [p.data for p in self.masters.values()])
        self.optimizer.zero_grad(set_to_none=True)


class _Into:
    """Adds a weight's fresh gradient to its master's fp32 sum and frees it, so that accumulation loses no bits."""

    def __init__(self, master: torch.nn.Parameter) -> None:
        self.master = master

    def __call__(self, weight: torch.Tensor) -> None:
        assert weight.grad is not None
        if self.master.grad is None:
            self.master.grad = weight.grad.float()
        else:
            self.master.grad += weight.grad
        weight.grad = None
