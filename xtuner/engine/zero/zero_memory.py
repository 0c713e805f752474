"""How ZeRO sums gradients, how much GPU memory its state needs, and which micro-batches are fastest with the rest.

    summing      gradients on a rank                                     sent to their owners           stages
    fp32         full, summed over the iteration in fp32                 once an iteration              1, 2
    bf16         full, summed over a pack in bf16                        once a pack, summed in fp32    1, 2
    deepspeed    a micro-batch's in bf16; the rank's own part in fp32    with each micro-batch          0, 2, 3, offload

The first that fits is used: any of them under stage 1, all but bf16 under stage 2. Under stage 1, "deepspeed" is what
DeepSpeed does under stage 2. A few large micro-batches send less and multiply faster, but recompute more of the
forward; the time of each size is estimated.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from xtuner.core.log import logger
from xtuner.dist.mesh import Mesh
from xtuner.engine import memory
from xtuner.engine.memory import (
    COLLECTIVE_BYTES,
    DIVISIONS,
    LIBRARY_BYTES,
    MIN_MICRO_BATCH,
    MIN_SPEEDUP,
    RESERVE_BYTES,
    USUAL_PACK,
    Division,
    MemoryPlan,
)
from xtuner.engine.step_time import FLOPS, StepCost, link_speed
from xtuner.engine.zero import zero_time
from xtuner.engine.zero.deepspeed_config import BUCKET
from xtuner.engine.zero.zero_time import COPY_SHARE, COPYING
from xtuner.model.activation_memory import ActivationPlan
from xtuner.model.flops import block_parameters, num_parameters
from xtuner.model.ops.matmul import MATMULS
from xtuner.model.source import ModelSource
from xtuner.optim.optim_wrapper import OptimWrapper

MAX_AHEAD = 3  # blocks: DeepSpeed waits for a gather before the last two
# NCCL keeps a buffer of 9.2 MiB (4 + 4.7 + 0.5 for its three protocols, 12 as allocated) in each of 32 channels
P2P_BYTES = 32 * 12 * 2**20
Settings = Mapping[str, Any]  # DeepSpeed's, from `deepspeed_config.prepare_settings` or from the JSON


@dataclass(frozen=True)
class ZeroMemoryPlan(MemoryPlan):
    """How a rank of DeepSpeed uses its memory."""

    summing: str = "deepspeed"  # how gradients are summed: a row of the table above

    def log_plan(self, pack: int, mesh: Mesh, longest: int | None = None) -> None:
        super().log_plan(pack, mesh, longest)
        if self.summing == "bf16":
            logger.info("gradients of a pack are summed in bf16, those of packs and ranks in fp32")


def plan_zero_memory(
    source: ModelSource,
    optim: OptimWrapper,
    device: torch.device,
    mesh: Mesh,
    settings: Settings,
    pack: int = USUAL_PACK,
    free: int | None = None,
) -> ZeroMemoryPlan:
    """For DeepSpeed: the first way to sum gradients that fits, else the one that needs the least memory, with the
    fastest micro-batches.

    Args:
        pack: tokens of a pack.
        free: bytes that every rank can still allocate on its GPU; None to ask this GPU.
    """
    free = memory.free_bytes(device) if free is None else free
    c, itemsize, case = (
        source.config,
        optim.compute_dtype(device).itemsize,
        (source, optim, device, mesh.size, settings),
    )
    converted = MATMULS[source.products].swiglu_bytes
    everything = ActivationPlan(c, itemsize, converted=converted)  # nothing is recomputed
    least = everything.peak_bytes(min(MIN_MICRO_BATCH, pack))
    for summing in summing_modes(optim, device, settings):
        state, room = zero_state_bytes(*case, summing), None
        collectives = COLLECTIVE_BYTES * (mesh.size > 1) + _exchange_bytes(summing, mesh, settings)
        if free is not None:
            room = max(free - state - RESERVE_BYTES - collectives, 0)
        if room is None or room >= max(least, _bytes_to_send(*case, summing)):
            break
    division = _division(settings, summing)
    if room is None or not source.recompute:
        plan = ActivationPlan(c, itemsize, 0 if source.recompute else None)
        return ZeroMemoryPlan(state, plan, optim.micro_batch, division, summing=summing)
    plan, found = ActivationPlan(c, itemsize, room, converted=converted), []
    for most in [optim.micro_batch] if optim.micro_batch else memory.candidate_sizes(plan, pack):
        seconds = _predict_seconds(source, optim, device, mesh, settings, summing, plan, pack, most)
        found.append(ZeroMemoryPlan(state, plan, most, division, LIBRARY_BYTES + collectives, seconds, summing=summing))
    return memory.pick_fastest(found, pack)


def summing_modes(optim: OptimWrapper, device: torch.device, settings: Settings) -> tuple[str, ...]:
    """The permitted ways to sum gradients, the most precise and fastest first."""
    zero, bf16 = settings["zero_optimization"], optim.compute_dtype(device) == torch.bfloat16
    stage, requested = zero.get("stage", 0), (settings.get("data_types") or {}).get("grad_accum_dtype")
    if stage not in (1, 2) or zero.get("offload_optimizer") or (bf16 and requested == "bf16"):
        return ("deepspeed",)
    if optim.full == "weights":
        return ("deepspeed",)
    modes = ["fp32"] * (not bf16 or optim.sums != "bf16")
    modes += ["bf16"] * (bf16 and (optim.sums == "bf16" or (optim.sums is None and stage == 1)))
    return (*modes, *["deepspeed"] * (optim.full is None and optim.sums != "bf16"))


def effective_stage(settings: Settings, summing: str) -> int:
    """The stage that DeepSpeed is started with."""
    zero, sums = settings["zero_optimization"], (settings.get("data_types") or {}).get("grad_accum_dtype")
    stage: int = zero.get("stage", 0)
    if stage == 1 and summing == "deepspeed" and not zero.get("offload_optimizer") and sums != "bf16":
        return 2  # stage 1 would keep full gradients, and sum them in the weights' dtype
    return stage


def _division(settings: Settings, summing: str) -> Division:
    """What every rank keeps full during an iteration."""
    stage = effective_stage(settings, summing)
    return DIVISIONS["all" if summing != "deepspeed" or stage < 2 else "weights" if stage == 2 else "blocks"]


def zero_state_bytes(
    source: ModelSource,
    optim: OptimWrapper,
    device: torch.device,
    ranks: int,
    settings: Settings,
    summing: str | None = None,
) -> int:
    """Estimated bytes in use while micro-batches compute: compute weights, fp32 masters and moments, gradients, and
    buffers for sending.

    Args:
        summing: None for the one that needs the least memory.
    """
    return int(sum(zero_state_parts(source, optim, device, ranks, settings, summing).values()))


def zero_state_parts(
    source: ModelSource,
    optim: OptimWrapper,
    device: torch.device,
    ranks: int,
    settings: Settings,
    summing: str | None = None,
) -> dict[str, float]:
    """Bytes of `zero_state_bytes` by part."""
    zero, moments, copy = settings["zero_optimization"], optim.traits(device).moments, optim.compute_dtype(device)
    parameters, several = num_parameters(source.config), optim.accumulative_counts > 1
    trained = source.count_trained().total
    summing = summing or summing_modes(optim, device, settings)[-1]
    stage = effective_stage(settings, summing)
    if not stage:
        return {"weights": 4 * parameters, "optimizer": moments * trained, "gradients": 4 * trained}
    # of each trained parameter, sharded
    own = {"optimizer": (4 + moments) * (not zero.get("offload_optimizer")), "gradients": 0.0}
    if stage == 3:
        weights = float(copy.itemsize * min(parameters, int(zero.get("stage3_max_live_parameters", 1e9))))
        own["optimizer"] += 2  # copies in the step
        weights += copy.itemsize * (not zero.get("offload_param")) * parameters / ranks
    else:
        weights = copy.itemsize * parameters
    gradients = buffers = 0
    if summing == "deepspeed":
        sums = (settings.get("data_types") or {}).get("grad_accum_dtype")
        own["gradients"] += 2 if sums == "bf16" else 4
        gradients = copy.itemsize * trained * (stage == 1 and several)
        buffers = _deepspeed_buffers(source, copy.itemsize, settings, stage)
    else:
        gradients = (4 if summing == "fp32" else copy.itemsize) * trained
        own["gradients"] += 4 * (summing == "bf16" and several)  # sums over packs
    return {
        "weights": weights,
        "optimizer": own["optimizer"] * trained / ranks,
        "gradients": gradients + own["gradients"] * trained / ranks,
        "buffers": buffers,
    }


def _deepspeed_buffers(source: ModelSource, itemsize: int, settings: Settings, stage: int) -> int:
    """Bytes in which DeepSpeed gathers weights and sends gradients while micro-batches compute. A stream's buffers are
    not reused by other streams."""
    c, bucket = source.config, _bucket_size(settings)
    whole = 4 * c.vocab_size * c.hidden_size  # embedding and head are sent as a whole
    if stage != 3:
        # two buckets that gradients fill, one flattened, and what is sent
        return 3 * itemsize * bucket + max(4 * bucket, whole)
    # a bucket that gradients fill, its parts in the order of ranks, and what is sent
    buckets = 2 * itemsize * bucket + max((_sent_bytes(settings) + 4) * bucket, whole)
    # blocks that were freed by the host, which may be MAX_AHEAD blocks ahead, and are still used by the device: as
    # gathered, and if several parameters are gathered at once, in a copy of each
    copies = 1 if _gathers_each(settings) else 2
    return buckets + copies * MAX_AHEAD * itemsize * block_parameters(c)


def _exchange_bytes(summing: str, mesh: Mesh, settings: Settings) -> int:
    """Bytes of NCCL's connections to every other rank, if sums are exchanged by send and receive."""
    return P2P_BYTES * (mesh.size - 1) * sends_unreduced(summing, mesh, settings)


def sends_unreduced(summing: str, mesh: Mesh, settings: Settings) -> bool:
    """Whether sums are sent in their own dtype, and added by the receiver (`FullGradientSums`)."""
    return summing == "bf16" and _sent_bytes(settings) > 2 and 1 < mesh.size == mesh.local_size


def _bytes_to_send(
    source: ModelSource, optim: OptimWrapper, device: torch.device, ranks: int, settings: Settings, summing: str
) -> int:
    """Bytes in addition to the state, after the micro-batches, to send full gradients and to step."""
    if summing == "deepspeed":
        return 0
    c = source.config
    received = 4 * num_parameters(c) / ranks * (summing == "fp32" or optim.accumulative_counts == 1)
    return int(received + 2 * _bucket_size(settings) * _sent_bytes(settings))


def _bucket_size(settings: Settings) -> int:
    size = settings["zero_optimization"].get("reduce_bucket_size", BUCKET)
    return BUCKET if isinstance(size, str) else int(size)


def _gathers_each(settings: Settings) -> bool:
    """Whether stage 3 gathers parameters one by one."""
    return bool(settings["zero_optimization"].get("stage3_allgather_sequential"))


def _sent_bytes(settings: Settings) -> int:
    """Bytes of a gradient's element when it is sent."""
    return 2 if settings.get("communication_data_type") == "bf16" else 4


def _predict_seconds(
    source: ModelSource,
    optim: OptimWrapper,
    device: torch.device,
    mesh: Mesh,
    settings: Settings,
    summing: str,
    plan: ActivationPlan,
    pack: int,
    most: int,
) -> float:
    """Estimated time of an iteration in micro-batches of at most `most` tokens."""
    c, copy, packs = source.config, optim.compute_dtype(device).itemsize, optim.accumulative_counts
    stage, sent, parts = effective_stage(settings, summing), _sent_bytes(settings), packs * -(-pack // most)
    keeps, tokens = plan.choose_kept(min(most, pack)), pack * packs
    parameters = num_parameters(c)
    once = (
        parameters * (1 - 1 / mesh.size) / link_speed(mesh)
    )  # seconds to gather or to reduce a byte of each parameter
    exposed = copy * once if stage in (1, 2) else 0.0  # new weights, after the step
    exposed += zero_time.step_bytes(summing) * parameters / mesh.size / COPYING
    gathered = reduced = 0
    if summing != "deepspeed":
        full_bytes = copy if summing == "bf16" else 4
        on_wire = full_bytes if sends_unreduced(summing, mesh, settings) else sent
        exposed += (packs if summing == "bf16" else 1) * (
            on_wire * once + (full_bytes + 2 * sent) * parameters / COPYING
        )
    elif stage == 2:
        reduced = 2 * parts  # to all ranks
    elif stage == 3:
        gathered, reduced = 2 * parts, parts
        bucket, embedding = _bucket_size(settings), c.vocab_size * c.hidden_size
        late = sent * (bucket + embedding) * once / parameters + zero_time.end_bytes(c, bucket) / COPYING
        forward = zero_time.forward_seconds(c, tokens // parts, FLOPS)
        exposed += parts * late + zero_time.host_seconds(c, forward, parts)
    else:
        exposed += 2 * sent * once
    if summing == "deepspeed" and mesh.size > 1:
        copied = zero_time.copied_bytes(stage, mesh.size, _gathers_each(settings)) * (parts if stage > 1 else 1)
        exposed += COPY_SHARE * copied * parameters / COPYING
    return exposed + StepCost(c, tokens, parts, keeps, gathered, reduced, sent, copy).seconds(mesh)


def suggest_own_sharding(
    chosen: ZeroMemoryPlan,
    source: ModelSource,
    optim: OptimWrapper,
    device: torch.device,
    mesh: Mesh,
    name: str,
    pack: int,
    free: int | None,
) -> str:
    """A remark if our own sharding fits and is estimated to be faster; else ""."""
    own = memory.plan_memory(source, optim, device, mesh, pack, free)
    if mesh.size == 1 or not own.seconds or not own.fits(own.micro_batch_tokens(pack)):
        return ""
    gained = chosen.seconds / own.seconds - 1
    if 1 + gained < MIN_SPEEDUP:
        return ""
    return (
        f"--deepspeed {name}: without it (or with --fsdp full) xtuner's own sharding trains the same model, an "
        f"estimated {100 * gained:.0f} % faster; a checkpoint of either resumes under the other"
    )
