"""How a GPU's memory is used: state of weights and optimizer first, the rest for micro-batches.

    free at the start = state + reserve + room;   a micro-batch gets the room

What is kept full on every rank, how large micro-batches are, and what is recomputed: of all that fits, what takes the
least time by arithmetic (step_time.py). Documents longer than a micro-batch keep less (model/activation_memory.py). On
CPUs memory is not counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from xtuner.core.errors import ConfigError
from xtuner.core.log import human_bytes, logger
from xtuner.data.loading.batch import Batch
from xtuner.dist.mesh import Mesh
from xtuner.engine.step_time import Work
from xtuner.model.activation_memory import ORDER, Plan
from xtuner.model.flops import num_parameters
from xtuner.model.source import ModelSource
from xtuner.optim.adamw import FORMS
from xtuner.optim.optim_wrapper import OptimWrapper

PACK = 32768  # tokens, where it is not known
LEAST = 4096  # tokens of a micro-batch; fewer leave the GPU's multipliers idle
WORTH = 1.03  # another way is mentioned if it is so many times faster
MOST_PARTS = 16  # of a pack, where something is recomputed
COLLECTIVES = int(1.1 * 2**30)  # bytes: NCCL's buffers, and what is held back for its streams
LIBRARIES = int(1.3 * 2**30)  # bytes: CUDA's and cuBLAS's own, and what the allocator cannot use, usually
RESERVE = 3 * 2**30  # bytes: the same, at worst


@dataclass(frozen=True)
class Division:
    """What our own strategy keeps full on every rank over an iteration; the rest is full a block at a time."""

    weights: bool
    gradients: bool

    @property
    def name(self) -> str:
        """As `optim_wrapper.full` has it."""
        return next(name for name, division in DIVISIONS.items() if division == self)


DIVISIONS = {
    "all": Division(True, True),
    "weights": Division(True, False),
    "gradients": Division(False, True),
    "blocks": Division(False, False),
}
ALL_FULL = DIVISIONS["all"]


@dataclass(frozen=True)
class Memory:
    """Args: state: bytes; plan: for a micro-batch; most: tokens of a micro-batch, None for a whole pack; libraries:
    bytes that the driver counts in addition; seconds: of an iteration, by arithmetic, but for attention."""

    state: int
    plan: Plan
    most: int | None = None
    division: Division = ALL_FULL
    libraries: int = LIBRARIES
    seconds: float = 0.0

    def parts(self, pack: Batch) -> int:
        """How many micro-batches to cut a pack into."""
        return 1 if self.most is None else pack.num_parts(self.most)

    def tokens(self, pack: int) -> int:
        """Of the largest micro-batch of a pack of so many tokens."""
        return pack if self.most is None else min(pack, self.most)

    def peak(self, tokens: int) -> int:
        """Bytes that the driver will report in use, for micro-batches of so many tokens."""
        return self.state + self.plan.peak(tokens) + self.libraries

    def fits(self, tokens: int) -> bool:
        return self.plan.room is None or self.plan.peak(tokens) <= self.plan.room

    def tell(self, pack: int, mesh: Mesh) -> None:
        """Log what has been decided, for packs of so many tokens."""
        tokens = self.tokens(pack)
        keeps = self.plan.keeps(tokens)
        shown = "nothing is recomputed"
        if not self.plan.fits(tokens):
            kept = {name: sum(getattr(k, name) for k in keeps) for name in ORDER}
            shown = f"of {len(keeps)} layers keep " + ", ".join(f"{n} {count}" for n, count in kept.items())
        if mesh.shard_size > 1:
            full = {"all": "weights and gradients", "blocks": "nothing"}.get(self.division.name, self.division.name)
            shown += f"; over an iteration every rank keeps {full} full"
        logger.info(
            f"memory: {human_bytes(self.state)} of state; micro-batches of at most {tokens:,} tokens, {shown}; "
            f"peak {human_bytes(self.peak(tokens))} expected"
        )


M = TypeVar("M", bound=Memory)


def state_bytes(source: ModelSource, optim: OptimWrapper, device: torch.device, mesh: Mesh, division: Division) -> int:
    """Bytes of weights, gradients and optimizer that a rank holds, and of what is full a block at a time."""
    c, form, copy = source.config, optim.own_form(device), optim.compute_dtype(device)
    parameters, ends, ranks = num_parameters(c), 2 * c.vocab_size * c.hidden_size, mesh.shard_size
    block = (parameters - ends) / c.num_layers
    weight, gradient = copy.itemsize, optim.gradient_dtype(device).itemsize
    # what only this rank needs: moments, and masters that are not what computes
    own = (
        form.bytes - 2 - form.gradient.itemsize if form else optim.traits(device).moments + 4 * (copy != torch.float32)
    )
    state = own * parameters / ranks
    # a block's weights, those of the next, and those that are being freed
    state += weight * (parameters if division.weights else ends + 3 * block + parameters / ranks)
    # at the end of the last block's backward: its gradients, those of the output layer, and what arrives of both
    of_blocks = (ends / 2 + block) * (1 + 1 / ranks) + parameters / ranks
    return int(state + gradient * (parameters if division.gradients else of_blocks))


def of_mesh(
    source: ModelSource,
    optim: OptimWrapper,
    device: torch.device,
    mesh: Mesh,
    pack: int = PACK,
    free: int | None = None,
    division: Division | None = None,
) -> Memory:
    """For a rank of our own strategy: of what fits, what takes the least time; else what needs the least memory.

    Args:
        pack: its tokens.
        free: bytes that all ranks can still get of a GPU; None for what this one can.
        division: None to choose.
    """
    free = free_bytes(device) if free is None else free
    c, itemsize = source.config, optim.compute_dtype(device).itemsize
    divisions = (
        [d for name, d in DIVISIONS.items() if optim.full in (None, name)] if mesh.shard_size > 1 else [ALL_FULL]
    )
    divisions = [division] if division else divisions
    if free is None or not source.recompute:
        state = state_bytes(source, optim, device, mesh, divisions[0])
        return Memory(state, Plan(c, itemsize, 0 if source.recompute else None), optim.micro_batch, divisions[0])
    collectives = COLLECTIVES * (mesh.size > 1)
    ways = []
    for d in divisions:
        state = state_bytes(source, optim, device, mesh, d)
        plan = Plan(c, itemsize, max(free - state - RESERVE - collectives, 0))
        for most in [optim.micro_batch] if optim.micro_batch else sizes(plan, pack):
            parts = optim.accumulative_counts * -(-pack // most)
            work = Work(
                c,
                tokens=pack * optim.accumulative_counts,
                micro_batches=parts,
                keeps=plan.keeps(min(most, pack)),
                gathered=1 if d.weights else 2 * parts,
                reduced=1 if d.gradients else parts,
                gradient=optim.gradient_dtype(device).itemsize,
                weight=itemsize,
            )
            ways.append(Memory(state, plan, most, d, LIBRARIES + collectives, work.seconds(mesh)))
    busy = [way for way in ways if way.tokens(pack) >= min(LEAST, pack) and way.fits(way.tokens(pack))]
    return fastest(busy or ways, pack)


def fastest(ways: Sequence[M], pack: int) -> M:
    """Of those that fit, what takes the least time; if none does, what needs the least memory."""
    if fitting := [way for way in ways if way.fits(way.tokens(pack))]:
        return min(fitting, key=lambda way: way.seconds)
    return min(ways, key=lambda way: way.peak(way.tokens(pack)))


def faster_mesh(
    chosen: Memory, source: ModelSource, optim: OptimWrapper, device: torch.device, mesh: Mesh, pack: int,
    free: int | None,
) -> str:  # fmt: skip
    """Says so if dividing the state over the ranks of each node, or over all, would be faster by arithmetic."""
    if mesh.size == mesh.local_size or mesh.size % mesh.local_size or not chosen.seconds:
        return ""
    full = mesh.dp_replicate == 1
    shards = mesh.local_size if full else mesh.size
    other = Mesh(mesh.size // shards, shards, local_size=mesh.local_size)
    found = of_mesh(source, optim, device, other, pack, free)
    if not found.fits(found.tokens(pack)) or chosen.seconds < WORTH * found.seconds:
        return ""
    return (
        f"--fsdp {'hybrid' if full else 'full'} would be {100 * (chosen.seconds / found.seconds - 1):.0f} % faster "
        "here, by arithmetic; a checkpoint of either resumes under the other"
    )


def sizes(plan: Plan, pack: int) -> list[int]:
    """Of micro-batches: the largest without recomputing, and equal parts of a pack, which documents fill nearly."""
    equal = {-(-(pack // parts + pack // 64) // 256) * 256 for parts in range(1, MOST_PARTS + 1)}
    return sorted(size for size in {plan.largest(2**17), *equal} if size)


def require(state: int, source: ModelSource, device: torch.device) -> None:
    """Raise ConfigError if a GPU has not `state` bytes free."""
    free = free_bytes(device)
    if free is not None and state + RESERVE > free:
        raise too_large(source, state, free)


def free_bytes(device: torch.device) -> int | None:
    """Bytes that this process can still get of a GPU; None for CPUs."""
    if device.type != "cuda":
        return None
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + cached


def free_of_all(device: torch.device, mesh: Mesh) -> int | None:
    """What the rank with the least of it can still get: all ranks have to choose the same. All call it together."""
    free = free_bytes(device)
    return None if free is None else min(mesh.ranks.gather(free))


def too_large(source: ModelSource, state: int, free: int) -> ConfigError:
    """What to say of a model whose state alone does not fit."""
    parameters = num_parameters(source.config)
    leaner = [f for f in FORMS.values() if parameters * f.bytes + RESERVE <= free]
    needed = -(-parameters * 20 // max(int(free - 2 * RESERVE), 1))
    ways = [f'optim_wrapper.states = "{f.name}" ({human_bytes(parameters * f.bytes)} on one GPU)' for f in leaner[:1]]
    ways.append(f"{needed} or more such GPUs with --deepspeed deepspeed_zero3 or --fsdp full")
    ways.append("fewer with --deepspeed deepspeed_zero3_offload")
    return ConfigError(
        f"weights, gradients and optimizer state need {human_bytes(state)}, and the GPU has {human_bytes(free)} free",
        where=f"model: {parameters:,} parameters",
        why="the first step would run out of memory",
        do="; or ".join(ways),
    )
