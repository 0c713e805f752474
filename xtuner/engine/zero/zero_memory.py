"""How ZeRO sums gradients, what it holds of a GPU's memory, and which micro-batches take the least time with the rest.

    way          gradients on a rank                                     sent to their owners           stages
    fp32         whole, summed over the iteration in fp32                once an iteration              1, 2
    bf16         whole, summed over a pack in bf16                       once a pack, summed in fp32    1, 2
    deepspeed    a micro-batch's in bf16; the rank's own part in fp32    with each micro-batch          0, 2, 3, offload

The first that fits is taken: of stage 1 any, of stage 2 not bf16. Of stage 1, DeepSpeed's way is that of its stage 2.
Few large micro-batches send less and multiply faster, but compute more of their forward twice; the time is predicted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from xtuner.core.log import logger
from xtuner.dist.mesh import Mesh
from xtuner.engine import memory
from xtuner.engine.memory import COLLECTIVES, DIVISIONS, LEAST, LIBRARIES, PACK, RESERVE, WORTH, Division, Memory
from xtuner.engine.step_time import Work, link
from xtuner.engine.zero.deepspeed_config import BUCKET
from xtuner.model.activation_memory import Plan
from xtuner.model.flops import num_parameters
from xtuner.model.source import ModelSource
from xtuner.optim.optim_wrapper import OptimWrapper

COPIED = 24  # bytes a parameter that DeepSpeed reads and writes again to send a micro-batch's gradients
COPYING = 2.5e12  # bytes a second of an H100's memory
Settings = Mapping[str, Any]  # DeepSpeed's, of `deepspeed_config.prepare` or as the JSON has them


@dataclass(frozen=True)
class ZeroMemory(Memory):
    """Args: way: in which gradients are summed."""

    way: str = "deepspeed"

    def tell(self, pack: int, mesh: Mesh) -> None:
        super().tell(pack, mesh)
        if self.way == "bf16":
            logger.info("gradients of a pack are summed in bf16, those of packs and ranks in fp32")


def of_zero(
    source: ModelSource,
    optim: OptimWrapper,
    device: torch.device,
    mesh: Mesh,
    settings: Settings,
    pack: int = PACK,
    free: int | None = None,
) -> ZeroMemory:
    """For a rank of DeepSpeed's: the first way that fits, in micro-batches that take the least time; else the leanest.

    Args:
        pack: its tokens.
        free: bytes that all ranks can still get of a GPU; None for what this one can.
    """
    free = memory.free_bytes(device) if free is None else free
    c, itemsize, case = (
        source.config,
        optim.compute_dtype(device).itemsize,
        (source, optim, device, mesh.size, settings),
    )
    collectives = COLLECTIVES * (mesh.size > 1)
    least = Plan(c, itemsize).peak(min(LEAST, pack))  # of which nothing is recomputed
    for way in ways(optim, device, settings):
        state, room = zero_state(*case, way), None
        if free is not None:
            room = max(free - state - RESERVE - collectives, 0)
        if room is None or room >= max(least, _after(*case, way)):
            break
    division = _division(settings, way)
    if room is None or not source.recompute:
        plan = Plan(c, itemsize, 0 if source.recompute else None)
        return ZeroMemory(state, plan, optim.micro_batch, division, way=way)
    plan, found = Plan(c, itemsize, room), []
    for most in [optim.micro_batch] if optim.micro_batch else memory.sizes(plan, pack):
        seconds = _seconds(source, optim, device, mesh, settings, way, plan, pack, most)
        found.append(ZeroMemory(state, plan, most, division, LIBRARIES + collectives, seconds, way))
    return memory.fastest(found, pack)


def ways(optim: OptimWrapper, device: torch.device, settings: Settings) -> tuple[str, ...]:
    """In which gradients may be summed, the most precise and fastest first."""
    zero, bf16 = settings["zero_optimization"], optim.compute_dtype(device) == torch.bfloat16
    stage, asked = zero.get("stage", 0), (settings.get("data_types") or {}).get("grad_accum_dtype")
    if stage not in (1, 2) or zero.get("offload_optimizer") or (bf16 and asked == "bf16"):
        return ("deepspeed",)
    if optim.full == "weights":
        return ("deepspeed",)
    whole = ["fp32"] * (not bf16 or optim.sums != "bf16")
    whole += ["bf16"] * (bf16 and (optim.sums == "bf16" or (optim.sums is None and stage == 1)))
    return (*whole, *["deepspeed"] * (optim.full is None and optim.sums != "bf16"))


def stage_of(settings: Settings, way: str) -> int:
    """DeepSpeed's stage that takes the steps."""
    zero, sums = settings["zero_optimization"], (settings.get("data_types") or {}).get("grad_accum_dtype")
    stage: int = zero.get("stage", 0)
    if stage == 1 and way == "deepspeed" and not zero.get("offload_optimizer") and sums != "bf16":
        return 2  # stage 1 would keep whole gradients, and sum them in the weights' dtype
    return stage


def _division(settings: Settings, way: str) -> Division:
    """What every rank keeps full over an iteration."""
    stage = stage_of(settings, way)
    return DIVISIONS["all" if way != "deepspeed" or stage < 2 else "weights" if stage == 2 else "blocks"]


def zero_state(
    source: ModelSource,
    optim: OptimWrapper,
    device: torch.device,
    ranks: int,
    settings: Settings,
    way: str | None = None,
) -> int:
    """Bytes that live while micro-batches compute: weights to compute with, fp32 masters and moments, gradients,
    buffers to send from; by arithmetic.

    Args:
        way: None for the leanest.
    """
    zero, moments, copy = settings["zero_optimization"], optim.traits(device).moments, optim.compute_dtype(device)
    parameters, several = num_parameters(source.config), optim.accumulative_counts > 1
    way = way or ways(optim, device, settings)[-1]
    stage = stage_of(settings, way)
    if not stage:
        return int((8 + moments) * parameters)
    own = (4 + moments) * (not zero.get("offload_optimizer"))  # bytes a parameter of what is divided over ranks
    if stage == 3:
        full = copy.itemsize * min(parameters, int(zero.get("stage3_max_live_parameters", 1e9)))
        own += 2 + copy.itemsize * (not zero.get("offload_param"))  # what it copies as it steps; weights
    else:
        full = copy.itemsize * parameters
    if way == "deepspeed":
        sums = (settings.get("data_types") or {}).get("grad_accum_dtype")
        own += 2 if sums == "bf16" else 4
        full += copy.itemsize * parameters * (stage == 1 and several)
        # what fills as gradients come (two of them under stage 1 and 2), and what is sent of it
        full += _bucket(settings) * (copy.itemsize * (2 if stage == 3 else 3) + _sent(settings) * (stage == 3) + 4)
    else:
        full += (4 if way == "fp32" else copy.itemsize) * parameters
        own += 4 * (way == "bf16" and several)  # sums over packs
    return int(full + own * parameters / ranks)


def _after(
    source: ModelSource, optim: OptimWrapper, device: torch.device, ranks: int, settings: Settings, way: str
) -> int:
    """Bytes in addition to the state, when micro-batches are done, to send whole gradients and to step."""
    if way == "deepspeed":
        return 0
    c = source.config
    received = 4 * num_parameters(c) / ranks * (way == "fp32" or optim.accumulative_counts == 1)
    norm = 8 * c.vocab_size * c.hidden_size  # of a parameter's part; DeepSpeed takes it in fp64
    return int(received + max(2 * _bucket(settings) * _sent(settings), norm))


def _bucket(settings: Settings) -> int:
    size = settings["zero_optimization"].get("reduce_bucket_size", BUCKET)
    return BUCKET if isinstance(size, str) else int(size)


def _sent(settings: Settings) -> int:
    """Bytes of a gradient's number on its way."""
    return 2 if settings.get("communication_data_type") == "bf16" else 4


def _seconds(
    source: ModelSource,
    optim: OptimWrapper,
    device: torch.device,
    mesh: Mesh,
    settings: Settings,
    way: str,
    plan: Plan,
    pack: int,
    most: int,
) -> float:
    """Of an iteration in micro-batches of at most so many tokens."""
    c, copy, packs = source.config, optim.compute_dtype(device).itemsize, optim.accumulative_counts
    stage, sent, parts = stage_of(settings, way), _sent(settings), packs * -(-pack // most)
    keeps, tokens = plan.keeps(min(most, pack)), pack * packs
    parameters = num_parameters(c)
    once = parameters * (1 - 1 / mesh.size) / link(mesh)  # seconds to gather or to reduce a byte of each parameter
    exposed = copy * once if stage in (1, 2) else 0.0  # new weights, after the step
    gathered = reduced = 0
    if way != "deepspeed":
        whole = copy if way == "bf16" else 4
        travels = min(whole, sent) if mesh.local_size == mesh.size else sent  # see gradient_exchange.py
        exposed += (packs if way == "bf16" else 1) * (travels * once + (whole + 2 * sent) * parameters / COPYING)
    elif stage == 2:
        reduced = 2 * parts  # to all ranks
    elif stage == 3:
        gathered, reduced = 2 * parts, parts
    else:
        exposed += 2 * sent * once
    if way == "deepspeed" and mesh.size > 1:
        exposed += COPIED * parameters * (parts if stage > 1 else 1) / COPYING
    return exposed + Work(c, tokens, parts, keeps, gathered, reduced, sent, copy).seconds(mesh)


def faster_own(
    chosen: ZeroMemory,
    source: ModelSource,
    optim: OptimWrapper,
    device: torch.device,
    mesh: Mesh,
    name: str,
    pack: int,
    free: int | None,
) -> str:
    """Says so if our own sharding fits and would be faster by arithmetic."""
    own = memory.of_mesh(source, optim, device, mesh, pack, free)
    if mesh.size == 1 or not own.seconds or not own.fits(own.tokens(pack)):
        return ""
    gained = chosen.seconds / own.seconds - 1
    if 1 + gained < WORTH:
        return ""
    return (
        f"--deepspeed {name}: without it (or with --fsdp full) xtuner's own sharding trains the same, by "
        f"arithmetic {100 * gained:.0f} % faster; a checkpoint of either resumes under the other"
    )
