"""Documents that are longer than a micro-batch: they cannot be cut, so each is a micro-batch of its own.

What such a micro-batch keeps is on the GPU, recomputed, or in host memory, by predicted time. One that cannot fit is
rejected before a run starts (capacity.py).
"""

import torch

from xtuner.core.system import sysinfo
from xtuner.dist.mesh import Mesh
from xtuner.engine.step_time import StepCost
from xtuner.families.network import DecoderConfig
from xtuner.model.activation_memory import ActivationPlan
from xtuner.model.flops import num_parameters
from xtuner.model.source import ModelSource
from xtuner.optim.optim_wrapper import OptimWrapper

HOST_RESERVE = 4 * 2**30  # bytes of host memory for each rank's process and loader, and as much for the rest
STEP = 1024  # tokens, of limits in messages
COUNTS = 16  # of layers with factors in host memory, that are considered


def min_host_bytes(source: ModelSource, optim: OptimWrapper, device: torch.device, mesh: Mesh) -> int:
    """Bytes of host memory that the activations of each rank may use, the same on all ranks, which call it together:
    what is free on every node, without what copies for checkpoints need."""
    free = sysinfo.memory()["free"]
    if device.type != "cuda" or free is None:
        return 0
    form = optim.state_form(device)
    state = form.bytes - 2 - form.gradient.itemsize if form else 4 + optim.traits(device).moments
    copies = (4 + state) * num_parameters(source.config) * mesh.local_size / mesh.size
    each = (free - copies - HOST_RESERVE * (mesh.local_size + 1)) / mesh.local_size
    return int(max(min(mesh.ranks.gather(each)), 0))


def plan_activations(
    c: DecoderConfig, itemsize: int, room: int, host: int, document: int, sharers: int, products: str, **needs: int
) -> ActivationPlan:
    """The fastest plan for the longest document, without host memory or with some, of those that fit.

    Args:
        document: its tokens.
        sharers: ranks that share it.
        products: kind of products of blocks.
        needs: `extra` and `converted` of `ActivationPlan`.
    """
    tokens, layers = -(-document // sharers), c.num_layers
    plans = [ActivationPlan(c, itemsize, room, 0, sharers, **needs)]
    if host:
        counts = range(0, layers + 1, max(layers // COUNTS, 1))
        plans += [ActivationPlan(c, itemsize, room, host, sharers, hosted_factors=n, **needs) for n in counts]
    if not (fitting := [plan for plan in plans if plan.peak_bytes(tokens) <= room]):
        return plans[min(1, len(plans) - 1)]  # needs the least: with host memory, if there is any

    def seconds(plan: ActivationPlan) -> float:
        kept = plan.choose_kept(tokens)
        return StepCost(c, tokens, 1, kept, 0, 0, 0, itemsize, document, products=products).seconds(Mesh())

    return min(fitting, key=seconds)


def longest_that_fits(plan: ActivationPlan) -> int:
    """Tokens of the longest micro-batch that fits into the plan's room, in steps of STEP."""
    low, high = 0, 2**25 // STEP
    while low < high:
        middle = (low + high + 1) // 2
        fits = plan.room is None or plan.peak_bytes(middle * STEP) <= plan.room
        low, high = (middle, high) if fits else (low, middle - 1)
    return low * STEP
