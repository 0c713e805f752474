"""How a GPU's memory is shared out: the state of weights and optimizer first, the rest for what a pack needs.

    free now = state + reserve + room;   a micro-batch gets the room

As many tokens are taken at once as can be computed without computing anything twice, at least LEAST; documents longer
than that keep less (model/plan.py). On CPUs memory is not counted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from xtuner.core.errors import ConfigError
from xtuner.core.log import human_bytes, logger
from xtuner.data.batch import Batch
from xtuner.dist.mesh import Mesh
from xtuner.engine.adamw import FORMS
from xtuner.engine.optim import OptimWrapper
from xtuner.model.flops import num_parameters
from xtuner.model.plan import ORDER, Plan
from xtuner.model.source import ModelSource

LEAST = 4096  # tokens of a micro-batch; fewer leave the GPU's multipliers idle
USUAL = 8192  # where not even the least fits without computing something twice
BUFFERS = 1.5 * 2**30  # bytes: DeepSpeed's buckets as shipped, two of 200 million numbers in fp32
COLLECTIVES = int(1.1 * 2**30)  # bytes: NCCL's buffers, and what is held back for its streams
RESERVE = 3 * 2**30  # bytes: the libraries' own, and what the allocator cannot use


@dataclass(frozen=True)
class Memory:
    """Args: state: bytes; plan: for a micro-batch; most: tokens of a micro-batch, None for a whole pack."""

    state: int
    plan: Plan
    most: int | None = None

    def parts(self, pack: Batch) -> int:
        """How many micro-batches to cut a pack into."""
        return 1 if self.most is None else pack.num_parts(self.most)

    def tell(self, pack: int) -> None:
        """Log what has been decided, for packs of so many tokens."""
        tokens = pack if self.most is None else min(pack, self.most)
        keeps = self.plan.keeps(tokens)
        shown = "nothing is computed twice"
        if not self.plan.fits(tokens):
            kept = {name: sum(getattr(k, name) for k in keeps) for name in ORDER}
            shown = f"of {len(keeps)} layers keep " + ", ".join(f"{n} {count}" for n, count in kept.items())
        logger.info(
            f"memory: {human_bytes(self.state)} of state; micro-batches of at most {tokens:,} tokens, {shown}; "
            f"peak {human_bytes(self.state + self.plan.peak(tokens))} expected"
        )


@dataclass(frozen=True)
class Division:
    """What our own strategy keeps full on every rank over an iteration; the rest is full a block at a time."""

    weights: bool
    gradients: bool


DIVISIONS = (Division(True, True), Division(True, False), Division(False, False))  # fastest first
ALL_FULL = DIVISIONS[0]


def division(
    source: ModelSource, optim: OptimWrapper, device: torch.device, mesh: Mesh, free: int | None = None
) -> Division:
    """The fastest division that leaves room for micro-batches of USUAL tokens without recomputing; else the leanest.

    Args:
        free: bytes of a GPU; None for what this one has.
    """
    free = _free(device) if free is None else free
    if mesh.shard_size == 1 or free is None:
        return ALL_FULL
    needed = Plan(source.config, optim.compute_dtype(device).itemsize).peak(USUAL) + RESERVE + COLLECTIVES
    fitting = [d for d in DIVISIONS if state_bytes(source, optim, device, mesh, d) + needed <= free]
    return fitting[0] if fitting else DIVISIONS[-1]


def state_bytes(source: ModelSource, optim: OptimWrapper, device: torch.device, mesh: Mesh, division: Division) -> int:
    """Bytes of weights, gradients and optimizer that a rank holds, and of what is full a block at a time."""
    c, form, copy = source.config, optim.own_form(device), optim.compute_dtype(device)
    parameters, ends, ranks = num_parameters(c), 2 * c.vocab_size * c.hidden_size, mesh.shard_size
    block = (parameters - ends) / c.num_layers
    weight, gradient = (2, form.gradient.itemsize) if form else (copy.itemsize, 4)
    # what only this rank needs: moments, and masters that are not what computes
    own = form.bytes - weight - gradient if form else optim.traits(device).moments + 4 * (copy != torch.float32)
    state = own * parameters / ranks
    # a block's weights, those of the next, and those that are being freed
    state += weight * (parameters if division.weights else ends + 3 * block + parameters / ranks)
    # gradients of a block, and of one on their way, with what arrives of them
    of_blocks = (ends + 2 * block) * (1 + 1 / ranks) + parameters / ranks
    return int(state + gradient * (parameters if division.gradients else of_blocks))


def of_mesh(
    source: ModelSource, optim: OptimWrapper, device: torch.device, mesh: Mesh, chosen: Division | None = None
) -> Memory:
    """For a rank of our own strategy.

    Args:
        chosen: None for what fits.
    """
    chosen = chosen or division(source, optim, device, mesh)
    state = state_bytes(source, optim, device, mesh, chosen)
    return share_out(state, source, optim, device, reserve=RESERVE + COLLECTIVES * (mesh.size > 1))


def of_zero(
    source: ModelSource, optim: OptimWrapper, device: torch.device, ranks: int, settings: Mapping[str, Any]
) -> Memory:
    """For one of `ranks` of DeepSpeed's, whose packs are not cut.

    Args:
        settings: DeepSpeed's, resolved.
    """
    return share_out(zero_state(source, optim, device, ranks, settings), source, optim, device, cut=False)


def zero_state(
    source: ModelSource, optim: OptimWrapper, device: torch.device, ranks: int, settings: Mapping[str, Any]
) -> int:
    """Bytes of weights to compute with, fp32 masters and moments, gradients, buffers to send from; by arithmetic."""
    zero, moments = settings["zero_optimization"], optim.traits(device).moments
    parameters, stage = num_parameters(source.config), zero.get("stage", 0)
    copy = optim.compute_dtype(device).itemsize
    sums = (settings.get("data_types") or {}).get("grad_accum_dtype")
    kept = 4 if sums == "fp32" else 2 if sums == "bf16" else copy  # gradients
    live = min(parameters, int(zero.get("stage3_max_live_parameters", 1e9)))  # whole at a time under stage 3
    whole = {0: (8 + moments) * parameters, 1: copy * parameters, 2: copy * parameters, 3: copy * live}[stage]
    whole += copy * parameters * (stage == 1 and optim.accumulative_counts > 1)  # gradients, until the last pack
    # masters, moments, gradients; under stage 3 the weights, and what it copies as it steps
    divided = {0: 0.0, 1: 4 + moments + copy, 2: 4 + moments + kept, 3: 6 + moments + kept + copy}[stage]
    divided -= (4 + moments) * ("offload_optimizer" in zero) + copy * ("offload_param" in zero)
    return int(whole + parameters * divided / ranks) + int(BUFFERS)


def share_out(
    state: int,
    source: ModelSource,
    optim: OptimWrapper,
    device: torch.device,
    cut: bool = True,
    reserve: int = RESERVE,
) -> Memory:
    """Plan with what the device has beside `state` bytes; to be asked before any of them is there.

    Args:
        cut: whether packs may be cut into micro-batches, else they keep less.
    """
    itemsize = optim.compute_dtype(device).itemsize
    free = _free(device)
    if not source.recompute:
        return Memory(state, Plan(source.config, itemsize))
    if free is None:
        return Memory(state, Plan(source.config, itemsize, 0))
    plan = Plan(source.config, itemsize, max(int(free - state - reserve), 0))
    if not cut:
        return Memory(state, plan)
    largest = plan.largest(2**17)
    return Memory(state, plan, largest if largest >= LEAST else USUAL)


def require(state: int, source: ModelSource, device: torch.device) -> None:
    """Raise ConfigError if a GPU has not `state` bytes free."""
    free = _free(device)
    if free is not None and state + RESERVE > free:
        raise too_large(source, state, free)


def _free(device: torch.device) -> int | None:
    """Bytes that this process can still get of a GPU; None for CPUs."""
    if device.type != "cuda":
        return None
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + cached


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
