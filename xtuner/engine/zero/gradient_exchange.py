"""Full gradients under ZeRO-1 and ZeRO-2: summed on every rank over micro-batches, then sent to their owners once.

    DeepSpeed's flat weights     |── rank 0 ──|── rank 1 ──|── rank 2 ──|── rank 3 ──|   each rank owns a part
    this rank's gradient sums    |▒▒▒         |▒▒▒         |▒▒▒         |▒▒▒         |   the same layout
    one message, ▒               a bucket: an equal piece of every part; each rank gets its own, summed over ranks

DeepSpeed reduces every gradient to all ranks, although only one needs it, and sums over micro-batches in the weights'
dtype. Here the reduced sums are put into the fp32 gradient that its step uses.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import distributed

from xtuner.dist.mesh import Mesh
from xtuner.engine.strategies.sharded_parameters import REDUCE_SCATTER
from xtuner.model.decoder import CausalLM
from xtuner.model.linear import GradientSumModule
from xtuner.model.ops.gradient_sums import GradientSum

MIN_BUCKET = 2**16  # elements sent at once; with far fewer an iteration would take hours


class _Group(NamedTuple):
    """A parameter group of DeepSpeed's optimizer."""

    full: torch.Tensor  # [ranks, n]: this rank's sums
    sums: list[GradientSum]  # of each parameter, views of `full`


class FullGradientSums:
    """
    Args:
        zero: DeepSpeed's optimizer of stage 1 or 2, without offload; its own reduction is turned off.
        dtype: of sums on this rank.
        bucket: elements that are sent at once.
        sent: dtype in which they are summed over ranks.
        unreduced: they are sent in `dtype`, and added by the receiver in fp32: half the bytes within a node. Between
            nodes a reduction sends less, as it first sums over the ranks of a node.
    """

    def __init__(
        self,
        zero: Any,
        model: CausalLM,
        mesh: Mesh,
        dtype: torch.dtype,
        bucket: int,
        sent: torch.dtype,
        unreduced: bool,
    ) -> None:
        ranks = mesh.size
        self._zero, self._rank, self._bucket = zero, mesh.rank, max(bucket, MIN_BUCKET) // ranks
        self._unreduced, self._sent = unreduced, dtype if unreduced else sent
        for hook in zero._grad_acc_hooks:
            hook.remove()
        zero.gradient_accumulation_dtype = torch.float32
        by_parameter: dict[int, GradientSum] = {}
        self._groups: list[_Group] = []
        for flat, parameters in zip(zero.bit16_groups_flat, zero.bit16_groups, strict=True):
            buffer = torch.zeros(flat.numel(), dtype=dtype, device=flat.device)
            sums = []
            for p in parameters:
                at = (p.data_ptr() - flat.data_ptr()) // flat.itemsize
                sums.append(GradientSum(buffer[at : at + p.numel()].view(p.shape)))
                by_parameter[id(p)] = sums[-1]
            self._groups.append(_Group(buffer.view(ranks, -1), sums))
        for module in model.modules():
            for key, p in module.named_parameters(recurse=False):
                if isinstance(module, GradientSumModule) and id(p) in by_parameter:
                    module.gradient_sums[key] = by_parameter[id(p)]
                elif id(p) in by_parameter:
                    p.register_post_accumulate_grad_hook(by_parameter[id(p)].take_gradient)

    def begin(self) -> None:
        """Reset gradients and sums before an iteration."""
        for i, group in enumerate(self._groups):
            self._zero.averaged_gradients[i] = None
            for s in group.sums:
                s.reset()

    def send(self) -> None:
        """Add the sums of all ranks to the gradients of their owners, and reset them."""
        for i, group in enumerate(self._groups):
            for s in group.sums:
                s.value()  # zeros if this rank has nothing to add
                s.reset()
            first = self._zero.averaged_gradients.get(i) is None
            if first:
                self._zero.averaged_gradients[i] = self._zero._build_compact_grad_partition_buffer(i)
            self._reduce(group.full, self._zero.averaged_gradients[i].flat_partition, first)

    def _reduce(self, full: torch.Tensor, own: torch.Tensor, first: bool) -> None:
        """Reduce this rank's sums `full` [ranks, n], and add to `own` [n], which is zero if `first`."""
        ranks, each = full.shape
        if ranks == 1:
            own.add_(full[0])
            return
        size = min(self._bucket, each)
        buffers = [full.new_empty(ranks * size, dtype=self._sent) for _ in range(2)]
        arriving: list[Callable[[], object]] = []
        for turn, begin in enumerate(range(0, each, size)):
            if len(arriving) == 2:  # its buffer is needed again
                arriving.pop(0)()
            part = slice(begin, min(begin + size, each))
            bucket = buffers[turn % 2][: ranks * (part.stop - begin)].view(ranks, -1)
            bucket.copy_(full[:, part])
            into = own[part]
            arriving.append((self._exchange if self._unreduced else self._scatter)(bucket, into, first))
        for finish in arriving:
            finish()

    def _exchange(self, bucket: torch.Tensor, own: torch.Tensor, first: bool) -> Callable[[], None]:
        """Each rank receives the unreduced sums of its part from all ranks, and adds them in `own`'s dtype."""
        received = torch.empty_like(bucket)
        work = distributed.all_to_all_single(received.view(-1), bucket.view(-1), async_op=True)

        def finish() -> None:
            work.wait()
            if first:
                torch.sum(received, 0, dtype=own.dtype, out=own)
            else:
                own.add_(received.sum(0, dtype=own.dtype))

        return finish

    def _scatter(self, bucket: torch.Tensor, own: torch.Tensor, first: bool) -> Callable[[], None]:
        if bucket.device.type == "cpu":  # gloo's reduce-scatter does not support all dtypes
            distributed.all_reduce(bucket)
            own.add_(bucket[self._rank])
            return lambda: None
        straight = first and bucket.dtype == own.dtype
        into = own if straight else torch.empty_like(bucket[0])
        work = REDUCE_SCATTER(into, bucket.view(-1), async_op=True)

        def finish() -> None:
            work.wait()
            if not straight:
                own.add_(into)

        return finish
