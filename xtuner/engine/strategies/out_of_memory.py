"""Which errors mean that memory ran out, and how an iteration is repeated after one.

Weights change only in the step, so forward and backward can be repeated. Each time, micro-batches get a quarter smaller
and keep a quarter less for the backward, until one of LEAST tokens, or of a single document, keeps nothing.
"""

import gc
from dataclasses import dataclass, replace

import torch

from xtuner.core.log import human_bytes
from xtuner.data.loading.batch import Batch
from xtuner.dist.mesh import Mesh
from xtuner.engine import memory
from xtuner.engine.memory import Memory
from xtuner.model.ops.functions import NOTHING

OLDEST = torch.zeros((), requires_grad=True).clone()  # no node of a model's graph is older


class OutOfMemory(MemoryError):
    """Memory ran out on `rank`, and no smaller micro-batch is left to try. Raised on all ranks."""

    def __init__(self, text: str, rank: int) -> None:
        super().__init__(text)
        self.rank = rank


@dataclass(frozen=True)
class Failure:
    """Of the micro-batches up to the one at which this rank's memory ran out, and what the error says. Not the error
    itself: its traceback holds the graph."""

    largest: Batch
    last: Batch
    text: str


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA's allocator, CUDA itself (pinned memory, libraries), or the host's allocator."""
    words = ("out of memory", "can't allocate memory", "std::bad_alloc", "STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(w in str(error) for w in words)
    )


def drop_graph() -> None:
    """Free the graph of a forward or backward that has raised an error, which nobody refers to any more.

    Tasks that were ready to run stay in autograd's queue of this thread, which takes those of newer nodes first: they
    go when it has to come to an older one.
    """
    OLDEST.backward()
    gc.collect()


def smaller(now: Memory, piece: Batch) -> Memory | None:
    """What to try after memory ran out with micro-batches up to this one; None if nothing smaller is left."""
    plan, tokens = now.plan, piece.num_tokens
    can_be_cut = tokens > max(piece.max_seqlen, memory.LEAST)
    can_keep_less = bool(plan.room) and any(keep != NOTHING for keep in plan.keeps(tokens))
    if not can_be_cut and not can_keep_less:
        return None
    if plan.room:
        plan = replace(plan, room=min(plan.room, plan.peak(tokens)) * 3 // 4)
    most = min(now.most or tokens, max(tokens * 3 // 4 if can_be_cut else tokens, memory.LEAST))
    whole = plan.largest(most)
    if now.plan.fits(now.most or tokens) and whole >= memory.LEAST:
        most = whole  # nothing was recomputed, and nothing need be
    found = replace(now, plan=plan, most=most)
    return found if found != now else None


def agree_on_smaller(now: Memory, failure: Failure | None, mesh: Mesh) -> tuple[Memory, str]:
    """What all ranks repeat the iteration with, and a sentence about it. All call it, those that failed with a failure.

    Raises: OutOfMemory if a rank has nothing smaller to try.
    """
    mine = None
    if failure:
        # a long document may have fitted, and what comes after it not
        found = smaller(now, failure.largest) or smaller(now, failure.last)
        mine = [failure.text, failure.largest.num_tokens, found and [found.most, found.plan.room]]
    heard = mesh.ranks.gather(mine) if mesh.size > 1 else [mine]
    failures = {rank: message for rank, message in enumerate(heard) if message}
    after = now
    for rank, (text, _, limits) in failures.items():
        if limits is None:
            raise OutOfMemory(text, rank)
        most, room = _least(limits[0], after.most), _least(limits[1], after.plan.room)
        after = replace(after, plan=replace(after.plan, room=room), most=most)
    where = " and ".join(
        (f"on rank {rank} " if mesh.size > 1 else "") + f"with micro-batches of up to {tokens:,} tokens"
        for rank, (_, tokens, _) in failures.items()
    )
    return after, f"memory ran out {where}; repeated with {_changes(now, after)}, which the run keeps"


def _least(*values: int | None) -> int | None:
    return min((v for v in values if v is not None), default=None)


def _changes(before: Memory, after: Memory) -> str:
    found = []
    if after.most != before.most:
        size = "whole packs" if before.most is None else f"{before.most:,}"
        found.append(f"micro-batches of at most {after.most:,} tokens (before: {size})")
    if after.plan.room != before.plan.room:
        now, then = (human_bytes(m.plan.room or 0) for m in (after, before))
        found.append(f"{now} of memory for each (before: {then})")
    return " and ".join(found)
