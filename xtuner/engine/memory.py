"""How a GPU's memory is shared out: the state of weights and optimizer first, the rest for what a pack needs.

    free now = state + reserve + room;   a micro-batch gets the room

As many tokens are taken at once as can be computed without computing anything twice, at least LEAST; documents longer
than that keep less (model/plan.py). On CPUs memory is not counted.
"""

from dataclasses import dataclass

import torch

from xtuner.core.log import human_bytes, logger
from xtuner.engine.optim import OptimWrapper
from xtuner.model.flops import num_parameters
from xtuner.model.plan import Plan
from xtuner.model.source import ModelSource

LEAST = 4096  # tokens of a micro-batch; fewer leave the GPU's multipliers idle
USUAL = 8192  # where not even the least fits without computing something twice
RESERVE = 1.5 * 2**30  # bytes: the libraries' own, and what the allocator cannot use


@dataclass(frozen=True)
class Memory:
    """Args: state: bytes; plan: for a micro-batch; most: tokens of a micro-batch, None for a whole pack."""

    state: int
    plan: Plan
    most: int | None = None

    def micro_batch(self, tokens: int) -> int:
        """How long the parts of a pack of so many tokens may be."""
        return tokens if self.most is None else min(tokens, self.most)

    def tell(self, pack: int, how: str) -> None:
        """Log what has been decided, for packs of so many tokens."""
        tokens = self.micro_batch(pack)
        keeps = self.plan.keeps(tokens)
        kept = {name: sum(getattr(k, name) for k in keeps) for name in ("attention", "qkv", "residual", "gate_up")}
        shown = "nothing is computed twice"
        if not self.plan.fits(tokens):
            shown = "layers that keep " + ", ".join(f"{n}: {c} of {len(keeps)}" for n, c in kept.items())
        logger.info(
            f"memory: {human_bytes(self.state)} of state ({how}); micro-batches of at most {tokens:,} tokens, {shown}; "
            f"peak {human_bytes(self.state + self.plan.peak(tokens))} expected"
        )


def of_single(source: ModelSource, optim: OptimWrapper, device: torch.device) -> Memory:
    """For one process that holds everything. Call it when nothing is on the device yet but the bf16 weights."""
    itemsize = optim.compute_dtype(device).itemsize
    if device.type != "cuda":
        return Memory(0, Plan(source.config, itemsize, 0 if source.recompute else None))
    form = optim.own_form(device)
    parameters = num_parameters(source.config)
    state = parameters * (form.bytes if form else 18)
    return within(state, source, itemsize, device)


def within(state: int, source: ModelSource, itemsize: int, device: torch.device, whole: bool = False) -> Memory:
    """Share out what the device has beside `state` bytes. `whole`: packs are not cut into micro-batches."""
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    room = int(free - state - RESERVE)
    if not source.recompute:
        return Memory(state, Plan(source.config, itemsize))
    plan = Plan(source.config, itemsize, max(room, 0))
    if whole:
        return Memory(state, plan)
    largest = plan.largest(2**17)
    return Memory(state, plan, largest if largest >= LEAST else USUAL)
