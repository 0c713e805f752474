"""One process, one device. What is kept of weights and optimizer is told in update.py and adamw.py.

A pack is computed in micro-batches, cut at document borders, as large as the memory holds without computing anything
twice; see memory.py.
"""

import math
from collections.abc import Sequence

import torch

from xtuner.data.batch import Batch
from xtuner.dist.mesh import Mesh
from xtuner.engine import memory, update
from xtuner.engine.optim import OptimWrapper
from xtuner.engine.shard import Shard, ShardedStrategy
from xtuner.model.decoder import CausalLM
from xtuner.model.source import ModelSource


class SingleStrategy(ShardedStrategy):
    name = "single"

    def __init__(self, source: ModelSource, optim: OptimWrapper, device: torch.device) -> None:
        self.compute_dtype = optim.compute_dtype(device)
        self.memory = memory.of_single(source, optim, device)
        self._model = source.empty(device, self.compute_dtype).train()
        shapes = {n: p.shape for n, p in self._model.named_parameters()}
        super().__init__(source.config, shapes, device, Mesh())
        self._model.model.keeps = self.memory.plan.keeps
        self._update = update.of(self._model, optim)
        source.fill({n: s.master for n, s in self._shards().items()}, shapes, device)
        self._refresh()
        self._has_targets = self._finite = False

    @property
    def model(self) -> CausalLM:
        return self._model

    @property
    def gradients(self) -> dict[str, torch.Tensor]:
        """Those of the last iteration, as the contract has them, by parameter."""
        return {name: gradient.value() for name, gradient in self._update.sums.items()}

    def forward_backward(self, batch: Sequence[Batch], num_targets: int, parts: Sequence[int] | None = None) -> float:
        self._has_targets = bool(num_targets)
        if not num_targets:
            return 0.0
        for gradient in self._update.sums.values():
            gradient.reset()
        total = torch.zeros((), device=self.device)
        counts = parts or self.parts(batch)
        for piece in (p for pack, count in zip(batch, counts, strict=True) for p in pack.split(count)):
            if piece.num_targets:
                b = piece.to(self.device)
                loss = self._model(
                    b.input_ids, b.cu_seqlens, b.targets, b.position_ids, b.max_seqlen, scale=1 / num_targets
                )
                loss.backward()
                total += loss.detach()
        self._finite = math.isfinite(mean := total.item())
        return mean

    def step(self, lr: float, max_norm: float | None) -> tuple[float, bool]:
        if not self._has_targets:
            return 0.0, False
        norm = self._update.norm()
        value = norm.item()  # the last wait for the device: what follows it on the host goes on beside the update
        applied = self._finite and math.isfinite(value)
        if applied:
            self._update.apply(lr, max_norm, norm)
        return value, applied

    def _shards(self) -> dict[str, Shard]:
        return self._update.shards()

    def _place(self, name: str, key: str, value: torch.Tensor) -> None:
        self._update.place(name, key, value)

    def _refresh(self) -> None:
        self._update.refresh()
