"""Our own strategy, on any mesh: one process is its mesh of ones.

A pack is computed in micro-batches, cut at document borders, as large as the memory holds without recomputing anything;
see memory.py. An iteration for which that was too large is repeated with smaller ones; see out_of_memory.py. What is
full and what is divided over ranks, `divided.py` says; what is kept of weights and optimizer, `local_optimizer.py` and
`adamw.py`.
"""

import math
from collections.abc import Sequence

import torch

from xtuner.core.log import logger
from xtuner.data.loading.batch import Batch
from xtuner.dist.mesh import Mesh
from xtuner.engine.memory import Memory, free_of_all, of_mesh
from xtuner.engine.state.shards import Shard, StatefulStrategy
from xtuner.engine.strategies.divided import DividedModel
from xtuner.engine.strategies.local_optimizer import local_optimizer
from xtuner.engine.strategies.micro_batches import run_micro_batches
from xtuner.engine.strategies.out_of_memory import Failure, agree_on_smaller, drop_graph, is_out_of_memory
from xtuner.model.decoder import CausalLM
from xtuner.model.source import ModelSource
from xtuner.model.weights import Part
from xtuner.optim.optim_wrapper import OptimWrapper


class ShardedStrategy(StatefulStrategy):
    """
    Args:
        mesh: None for one process.
        memory: how it is used, as `choose` has found; None for what is fastest with packs of unknown length.
    """

    def __init__(
        self,
        source: ModelSource,
        optim: OptimWrapper,
        device: torch.device,
        mesh: Mesh | None = None,
        memory: Memory | None = None,
    ) -> None:
        mesh = mesh or Mesh()
        self.name = "single" if mesh.size == 1 else "fsdp"
        self.compute_dtype = optim.compute_dtype(device)
        self.memory = memory or of_mesh(source, optim, device, mesh, free=free_of_all(device, mesh))
        where = device if mesh.shard_size == 1 else torch.device("meta")
        self._model = source.empty(where, self.compute_dtype).train()
        shapes = {n: p.shape for n, p in self._model.named_parameters()}
        super().__init__(source.config, shapes, device, mesh, gives=mesh.replica == 0)
        self._divided = DividedModel(self._model, mesh, device, self.memory.division, optim.gradient_dtype(device))
        if where.type == "meta":
            source.configure(self._model, device, self.compute_dtype)
        self._model.model.keeps = self.memory.plan.keeps
        held = {n: p for n, p in self._divided.parameters.items() if p.count}
        self._optimizer = local_optimizer({n: p.rows for n, p in held.items() if p.sum}, optim, device)
        self._frozen = {n: p for n, p in held.items() if not p.sum}
        source.fill({n: s.master for n, s in self._shards().items()}, shapes, device)
        self._refresh()
        self._has_targets = self._finite = False
        self._norm = 0.0  # of the last iteration's gradients
        self._total = torch.zeros(2, device=device)  # of `_attempt`: made once, before memory can run out

    @property
    def model(self) -> CausalLM:
        return self._model

    @property
    def gradients(self) -> dict[str, torch.Tensor]:
        """Those of the last iteration, as the contract has them, by parameter: what this process holds of each."""
        parameters = self._divided.parameters
        if self.mesh.size == 1:
            return {n: p.sum.value() for n, p in parameters.items() if p.sum}
        return {n: p.gradient for n, p in parameters.items() if p.gradient is not None and p.count}

    def forward_backward(
        self, batch: Sequence[Batch], num_targets: int, parts: Sequence[int] | None = None, iteration: int = 0
    ) -> float:
        self._has_targets = bool(num_targets)
        if not num_targets:
            return 0.0
        counts = parts or self.parts(batch)
        while True:
            total, failure = self._attempt(self._cut(batch, counts), num_targets)
            mean, failures = self._settle(total)
            if not failures:
                break
            self._take_less(failure, max(b.num_tokens for b in batch), iteration)
            _, counts = self.mesh.ranks.sums_and_maxima([], self.parts(batch))
        return mean

    def _attempt(self, pieces: Sequence[Batch], num_targets: int) -> tuple[torch.Tensor, Failure | None]:
        """Forward and backward of micro-batches. Returns [this rank's part of the loss, 1 where its memory ran out], on
        the device; in that case gradients are of no use on any rank."""
        divided, failure = self._divided, None
        total = self._total.zero_()

        def backward(loss: torch.Tensor) -> None:
            loss.backward()
            divided.after_backward()

        divided.begin(len(pieces))
        try:
            total[0] = run_micro_batches(
                pieces, self._model, self.device, num_targets, backward, divided.before_micro_batch, self.mesh.size == 1
            )
        except Exception as e:
            if not is_out_of_memory(e) or isinstance(e, torch.distributed.DistError):
                raise
            begun = pieces[: len(pieces) - divided.to_come] or pieces[:1]
            failure = Failure(max(begun, key=lambda p: p.num_tokens), begun[-1], str(e))
        if failure:
            drop_graph()
            divided.abandon()
            total[0], total[1] = 0.0, 1.0
        divided.end()
        return total, failure

    def _take_less(self, failure: Failure | None, pack: int, iteration: int) -> None:
        """Of memory, from here on: on all ranks the same, after some of them had a failure."""
        self.memory, text = agree_on_smaller(self.memory, failure, self.mesh)
        self._model.model.keeps = self.memory.plan.keeps
        logger.warning(f"iteration {iteration}: {text}")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            self.memory.tell(pack, self.mesh)

    def _settle(self, total: torch.Tensor) -> tuple[float, float]:
        """Sum `_attempt`'s total over ranks, and the norm of gradients with it.

        The one wait for the device in an iteration: what the host does before the next backward overlaps the step.
        """
        gradients = self.gradients
        norm = self._optimizer.norm(gradients).float() if gradients else torch.zeros((), device=self.device)
        self._optimizer.prepare(gradients)
        if self.mesh.size == 1:
            mean, failures, self._norm = torch.stack([*total, norm]).tolist()
        else:
            square = norm.double().square() / self.mesh.dp_replicate  # each copy of the model has the same
            mean, failures, square = self.mesh.ranks.sum_on_device(torch.stack([*total.double(), square]))
            self._norm = math.sqrt(square)
        self._finite = math.isfinite(mean) and math.isfinite(self._norm)
        return mean, failures

    def step(self, lr: float, max_norm: float | None) -> tuple[float, bool]:
        if not self._has_targets:
            return 0.0, False
        if self._finite:
            norm = torch.full((), self._norm, device=self.device)
            self._optimizer.apply(self.gradients, lr, max_norm, norm)
            self._divided.gather()
        return self._norm, self._finite

    def _shards(self) -> dict[str, Shard]:
        frozen = {n: Shard(Part(p.rows.weight.data.view(-1), p.begin), {}) for n, p in self._frozen.items()}
        found = self._optimizer.shards() | frozen
        return {n: found[n] for n in self._shapes if n in found}

    def _place(self, name: str, key: str, value: torch.Tensor) -> None:
        self._optimizer.place(name, key, value)

    def _refresh(self) -> None:
        self._optimizer.refresh()
        self._divided.gather()
