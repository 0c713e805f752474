"""Weights and gradient sums of a model whose state is divided over the shard ranks of a mesh.

    rank           0          1          2          3         rows of dim 0, in units that keep groups of 8-bit scales
    parameter  |──────────|──────────|──────────|─────▒▒▒▒|   together; ▒ padding: the last ranks hold less, or nothing

Every rank computes with full weights and makes full gradients; it holds, and updates, its own rows. Full weights and
gradients are kept as long as memory allows (`Division`): at best over the whole iteration, so that both travel once;
else a block's weights are gathered before it computes and freed after it, its gradients reduced and freed in each
backward. Both travel while neighbouring blocks compute. On a mesh of ones full and own are the same tensors, and
nothing travels.
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
from xtuner.model.linear import OwnsSums
from xtuner.model.ops.gradient_sums import GradientSum
from xtuner.optim.adamw import GROUP

ALL_GATHER: Any = (
    getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
)  # PyTorch < 2.13
FINISHED_BEFORE = 2  # unit of the next forward; by then the embedding's gradients, reduced last, have arrived
Collective = tuple[str, int]  # ("forward" or "backward", unit whose weights are gathered for it), ("reduce", unit)
REDUCE_SCATTER: Any = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor


def rows_each(shape: torch.Size, ranks: int) -> int:
    """Rows of dim 0 that a rank holds; the last ranks hold less, or none."""
    if ranks == 1:
        return shape[0]
    unit = GROUP // math.gcd(shape[1:].numel(), GROUP)
    return -(-shape[0] // (unit * ranks)) * unit


class Divided:
    """One parameter: full, and this rank's rows of it.

    Args:
        keep_weight, keep_gradient: whether the full ones stay over the whole iteration.

    Attributes:
        weight: the full parameter that modules compute with.
        rows: this rank's part, in the dtype that computes.
        own: the same flat, with its padding, as it travels; `full` is all ranks'.
        sum, gradient: of the full weight in this process; of this rank's rows, summed over ranks once that is done.
            None for a frozen parameter.
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
        each = rows_each(shape, mesh.shard_size)
        first = min(mesh.shard_rank * each, shape[0])
        self.begin, self.count = first * row, min(each, shape[0] - first) * row
        self.mine = slice(mesh.shard_rank * each * row, (mesh.shard_rank + 1) * each * row)
        self.keep_weight, self.keep_gradient = keep_weight, keep_gradient
        if mesh.shard_size == 1:
            self.weight, self.full = weight, weight.data.view(-1)
        else:
            self.full = torch.empty(mesh.shard_size * each * row, dtype=weight.dtype, device=device)
            self.weight = nn.Parameter(self.full[:numel].view(shape).data, requires_grad=weight.requires_grad)
        self.own = self.full[self.mine]
        if not keep_weight:
            self.own = torch.empty_like(self.own)
            release(self.full)
        local = torch.Size([self.count // row, *shape[1:]])
        self.rows = Rows(self.weight if mesh.shard_size == 1 else self.own[: self.count].view(local), self.begin)
        self.sum: GradientSum | None = None
        self.gradient: torch.Tensor | None = None
        self.is_new = True  # nothing has been summed for these rows in this iteration
        if weight.requires_grad:
            self.buffer = torch.empty_like(self.full, dtype=sums)
            self.sum = GradientSum(self.buffer[:numel].view(shape))
            self.own_buffer = self.buffer[self.mine]
            if not keep_gradient:
                self.own_buffer = torch.zeros_like(self.own_buffer)
                release(self.buffer)
            self.gradient = self.own_buffer[: self.count].view(local)


class DividedModel:
    """The parameters of a model by name, and what travels between ranks while it computes.

    A unit travels at once: the embedding, each block, and the last norm with the head. All ranks start the collectives
    of a micro-batch in the order of `_collectives`, a hook those up to its own: a rank that cannot compute knows what
    the others wait for.

    Args:
        model: on "meta" where the mesh divides; its parameters are made here, with contents that do not matter.
        sums: dtype of gradient sums.
    """

    def __init__(
        self, model: CausalLM, mesh: Mesh, device: torch.device, division: Division, sums: torch.dtype
    ) -> None:
        self.mesh, self._device = mesh, device
        layers: list[nn.Module] = list(model.model.layers)
        unit_of = {id(m): i for i, block in enumerate(layers, 1) for m in block.modules()}
        unit_of[id(model.model.tok_embeddings)] = 0
        self._units: list[list[Divided]] = [[] for _ in range(len(layers) + 2)]
        self.parameters: dict[str, Divided] = {}
        for prefix, module in model.named_modules():
            for key, weight in list(module.named_parameters(recurse=False)):
                unit = unit_of.get(id(module), len(layers) + 1)
                keep_weight = division.weights or unit not in range(1, len(layers) + 1)
                p = Divided(weight, mesh, device, sums, keep_weight, division.gradients)
                setattr(module, key, p.weight)
                self._connect(p, module, key)
                self._units[unit].append(p)
                self.parameters[f"{prefix}.{key}" if prefix else key] = p
        self._sums = [p for p in self.parameters.values() if p.sum]
        self._reduces_once = division.gradients
        self._gathered = {i for i, unit in enumerate(self._units) if not all(p.keep_weight for p in unit)}
        self._learning = {i for i, unit in enumerate(self._units) if any(p.sum for p in unit)}
        self._collecting: deque[Collective] = deque()  # of this micro-batch, those that have not been started
        self.to_come = 0  # micro-batches of this iteration that have not begun
        self._arriving: dict[int, Callable[[], object]] = {}  # units whose weights are on their way
        self._here = set(range(len(self._units))) - self._gathered
        self._reducing: list[tuple[list[Divided], list[torch.Tensor], Callable[[], object]]] = []
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
    def _connect(p: Divided, module: nn.Module, key: str) -> None:
        if p.sum and isinstance(module, OwnsSums):
            module.gradient_sums[key] = p.sum
        elif p.sum:  # a module that does not own sums hands over what autograd gives it
            p.weight.register_post_accumulate_grad_hook(p.sum.take)

    def _hook(self, i: int, module: nn.Module) -> None:
        def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if i == FINISHED_BEFORE:
                self._finish()
            self._need(i)
            self._start_up_to("forward", i + 1)
            self._expect(i + 1)

        module.register_forward_pre_hook(before)

    def _hook_block(self, i: int, block: nn.Module) -> None:
        def before_backward(_: torch.Tensor) -> None:
            self._start_up_to("reduce", i + 1)  # the output layer's; a block's have been started
            self._need(i)
            self._start_up_to("backward", i - 1)

        def after_backward(_: torch.Tensor) -> None:
            self._leave(i)
            self._start_up_to("reduce", i)

        def around(module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
            if inputs[0].requires_grad:
                inputs[0].register_hook(after_backward)
            if output.requires_grad:
                output.register_hook(before_backward)
            if i < len(self._units) - 2 or not output.requires_grad:  # the last block's backward comes at once
                self._leave(i)

        block.register_forward_hook(cast(Any, around))

    # The order of what travels

    def _collectives(self, reduces: bool) -> Iterator["Collective"]:
        """Those of one micro-batch. Weights come a block ahead; a unit's gradients go after its backward."""
        yield from (("forward", i) for i in sorted(self._gathered))
        lowest = min(self._learning, default=0)
        for i in reversed(range(len(self._units))):
            if lowest < i < len(self._units) - 1 and i - 1 in self._gathered:
                yield "backward", i - 1
            if reduces and i in self._learning:
                yield "reduce", i

    def _start_up_to(self, when: str, i: int) -> None:
        while (when, i) in self._collecting:
            self._start_next()

    def _start_next(self) -> None:
        """What takes memory comes before what other ranks see, so that a collective is started as a whole or not."""
        when, i = self._collecting[0]
        if when == "reduce":
            if i:  # the embedding's come after block 1's with nothing between: to wait for those would idle the device
                self._finish()
            self._reduce([p for p in self._units[i] if p.sum])
        else:
            self._arriving[i] = self._all_gather(self._units[i])
        self._collecting.popleft()

    # Weights

    def gather(self) -> None:
        """Begin to bring all ranks' new rows to the full weights, where these are kept."""
        if self.mesh.shard_size == 1:
            return
        for i, unit in enumerate(self._units):
            if i not in self._gathered:
                self._need(i)
                self._arriving[i] = self._all_gather(unit)

    def _all_gather(self, unit: list[Divided]) -> Callable[[], object]:
        for p in unit:
            take(p.full)
        if self._device.type == "cpu":  # gloo does not gather in place
            for p, own in [(p, p.own.clone()) for p in unit]:
                ALL_GATHER(p.full, own, group=self._group)
            return lambda: None
        with distributed._coalescing_manager(self._group, async_ops=True) as work:
            for p in unit:
                ALL_GATHER(p.full, p.own, group=self._group)
        return cast(Callable[[], object], work.wait)

    def _expect(self, i: int) -> None:
        """Unit `i` computes next."""
        if i not in self._here and i not in self._arriving and i < len(self._units):
            self._arriving[i] = self._all_gather(self._units[i])

    def _need(self, i: int) -> None:
        """Unit `i` computes now."""
        self._expect(i)
        if i in self._arriving:
            self._arriving.pop(i)()
            self._here.add(i)

    def _leave(self, i: int) -> None:
        """Unit `i` has computed."""
        if i in self._gathered:
            self._here.discard(i)
            for p in self._units[i]:
                release(p.full)

    # Gradients

    def begin(self, micro_batches: int) -> None:
        """Before an iteration of so many micro-batches: forget the sums of the last one."""
        self.to_come = micro_batches
        self._collecting.clear()
        for p in self._sums:
            assert p.sum
            p.sum.reset()
            p.is_new = True

    def before_micro_batch(self, last: bool) -> None:
        """Args: last: of the iteration."""
        self.to_come -= 1
        if self.mesh.shard_size > 1:
            self._collecting.extend(self._collectives(reduces=last or not self._reduces_once))

    def after_backward(self) -> None:
        """Start what no hook has started: of a block whose input needs no gradient, for one."""
        while self._collecting:
            self._start_next()
        if not self.to_come:
            self._finish()
        self._free_blocks()

    def _free_blocks(self) -> None:
        """Blocks' weights go, those on their way too."""
        for i in [*self._arriving]:
            self._need(i)
        for i in self._gathered:
            self._leave(i)

    def abandon(self) -> None:
        """After memory ran out in a micro-batch: this rank computes no more in this iteration, whose sums are lost, but
        takes part in all collectives that other ranks will start until its end. The graph must be gone by now."""
        self._finish()
        self._free_blocks()
        for p in self._sums:
            assert p.sum
            p.sum.reset()
            p.weight.grad = None
            if not p.keep_gradient:
                release(p.buffer)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        while self._collecting or self.to_come:
            if not self._collecting:
                self.before_micro_batch(self.to_come == 1)
            if self._collecting:
                self._start_next()
            self._finish()
            self._free_blocks()

    def end(self) -> None:
        """After an iteration's last backward: sum over the copies of the model."""
        if self.mesh.dp_replicate > 1:
            for p in self._sums:
                if p.sum and self.mesh.shard_size == 1:
                    p.sum.value()  # zeros where this rank has nothing to add
                distributed.all_reduce(p.own_buffer, group=self._replicas)

    def _reduce(self, unit: list[Divided]) -> None:
        into = [p.own_buffer if p.keep_gradient or p.is_new else torch.empty_like(p.own_buffer) for p in unit]
        for p in unit:
            assert p.sum
            p.is_new = False
            p.sum.value()  # zeros where this rank has nothing to add
            p.sum.reset()
        if self._device.type == "cpu":  # gloo does not scatter all dtypes
            for p, own in zip(unit, into, strict=True):
                distributed.all_reduce(p.buffer, group=self._group)
                own.copy_(p.buffer[p.mine])
            self._reducing.append((unit, into, lambda: None))
            return
        with distributed._coalescing_manager(self._group, async_ops=True) as work:
            for p, own in zip(unit, into, strict=True):
                REDUCE_SCATTER(own, p.buffer, group=self._group)
        self._reducing.append((unit, into, work.wait))

    def _finish(self) -> None:
        """Add what the reductions on their way have summed to this rank's rows."""
        while self._reducing:
            unit, into, wait = self._reducing.pop(0)
            wait()
            for p, own in zip(unit, into, strict=True):
                if own is not p.own_buffer:
                    p.own_buffer.add_(own)
                if not p.keep_gradient:
                    release(p.buffer)


def release(tensor: torch.Tensor) -> None:
    """Give back the memory behind a tensor and all its views, whose contents are lost."""
    tensor.untyped_storage().resize_(0)


def take(tensor: torch.Tensor) -> None:
    """Memory again for a tensor that has been released."""
    if not tensor.untyped_storage().size():
        tensor.untyped_storage().resize_(tensor.numel() * tensor.itemsize)
