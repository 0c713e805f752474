"""Which errors mean that memory ran out, and how the iteration is then repeated.

Weights change only in the step, so forward and backward can be repeated. Each repetition uses micro-batches that are a
quarter smaller and keep a quarter less for the backward, until a micro-batch of MIN_MICRO_BATCH tokens, or of a single
document, keeps nothing.
"""

import gc
from dataclasses import dataclass, replace

import torch

from xtuner.core.log import human_bytes
from xtuner.data.loading.batch import Batch
from xtuner.dist.mesh import Mesh
from xtuner.engine import memory
from xtuner.engine.memory import MemoryPlan

OLDEST_NODE = torch.zeros((), requires_grad=True).clone()  # no node of a model's graph is older


class OutOfMemory(MemoryError):
    """Memory ran out on `rank`, and there is no smaller micro-batch to try. Raised on all ranks."""

    def __init__(self, text: str, rank: int) -> None:
        super().__init__(text)
        self.rank = rank


@dataclass(frozen=True)
class Failure:
    """Which micro-batches had been started when this rank's memory ran out. It keeps the error's text instead of the
    error, whose traceback refers to the graph.

    Args:
        host: bytes of host memory that could be pinned, if that is less than activations requested.
    """

    largest: Batch
    last: Batch
    text: str
    host: int | None = None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is of CUDA's allocator, CUDA itself (pinned memory, libraries), or the host's allocator."""
    words = ("out of memory", "can't allocate memory", "std::bad_alloc", "STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(w in str(error) for w in words)
    )


def drop_graph() -> None:
    """Free the graph of a forward or backward that has raised an error; no Python object may refer to it any more.

    Tasks that were ready to run stay in this thread's autograd queue. The queue runs newer nodes first, so a backward
    of an older node removes them.
    """
    OLDEST_NODE.backward()
    gc.collect()


def shrink_memory(now: MemoryPlan, piece: Batch) -> MemoryPlan | None:
    """The plan to try after memory ran out with micro-batches of up to this one's size; None if none is smaller."""
    plan, tokens = now.activations, piece.num_tokens
    can_be_cut = tokens > max(piece.max_seqlen, memory.MIN_MICRO_BATCH)
    can_keep_less = bool(plan.room) and plan.choose_kept(tokens) != replace(plan, room=0).choose_kept(tokens)
    if not can_be_cut and not can_keep_less:
        return None
    if plan.room:
        plan = replace(plan, room=min(plan.room, plan.peak_bytes(tokens)) * 3 // 4)
    max_tokens = min(now.max_tokens or tokens, max(tokens * 3 // 4 if can_be_cut else tokens, memory.MIN_MICRO_BATCH))
    without_recompute = plan.largest_micro_batch(max_tokens)
    if now.activations.keeps_everything(now.max_tokens or tokens) and without_recompute >= memory.MIN_MICRO_BATCH:
        max_tokens = without_recompute
    found = replace(now, activations=plan, max_tokens=max_tokens)
    return found if found != now else None


def agree_on_smaller(now: MemoryPlan, failure: Failure | None, mesh: Mesh) -> tuple[MemoryPlan, str]:
    """The plan with which all ranks repeat the iteration, and a sentence about it for the log.

    All ranks call it together, without a failure where memory sufficed.

    Raises: OutOfMemory if a rank has no smaller plan to try.
    """
    own = None
    if failure:
        found = _use_less_host_memory(now, failure.host)
        # a long document may have fitted, and a later micro-batch not
        found = found or shrink_memory(now, failure.largest) or shrink_memory(now, failure.last)
        limits = found and [found.max_tokens, found.activations.room, found.activations.host]
        own = [failure.text, failure.largest.num_tokens, limits]
    messages = mesh.ranks.gather(own) if mesh.size > 1 else [own]
    failures = {rank: message for rank, message in enumerate(messages) if message}
    after = now
    for rank, (text, _, limits) in failures.items():
        if limits is None:
            raise OutOfMemory(text, rank)
        max_tokens, room = _smallest(limits[0], after.max_tokens), _smallest(limits[1], after.activations.room)
        host = min(limits[2], after.activations.host)
        after = replace(after, activations=replace(after.activations, room=room, host=host), max_tokens=max_tokens)
    where = " and ".join(
        (f"on rank {rank} " if mesh.size > 1 else "") + f"with micro-batches of up to {tokens:,} tokens"
        for rank, (_, tokens, _) in failures.items()
    )
    return after, f"memory ran out {where}; repeated with {_describe_changes(now, after)}, also for the rest of the run"


def _use_less_host_memory(now: MemoryPlan, host: int | None) -> MemoryPlan | None:
    """The plan for the host memory that there is, if it had been made for more: what was not there took GPU memory."""
    if host is None or host >= now.activations.host:
        return None
    return replace(now, activations=replace(now.activations, host=host))


def _smallest(*values: int | None) -> int | None:
    return min((v for v in values if v is not None), default=None)


def _describe_changes(before: MemoryPlan, after: MemoryPlan) -> str:
    found = []
    if after.max_tokens != before.max_tokens:
        size = "full packs" if before.max_tokens is None else f"{before.max_tokens:,}"
        found.append(f"micro-batches of at most {after.max_tokens:,} tokens (before: {size})")
    if after.activations.room != before.activations.room:
        now, then = (human_bytes(m.activations.room or 0) for m in (after, before))
        found.append(f"{now} of memory for each (before: {then})")
    if after.activations.host != before.activations.host:
        now, then = (human_bytes(m.activations.host) for m in (after, before))
        found.append(f"{now} of host memory for activations (before: {then})")
    return " and ".join(found)
