"""Our own strategy, on any mesh; a single process is a mesh of ones.

A pack is computed in micro-batches, cut at document borders; memory.py chooses their size. If memory runs out, the
iteration is repeated with smaller ones (out_of_memory.py). sharded_parameters.py has the weights and gradients, full
and sharded; local_optimizer.py has the masters and the optimizer's state.
"""

import math
from collections.abc import Sequence

import torch

from xtuner.core.log import logger
from xtuner.data.loading.batch import Batch
from xtuner.dist.mesh import Mesh
from xtuner.engine.memory import MemoryPlan, min_free_bytes, plan_memory
from xtuner.engine.state.shards import Shard, StatefulStrategy
from xtuner.engine.strategies.local_optimizer import LocalOptimizer, local_optimizer
from xtuner.engine.strategies.micro_batches import run_micro_batches
from xtuner.engine.strategies.muon_optimizer import MuonOptimizer
from xtuner.engine.strategies.out_of_memory import Failure, agree_on_smaller, drop_graph, is_out_of_memory
from xtuner.engine.strategies.sharded_parameters import DividedModel
from xtuner.model.decoder import CausalLM
from xtuner.model.parameter_ranges import make_range
from xtuner.model.source import ModelSource
from xtuner.optim.optim_wrapper import OptimWrapper


class ShardedStrategy(StatefulStrategy):
    """
    Args:
        mesh: None for a single process.
        memory: the plan of `choose_strategy`; None for the fastest one with packs of the usual length.
    """

    def __init__(
        self,
        source: ModelSource,
        optim: OptimWrapper,
        device: torch.device,
        mesh: Mesh | None = None,
        memory: MemoryPlan | None = None,
    ) -> None:
        mesh = mesh or Mesh()
        self.name = "single" if mesh.size == 1 else "fsdp"
        self.compute_dtype = optim.compute_dtype(device)
        self.memory = memory or plan_memory(source, optim, device, mesh, free=min_free_bytes(device, mesh))
        build_on = device if mesh.shard_size == 1 else torch.device("meta")
        self._frozen_weights = source.frozen_weights
        self._model = source.build_empty(build_on, self.compute_dtype).train()
        shapes = {n: p.shape for n, p in self._model.named_parameters()}
        record, trained = source.adapter_record(), source.trained_names()
        super().__init__(source.config, shapes, device, mesh, mesh.replica == 0, record, trained)
        self._divided = DividedModel(self._model, mesh, device, self.memory.division, optim.gradient_dtype(device))
        if build_on.type == "meta":
            source.configure(self._model, device, self.compute_dtype)
        self._model.keep_activations(self.memory.activations)
        held = {n: p for n, p in self._divided.parameters.items() if p.count}
        rows = {n: p.rows for n, p in held.items() if p.sum}
        self._optimizer: LocalOptimizer
        if optim.muon:
            updated = {n: shapes[n] for n, p in self._divided.parameters.items() if p.sum}
            self._optimizer = MuonOptimizer(rows, updated, optim, source.config, device, mesh)
        else:
            self._optimizer = local_optimizer(rows, optim, device)
        self._frozen = {n: p for n, p in held.items() if not p.sum}
        source.fill_weights({n: s.master for n, s in self._shards().items()}, shapes, device)
        self._sync_weights()
        self._has_targets = self._finite = False
        self._norm = 0.0  # of the last iteration's gradients
        self.source_losses = [0.0]
        self._total = torch.zeros(2, device=device)  # result of `_attempt`, allocated before memory can run out

    @property
    def model(self) -> CausalLM:
        return self._model

    @property
    def gradients(self) -> dict[str, torch.Tensor]:
        """This process's part of the last iteration's gradients, by parameter, as the contract defines them."""
        parameters = self._divided.parameters
        if self.mesh.size == 1:
            return {n: p.sum.value() for n, p in parameters.items() if p.sum}
        return {n: p.gradient for n, p in parameters.items() if p.gradient is not None and p.count}

    def forward_backward(
        self, batch: Sequence[Batch], num_targets: int, parts: Sequence[int] | None = None, iteration: int = 0,
        sources: int = 1,
    ) -> float:  # fmt: skip
        self._has_targets = bool(num_targets)
        self.source_losses = [0.0] * sources
        if not num_targets:
            return 0.0
        if len(self._total) != sources + 1:
            self._total = torch.zeros(sources + 1, device=self.device)
        counts = parts or self.count_micro_batches(batch)
        while True:
            total, failure = self._attempt(self._cut_packs(batch, counts), num_targets, iteration)
            self.source_losses, failures = self._sum_over_ranks(total)
            if not failures:
                break
            self._shrink_memory(failure, max(b.num_tokens for b in batch), iteration)
            _, counts = self.mesh.ranks.sums_and_maxima([], self.count_micro_batches(batch))
        return sum(self.source_losses)

    def _attempt(
        self, pieces: Sequence[Batch], num_targets: int, iteration: int
    ) -> tuple[torch.Tensor, Failure | None]:
        """Forward and backward of micro-batches. Returns [this rank's part of each source's loss …, 1 if its memory ran
        out], on the device. If memory ran out on any rank, the gradients are invalid on all ranks."""
        divided, host, failure = self._divided, self._model.model.host, None
        total = self._total.zero_()

        def backward(loss: torch.Tensor) -> None:
            loss.backward()
            divided.after_backward()

        def before(last: bool) -> None:
            self._model.dropout_seed.value = hash((iteration, divided.remaining, self.mesh.rank))
            divided.before_micro_batch(last)

        divided.begin_iteration(len(pieces))
        try:
            total[:-1] = run_micro_batches(
                pieces, self._model, self.device, num_targets, backward, before,
                skip=self.mesh.size == 1, context=self._context, sources=len(total) - 1,
            )  # fmt: skip
        except Exception as e:
            if not is_out_of_memory(e) or isinstance(e, torch.distributed.DistError) or self._context:
                raise  # ranks that share documents wait for this one in the middle of the backward
            started = pieces[: len(pieces) - divided.remaining] or pieces[:1]
            failure = Failure(max(started, key=lambda p: p.num_tokens), started[-1], str(e), host.most_bytes)
        if failure:
            drop_graph()
            host.finish_sending()
            divided.abandon_iteration()
            total[:-1], total[-1] = 0.0, 1.0
        divided.end_iteration()
        return total, failure

    def _shrink_memory(self, failure: Failure | None, pack: int, iteration: int) -> None:
        """Use less memory from now on, the same on all ranks, after at least one of them had a failure."""
        self.memory, text = agree_on_smaller(self.memory, failure, self.mesh)
        self._model.keep_activations(self.memory.activations)
        logger.warning(f"iteration {iteration}: {text}")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            self.memory.log_plan(pack, self.mesh)

    def _sum_over_ranks(self, total: torch.Tensor) -> tuple[list[float], float]:
        """Sum `_attempt`'s total over ranks, together with the norm of gradients.

        This is the only wait for the device in an iteration: the host's work until the next backward overlaps the step.
        """
        gradients = self.gradients
        norm = self._optimizer.norm(gradients).float() if gradients else torch.zeros((), device=self.device)
        self._optimizer.prepare(gradients)
        if self.mesh.size == 1:
            *losses, failures, self._norm = torch.stack([*total, norm]).tolist()
        else:
            square = norm.double().square() / self.mesh.dp_replicate  # all replicas have the same
            *losses, failures, square = self.mesh.ranks.sum_on_device(torch.stack([*total.double(), square]))
            self._norm = math.sqrt(square)
        self._finite = math.isfinite(sum(losses)) and math.isfinite(self._norm)
        return losses, failures

    def step(self, lr: float, max_norm: float | None) -> tuple[float, bool]:
        if not self._has_targets:
            return 0.0, False
        if self._finite:
            norm = torch.full((), self._norm, device=self.device)
            self._optimizer.apply(self.gradients, lr, max_norm, norm)
            self._divided.gather()
        return self._norm, self._finite

    def _shards(self) -> dict[str, Shard]:
        kept = self._frozen_weights
        frozen = {n: Shard(make_range(p.rows.weight.data.view(-1), p.begin, kept), {}) for n, p in self._frozen.items()}
        found = self._optimizer.shards() | frozen
        return {n: found[n] for n in self._shapes if n in found}

    def _restore_state(self, name: str, key: str, value: torch.Tensor) -> None:
        self._optimizer.restore_state(name, key, value)

    def _sync_weights(self) -> None:
        self._optimizer.sync_weights()
        self._divided.gather()
