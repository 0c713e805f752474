"""Parameters, gradients and optimizer state cut over all ranks by PyTorch's FSDP2: the same numbers, less memory.

Each block is gathered in bf16 just before it computes, and its gradients are summed in fp32. Memory a parameter and
rank on n GPUs: (master 4 B + gradient 4 B + two moments 8 B) / n, and a block or two in bf16.

"full" cuts over all ranks; "hybrid" over those of a node, with a copy of everything on every node: less traffic
between nodes for more memory.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from xtuner.core import dist
from xtuner.data.batch import Batch
from xtuner.dist.mesh import Mesh
from xtuner.engine import memory
from xtuner.engine.optim import OptimWrapper
from xtuner.engine.shard import Shard, ShardedStrategy
from xtuner.engine.trial import pack
from xtuner.model.decoder import CausalLM
from xtuner.model.source import ModelSource
from xtuner.model.weights import Part


class FSDPStrategy(ShardedStrategy):
    name = "fsdp"

    def __init__(self, source: ModelSource, optim: OptimWrapper, device: torch.device, mesh: Mesh) -> None:
        self.compute_dtype = optim.compute_dtype(device)
        self.memory = memory.of_fsdp(source, optim, device, mesh.shard_size)
        model = source.empty(torch.device("meta"), torch.float32)
        shapes = {n: p.shape for n, p in model.named_parameters()}
        super().__init__(source.config, shapes, device, mesh, gives=mesh.replica == 0)
        sizes, names = (mesh.dp_replicate, mesh.dp_shard), ("dp_replicate", "dp_shard")
        first = int(mesh.dp_replicate == 1)
        devices = init_device_mesh(device.type, sizes[first:], mesh_dim_names=names[first:])
        # inputs are not cast: rope angles stay fp32
        policy = MixedPrecisionPolicy(self.compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in model.model.layers:
            fully_shard(block, mesh=devices, mp_policy=policy)
        self._root: FSDPModule = fully_shard(model, mesh=devices, mp_policy=policy)
        model.to_empty(device=device)
        source.configure(model, device, self.compute_dtype)
        model.model.keeps = self.memory.plan.keeps
        for module in (self._root, *model.model.layers):
            cut = cast(FSDPModule, module)
            cut.set_gradient_divide_factor(1.0)  # we divide by targets, not by ranks
            cut.set_force_sum_reduction_for_comms(True)  # gloo has no other
        self._model = model.train()
        self.parameters = cast(dict[str, DTensor], dict(model.named_parameters()))
        # the optimizer sees plain tensors, this rank's rows: any that updates each number by itself does the same there
        self._rows = {n: torch.nn.Parameter(p.to_local().detach()) for n, p in self.parameters.items()}
        self.optimizer = optim.build(self._rows.values())
        self._traits = optim.traits(device)
        source.fill({n: s.master for n, s in self._shards().items()}, self._shapes, device)
        self._may_step = False

    @property
    def model(self) -> CausalLM:
        return self._model

    def forward_backward(self, batch: Sequence[Batch], num_targets: int, parts: Sequence[int] | None = None) -> float:
        self._may_step = False
        if not num_targets:
            return 0.0
        total = torch.zeros((), device=self.device)
        counts = parts or self.parts(batch)
        pieces = [p for pack, count in zip(batch, counts, strict=True) for p in pack.split(count)]
        for i, piece in enumerate(pieces):  # also without targets: other ranks wait for the collectives
            dist.note(f"forward and backward of micro-batch {i + 1} of {len(pieces)}")
            last = i == len(pieces) - 1
            # whole gradients would take the room for which packs are cut; copies of the model sum theirs once
            self._root.set_requires_gradient_sync(last or len(pieces) > len(batch))
            self._root.set_requires_all_reduce(last)
            b = piece.to(self.device)
            loss = self._model(
                b.input_ids, b.cu_seqlens, b.targets, b.position_ids, b.max_seqlen, scale=1 / num_targets
            )
            loss.backward()
            total += loss.detach()
        mean = self.mesh.ranks.sum_on_device(total)
        self._may_step = math.isfinite(mean)
        return mean

    def step(self, lr: float, max_norm: float | None) -> tuple[float, bool]:
        grads = [p.grad for p in self._model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads) if grads else torch.zeros(())
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        value = norm.item()  # the last wait for the device: what follows it on the host goes on beside the update
        applied = self._may_step and math.isfinite(value)
        if applied:
            for name, rows in self._rows.items():
                whole = self.parameters[name].grad
                rows.grad = cast(DTensor, whole).to_local() if whole is not None and rows.numel() else None
            if max_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(self._rows.values(), max_norm, norm)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self._refresh()
        return value, applied

    def _shards(self) -> dict[str, Shard]:
        state = self.optimizer.state
        return {
            name: Shard(Part(rows.detach().view(-1), self._begin(name)), pack(state.get(rows, {}), rows))
            for name, rows in self._rows.items()
            if rows.numel()
        }

    def _begin(self, name: str) -> int:
        """FSDP cuts the first dimension into equal numbers of rows, the last ranks taking fewer or none."""
        rows = self._shapes[name][0]
        return self.mesh.shard_rank * -(-rows // self.mesh.shard_size) * (self._shapes[name].numel() // rows)

    def _place(self, name: str, key: str, value: torch.Tensor) -> None:
        rows = self._rows[name]
        self.optimizer.state[rows][key] = self._traits.unpack(key, value, rows)

    def _refresh(self) -> None:
        self._model.zero_grad(set_to_none=True)
        self.optimizer.zero_grad(set_to_none=True)
