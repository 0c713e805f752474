"""Weights and gradient sums of a model whose state is divided over the shard ranks of a mesh.

    rank           0          1          2          3         rows of dim 0, in units that do not split the groups of
    parameter  |──────────|──────────|──────────|─────▒▒▒▒|   8-bit scales; ▒ padding: the last ranks have less, or none

Every rank computes with full weights and full gradients, and stores and updates its own rows. `Division` says how long
full tensors are kept. At best they stay for the whole iteration, and weights are gathered and gradients reduced once.
Otherwise a block's weights are gathered before it computes and freed afterwards, and its gradients are reduced and
freed in each backward. Communication overlaps the compute of neighbouring blocks. On a mesh of ones, own rows and full
tensors are the same, and there is no communication.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import distributed, nn

from xtuner.dist.mesh import Mesh
from xtuner.engine.memory import Division
from xtuner.engine.strategies.local_optimizer import Rows
from xtuner.model.decoder import CausalLM
from xtuner.model.linear import GradientSumModule
from xtuner.model.ops.gradient_sums import GradientSum
from xtuner.optim.adamw import GROUP

ALL_GATHER: Any = (
    getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
)  # PyTorch < 2.13
FINISHED_BEFORE = 2  # the next forward waits for reductions before this unit: the embedding's, started last, are done
Collective = tuple[str, int]  # ("forward" or "backward", unit whose weights are gathered for it), or ("reduce", unit)
REDUCE_SCATTER: Any = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor


def rows_per_rank(shape: torch.Size, ranks: int) -> int:
    """Rows of dim 0 on each rank; the last ranks have fewer, or none."""
    if ranks == 1:
        return shape[0]
    unit = GROUP // math.gcd(shape[1:].numel(), GROUP)
    return -(-shape[0] // (unit * ranks)) * unit


class DividedParameter:
    """A parameter: full, and this rank's rows of it.

    Args:
        sums: dtype of gradient sums.
        keep_weight, keep_gradient: whether the full tensors stay for the whole iteration.

    Attributes:
        weight: the full parameter that modules compute with.
        rows: this rank's rows, in the compute dtype.
        own: this rank's rows, flat and with padding, as they are sent; `full` has those of all ranks.
        sum: this process's gradient sum of the full weight; None for a frozen parameter.
        gradient: this rank's rows of the gradient, valid once it is reduced; None for a frozen parameter.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        mesh: Mesh,
        device: torch.device,
        sums: torch.dtype,
        keep_weight: bool,
        keep_gradient: bool,
    ) -> None:
        shape, numel, row = weight.shape, weight.numel(), weight.shape[1:].numel()
        each = rows_per_rank(shape, mesh.shard_size)
        first = min(mesh.shard_rank * each, shape[0])
        self.begin, self.count = first * row, min(each, shape[0] - first) * row
        self.own_slice = slice(mesh.shard_rank * each * row, (mesh.shard_rank + 1) * each * row)
        self.keep_weight, self.keep_gradient = keep_weight, keep_gradient
        if mesh.shard_size == 1:
            self.weight, self.full = weight, weight.data.view(-1)
        else:
            self.full = torch.empty(mesh.shard_size * each * row, dtype=weight.dtype, device=device)
            self.weight = nn.Parameter(self.full[:numel].view(shape).data, requires_grad=weight.requires_grad)
        self.own = self.full[self.own_slice]
        if not keep_weight:
            self.own = torch.empty_like(self.own)
            release(self.full)
        local = torch.Size([self.count // row, *shape[1:]])
        self.rows = Rows(self.weight if mesh.shard_size == 1 else self.own[: self.count].view(local), self.begin)
        self.sum: GradientSum | None = None
        self.gradient: torch.Tensor | None = None
        self.is_new = True  # nothing has been reduced into these rows in this iteration
        if weight.requires_grad:
            self.buffer = torch.empty_like(self.full, dtype=sums)
            self.sum = GradientSum(self.buffer[:numel].view(shape))
            self.own_buffer = self.buffer[self.own_slice]
            if not keep_gradient:
                self.own_buffer = torch.zeros_like(self.own_buffer)
                release(self.buffer)
            self.gradient = self.own_buffer[: self.count].view(local)


class DividedModel:
    """The parameters of a model by name, and their communication while it computes.

    The parameters of a unit are sent together. Units are the embedding, each block, and the last norm with the head.
    All ranks start the collectives of a micro-batch in the order of `_collectives`; a hook starts those up to its own.
    So a rank that cannot compute still knows which collectives the others wait for.

    Args:
        model: on "meta" if the mesh shards it; its parameters are allocated here, uninitialized.
        sums: dtype of gradient sums.
    """

    def __init__(
        self, model: CausalLM, mesh: Mesh, device: torch.device, division: Division, sums: torch.dtype
    ) -> None:
        self.mesh, self._device = mesh, device
        layers: list[nn.Module] = list(model.model.layers)
        unit_of = {id(m): i for i, block in enumerate(layers, 1) for m in block.modules()}
        unit_of[id(model.model.tok_embeddings)] = 0
        self._units: list[list[DividedParameter]] = [[] for _ in range(len(layers) + 2)]
        self.parameters: dict[str, DividedParameter] = {}
        for prefix, module in model.named_modules():
            for key, weight in list(module.named_parameters(recurse=False)):
                unit = unit_of.get(id(module), len(layers) + 1)
                keep_weight = division.weights or unit not in range(1, len(layers) + 1)
                p = DividedParameter(weight, mesh, device, sums, keep_weight, division.gradients)
                setattr(module, key, p.weight)
                self._connect(p, module, key)
                self._units[unit].append(p)
                self.parameters[f"{prefix}.{key}" if prefix else key] = p
        self._sums = [p for p in self.parameters.values() if p.sum]
        self._reduces_once = division.gradients
        self._gathered = {i for i, unit in enumerate(self._units) if not all(p.keep_weight for p in unit)}
        self._trained = {i for i, unit in enumerate(self._units) if any(p.sum for p in unit)}
        self._pending: deque[Collective] = deque()  # collectives of this micro-batch that have not been started
        self.remaining = 0  # micro-batches of this iteration that have not been started
        self._gathering: dict[int, Callable[[], object]] = {}  # unit → wait, for gathers that have been started
        self._available = set(range(len(self._units))) - self._gathered  # units whose weights are full
        self._reducing: list[tuple[list[DividedParameter], list[torch.Tensor], Callable[[], object]]] = []
        if mesh.shard_size > 1:
            self._group = mesh.shard_group
            self._hook(0, model.model.tok_embeddings)
            for i, block in enumerate(layers, 1):
                self._hook(i, block)
                self._hook_block(i, block)
            self._hook(len(layers) + 1, model.model.norm)
        if mesh.dp_replicate > 1:
            self._replicas = mesh.replica_group

    @staticmethod
    def _connect(p: DividedParameter, module: nn.Module, key: str) -> None:
        if p.sum and isinstance(module, GradientSumModule):
            module.gradient_sums[key] = p.sum
        elif p.sum:  # a module without gradient sums: move autograd's gradient to the sum
            p.weight.register_post_accumulate_grad_hook(p.sum.take_gradient)

    def _hook(self, i: int, module: nn.Module) -> None:
        def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if i == FINISHED_BEFORE:
                self._finish_reductions()
            self._wait_for_weights(i)
            self._start_up_to("forward", i + 1)
            self._start_gather(i + 1)

        module.register_forward_pre_hook(before)

    def _hook_block(self, i: int, block: nn.Module) -> None:
        def before_backward(_: torch.Tensor) -> None:
            self._start_up_to("reduce", i + 1)  # the output layer's; those of blocks have been started
            self._wait_for_weights(i)
            self._start_up_to("backward", i - 1)

        def after_backward(_: torch.Tensor) -> None:
            self._free_weights(i)
            self._start_up_to("reduce", i)

        def around(module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
            if inputs[0].requires_grad:
                inputs[0].register_hook(after_backward)
            if output.requires_grad:
                output.register_hook(before_backward)
            if i < len(self._units) - 2 or not output.requires_grad:  # the last block's backward follows immediately
                self._free_weights(i)

        block.register_forward_hook(cast(Any, around))

    # The order of collectives

    def _collectives(self, reduces: bool) -> Iterator["Collective"]:
        """All of one micro-batch. Weights are gathered a block ahead; gradients are reduced after a unit's backward."""
        yield from (("forward", i) for i in sorted(self._gathered))
        lowest = min(self._trained, default=0)
        for i in reversed(range(len(self._units))):
            if lowest < i < len(self._units) - 1 and i - 1 in self._gathered:
                yield "backward", i - 1
            if reduces and i in self._trained:
                yield "reduce", i

    def _start_up_to(self, when: str, i: int) -> None:
        while (when, i) in self._pending:
            self._start_next()

    def _start_next(self) -> None:
        """Allocate memory before the first call that other ranks see: a collective is started in full or not at all."""
        when, i = self._pending[0]
        if when == "reduce":
            if i:  # the embedding's follows block 1's with no compute between them: waiting would idle the device
                self._finish_reductions()
            self._reduce([p for p in self._units[i] if p.sum])
        else:
            self._gathering[i] = self._all_gather(self._units[i])
        self._pending.popleft()

    # Weights

    def gather(self) -> None:
        """Start to gather the updated rows of all ranks into the full weights that are kept."""
        if self.mesh.shard_size == 1:
            return
        for i, unit in enumerate(self._units):
            if i not in self._gathered:
                self._wait_for_weights(i)
                self._gathering[i] = self._all_gather(unit)

    def _all_gather(self, unit: list[DividedParameter]) -> Callable[[], object]:
        for p in unit:
            allocate(p.full)
        if self._device.type == "cpu":  # gloo does not gather in place
            for p, own in [(p, p.own.clone()) for p in unit]:
                ALL_GATHER(p.full, own, group=self._group)
            return lambda: None
        with distributed._coalescing_manager(self._group, async_ops=True) as work:
            for p in unit:
                ALL_GATHER(p.full, p.own, group=self._group)
        return cast(Callable[[], object], work.wait)

    def _start_gather(self, i: int) -> None:
        """Start to gather unit `i`, which computes next."""
        if i not in self._available and i not in self._gathering and i < len(self._units):
            self._gathering[i] = self._all_gather(self._units[i])

    def _wait_for_weights(self, i: int) -> None:
        """Wait until the weights of unit `i` are full: it computes now."""
        self._start_gather(i)
        if i in self._gathering:
            self._gathering.pop(i)()
            self._available.add(i)

    def _free_weights(self, i: int) -> None:
        """Free the full weights of unit `i`, which has computed, unless they are kept."""
        if i in self._gathered:
            self._available.discard(i)
            for p in self._units[i]:
                release(p.full)

    # Gradients

    def begin_iteration(self, micro_batches: int) -> None:
        """Reset the sums before an iteration of `micro_batches`."""
        self.remaining = micro_batches
        self._pending.clear()
        for p in self._sums:
            assert p.sum
            p.sum.reset()
            p.is_new = True

    def before_micro_batch(self, last: bool) -> None:
        """List the collectives of a micro-batch, which may be the `last` of the iteration."""
        self.remaining -= 1
        if self.mesh.shard_size > 1:
            self._pending.extend(self._collectives(reduces=last or not self._reduces_once))

    def after_backward(self) -> None:
        """Start the collectives that no hook has started, such as those of a block whose input needs no gradient."""
        while self._pending:
            self._start_next()
        if not self.remaining:
            self._finish_reductions()
        self._free_blocks()

    def _free_blocks(self) -> None:
        """Free the weights of all blocks, including those being gathered."""
        for i in [*self._gathering]:
            self._wait_for_weights(i)
        for i in self._gathered:
            self._free_weights(i)

    def abandon_iteration(self) -> None:
        """After memory ran out in a micro-batch: discard this iteration's sums and compute nothing more in it, but join
        all collectives that other ranks will start until its end. The graph must have been freed."""
        self._finish_reductions()
        self._free_blocks()
        for p in self._sums:
            assert p.sum
            p.sum.reset()
            p.weight.grad = None
            if not p.keep_gradient:
                release(p.buffer)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        while self._pending or self.remaining:
            if not self._pending:
                self.before_micro_batch(self.remaining == 1)
            if self._pending:
                self._start_next()
            self._finish_reductions()
            self._free_blocks()

    def end_iteration(self) -> None:
        """After an iteration's last backward: sum gradients over the replicas of the model."""
        if self.mesh.dp_replicate > 1:
            for p in self._sums:
                if p.sum and self.mesh.shard_size == 1:
                    p.sum.value()  # zeros if this rank has nothing to add
                distributed.all_reduce(p.own_buffer, group=self._replicas)

    def _reduce(self, unit: list[DividedParameter]) -> None:
        into = [p.own_buffer if p.keep_gradient or p.is_new else torch.empty_like(p.own_buffer) for p in unit]
        for p in unit:
            assert p.sum
            p.is_new = False
            p.sum.value()  # zeros if this rank has nothing to add
            p.sum.reset()
        if self._device.type == "cpu":  # gloo does not scatter all dtypes
            for p, own in zip(unit, into, strict=True):
                distributed.all_reduce(p.buffer, group=self._group)
                own.copy_(p.buffer[p.own_slice])
            self._reducing.append((unit, into, lambda: None))
            return
        with distributed._coalescing_manager(self._group, async_ops=True) as work:
            for p, own in zip(unit, into, strict=True):
                REDUCE_SCATTER(own, p.buffer, group=self._group)
        self._reducing.append((unit, into, work.wait))

    def _finish_reductions(self) -> None:
        """Wait for the reductions that have been started, and add their results to this rank's rows."""
        while self._reducing:
            unit, into, wait = self._reducing.pop(0)
            wait()
            for p, own in zip(unit, into, strict=True):
                if own is not p.own_buffer:
                    p.own_buffer.add_(own)
                if not p.keep_gradient:
                    release(p.buffer)


def release(tensor: torch.Tensor) -> None:
    """Free the memory of a tensor and all its views; their contents are lost."""
    tensor.untyped_storage().resize_(0)


def allocate(tensor: torch.Tensor) -> None:
    """Allocate memory again for a tensor that has been released."""
    if not tensor.untyped_storage().size():
        tensor.untyped_storage().resize_(tensor.numel() * tensor.itemsize)
