"""How ZeRO sums gradients, what it holds of a GPU's memory, and which micro-batches take the least time beside that.

    sums        gradients on a rank                                sent to their owners         stages
    fp32        whole, summed over the iteration in fp32           once an iteration            1, 2
    bf16        whole, summed over a pack in the computing dtype   once a pack, added in fp32   1, 2
    deepspeed   one micro-batch's, as DeepSpeed takes them         with each micro-batch        0, 2, 3, with offload

The first that fits is taken: of stage 1 fp32 or bf16, of stage 2 fp32 or deepspeed. Few large micro-batches send less
and multiply faster, but compute more of their forward twice; the time of either is predicted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from xtuner.core.log import human_bytes, logger
from xtuner.data.batch import Batch
from xtuner.dist.mesh import Mesh
from xtuner.engine import memory
from xtuner.engine.memory import Memory
from xtuner.engine.optim import OptimWrapper
from xtuner.engine.zero_config import BUCKET, SUMS
from xtuner.model.decoder import DecoderConfig
from xtuner.model.flops import matmul_parameters, num_parameters
from xtuner.model.plan import ORDER, Plan, kept_bytes
from xtuner.model.source import ModelSource

# Measured on H100s: only their ratios decide, and other GPUs have similar ones
SPEED = 700e12  # FLOP/s of large products
SLOW_START = 800  # tokens: products of m tokens take as long as m + 800 would at that speed
WITHIN, BETWEEN = 300e9, 45e9  # bytes/s that a rank sends in collectives: within a node, and over InfiniBand
BESIDE = 0.39  # a collective slows the products beside it by this part of its time
COPYING = 2.5e12  # bytes/s of memory, read or written
COPIED = 24  # bytes a parameter that DeepSpeed copies to send a micro-batch's gradient
MOST_PARTS, SHORTEST = 16, 1024  # of a pack: micro-batches, and tokens of one
SLACK = 9 / 8  # a micro-batch may be so much longer than an equal share, as packs are cut between documents
PACK = 2**15  # tokens: where a pack is not known yet
WORTH = 1.03  # our own sharding is mentioned if it is so many times faster


@dataclass(frozen=True)
class Costs:
    """Seconds beside the arithmetic. beside: collectives of a micro-batch, while it computes; the others exposed."""

    beside: float = 0.0
    micro_batch: float = 0.0
    pack: float = 0.0
    iteration: float = 0.0


@dataclass(frozen=True)
class ZeroMemory(Memory):
    """Memory under ZeRO: packs are cut into the number of micro-batches whose time is the least.

    Args:
        costs: None where memory is not counted: packs are taken whole.
    """

    sums: str = "deepspeed"
    costs: Costs | None = None

    def parts(self, pack: Batch) -> int:
        if self.most is not None or self.costs is None:
            return super().parts(pack)
        count = best_parts(self.plan, self.costs, pack.num_tokens)
        return 1 if count == 1 else pack.num_parts(int(pack.num_tokens / count * SLACK))

    def tell(self, pack: int) -> None:
        if self.most is not None or self.costs is None:
            tokens = pack if self.most is None else min(pack, self.most)
            count = -(-pack // tokens)
        else:
            count = best_parts(self.plan, self.costs, pack)
            tokens = min(pack, int(pack / count * SLACK))
        keeps = self.plan.keeps(tokens)
        shown = "nothing is computed twice"
        if not self.plan.fits(tokens):
            kept = {name: sum(getattr(k, name) for k in keeps) for name in ORDER}
            shown = f"of {len(keeps)} layers keep " + ", ".join(f"{n} {held}" for n, held in kept.items())
        how = {
            "fp32": "gradients are summed in fp32 and sent once an iteration",
            "bf16": "gradients are summed in bf16 over a pack, as fp32 does not fit, and in fp32 over packs and ranks",
            "deepspeed": f"gradients are sent with each {'micro-batch' if count > 1 else 'pack'}",
        }[self.sums]
        logger.info(
            f"memory: {human_bytes(self.state)} of state; {how}; micro-batches of about {pack // count:,} tokens, "
            f"{shown}; peak {human_bytes(self.state + self.plan.peak(tokens))} expected"
        )


def of_zero(
    source: ModelSource,
    optim: OptimWrapper,
    device: torch.device,
    mesh: Mesh,
    settings: Mapping[str, Any],
    least: str = SUMS[0],
) -> ZeroMemory:
    """What a rank's memory allows.

    Args:
        settings: DeepSpeed's, of `zero_config.prepare`.
        least: the first of SUMS to consider.
    """
    for sums in _ways(settings, optim.compute_dtype(device)):
        if SUMS.index(sums) < SUMS.index(least):
            continue
        state = zero_state(source, optim, device, mesh.size, settings, sums)
        reserve = memory.RESERVE + memory.COLLECTIVES * (mesh.size > 1)
        plan = memory.share_out(state, source, optim, device, cut=False, reserve=reserve).plan
        usual = Plan(source.config, plan.itemsize).peak(memory.USUAL)
        after = _after(source, optim, device, mesh.size, settings, sums)
        if device.type != "cuda" or plan.room is None or plan.room >= max(usual, after):
            break
    counted = device.type == "cuda" and plan.room is not None
    costs = costs_of(source.config, optim, device, mesh, settings, sums) if counted else None
    return ZeroMemory(state, plan, settings.get("xtuner", {}).get("micro_batch_tokens"), sums, costs)


def _ways(settings: Mapping[str, Any], copy: torch.dtype) -> tuple[str, ...]:
    """How gradients may be summed, best first."""
    zero = settings["zero_optimization"]
    if named := settings.get("xtuner", {}).get("sums"):
        return (named,)
    stage = zero.get("stage", 0)
    if stage not in (1, 2) or "offload_optimizer" in zero:
        return ("deepspeed",)
    if stage == 2:
        return ("fp32", "deepspeed")
    return ("fp32", "bf16") if copy == torch.bfloat16 else ("fp32",)


def zero_state(
    source: ModelSource,
    optim: OptimWrapper,
    device: torch.device,
    ranks: int,
    settings: Mapping[str, Any],
    sums: str | None = None,
) -> int:
    """Bytes that live while micro-batches compute: weights to compute with, fp32 masters and moments, gradients,
    buffers to send from; by arithmetic.

    Args:
        sums: None for those that need the least.
    """
    copy, zero, moments = optim.compute_dtype(device), settings["zero_optimization"], optim.traits(device).moments
    parameters, stage = num_parameters(source.config), zero.get("stage", 0)
    sums = sums or _ways(settings, copy)[-1]
    several = optim.accumulative_counts > 1
    if not stage:
        return int((8 + moments) * parameters)
    state = (4 + moments) * parameters / ranks * ("offload_optimizer" not in zero)
    if stage == 3:
        live = min(parameters, _number(zero, "stage3_max_live_parameters", 10**9))
        state += copy.itemsize * live
        # what it copies as it steps; and its own part of the weights
        state += (2 + copy.itemsize * ("offload_param" not in zero)) * parameters / ranks
    else:
        state += copy.itemsize * parameters
    if sums != "deepspeed":
        whole = 4 if sums == "fp32" else copy.itemsize
        return int(state + whole * parameters + 4 * parameters / ranks * (several and sums == "bf16"))
    kept = (settings.get("data_types") or {}).get("grad_accum_dtype")
    kept_bytes = 4 if kept == "fp32" else 2 if kept == "bf16" else copy.itemsize
    state += kept_bytes * parameters / ranks + copy.itemsize * parameters * (stage == 1 and several)
    # what fills as gradients come, one or two of them, and a copy of one flat and in the dtype that is sent
    bucket, sent = _number(zero, "reduce_bucket_size", BUCKET), _sent(settings, copy)
    buffers = 1 if stage == 3 else 2
    return int(state + bucket * (buffers * copy.itemsize + sent * (2 if stage == 3 else 1) + copy.itemsize))


def _after(
    source: ModelSource, optim: OptimWrapper, device: torch.device, ranks: int, settings: Mapping[str, Any], sums: str
) -> int:
    """Bytes beside the state when micro-batches are done, to send whole gradients and to step."""
    if sums == "deepspeed":
        return 0
    c, copy = source.config, optim.compute_dtype(device)
    own = 4 * num_parameters(c) / ranks
    own *= not (optim.accumulative_counts > 1 and sums == "bf16")  # there already
    sending = 2 * _number(settings["zero_optimization"], "reduce_bucket_size", BUCKET) * _sent(settings, copy)
    norm = 8 * c.vocab_size * c.hidden_size  # DeepSpeed takes that of each part of a parameter in fp64
    return int(own + max(sending, norm))


def _number(zero: Mapping[str, Any], key: str, default: int) -> int:
    value = zero.get(key, default)
    return int(value) if isinstance(value, int | float) else default


def _sent(settings: Mapping[str, Any], copy: torch.dtype) -> int:
    """Bytes of a number of a gradient on its way."""
    return 2 if copy == torch.bfloat16 and settings.get("communication_data_type") == "bf16" else 4


def costs_of(
    c: DecoderConfig,
    optim: OptimWrapper,
    device: torch.device,
    mesh: Mesh,
    settings: Mapping[str, Any],
    sums: str,
) -> Costs:
    parameters, ranks, copy = num_parameters(c), mesh.size, optim.compute_dtype(device)
    stage, sent = settings["zero_optimization"].get("stage", 0), _sent(settings, copy)
    once = _once(parameters, mesh)
    if ranks == 1:
        return Costs()
    gather = copy.itemsize * once if stage in (1, 2) else 0.0  # of new weights, after the step
    if sums != "deepspeed":
        whole = 4 if sums == "fp32" else copy.itemsize
        send = sent * once + parameters * (whole + 2 * sent) / COPYING
        return Costs(pack=send, iteration=gather) if sums == "bf16" else Costs(iteration=gather + send)
    copies = COPIED * parameters / COPYING
    if stage == 3:
        return Costs(beside=(2 * copy.itemsize + sent) * once, micro_batch=copies)
    if stage == 2:  # it reduces to all ranks
        return Costs(beside=2 * sent * once, micro_batch=copies, iteration=gather)
    return Costs(iteration=gather + 2 * sent * once + copies)


def _once(parameters: int, mesh: Mesh) -> float:
    """Seconds a byte that each parameter has, to gather all of them or to reduce them to their owners."""
    link = WITHIN if mesh.local_size == mesh.size else BETWEEN
    return (mesh.size - 1) / mesh.size * parameters / link


def compute_time(plan: Plan, tokens: int) -> float:
    """Seconds of a micro-batch's products, with those that are computed again."""
    c = plan.config
    block = (matmul_parameters(c) - c.vocab_size * c.hidden_size) / c.num_layers
    joint = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    again = 0.0  # weights that are multiplied with once more
    for keep in plan.keeps(tokens):
        if keep.attention:
            again += c.hidden_size * joint * (not keep.qkv)
            again += c.hidden_size * c.num_heads * c.head_dim * (not keep.residual)
            again += 2 * c.hidden_size * c.intermediate_size * (not keep.gate_up)
        else:
            again += block
    return (6 * matmul_parameters(c) + 2 * again) * (tokens + SLOW_START) / SPEED


def pack_time(plan: Plan, costs: Costs, tokens: int, parts: int) -> float:
    """Seconds of a pack that is cut into so many micro-batches."""
    compute = compute_time(plan, -(-tokens // parts))
    hidden = min(costs.beside, compute)
    return parts * (compute + BESIDE * hidden + costs.beside - hidden + costs.micro_batch) + costs.pack


def _needed(plan: Plan, tokens: int) -> int:
    """Bytes of a micro-batch, with a block that is computed again as a whole."""
    whole = any(not keep.attention for keep in plan.keeps(tokens))
    return plan.peak(tokens) + whole * tokens * sum(kept_bytes(plan.config, plan.itemsize)[name] for name in ORDER)


@lru_cache
def best_parts(plan: Plan, costs: Costs, tokens: int) -> int:
    """How many micro-batches of a pack take the least time, among those that fit."""
    room = plan.room or 0
    counts = [n for n in range(1, MOST_PARTS + 1) if n == 1 or tokens >= n * SHORTEST]
    fitting = [n for n in counts if _needed(plan, min(tokens, int(tokens / n * SLACK))) <= room]
    return min(fitting or counts[-1:], key=lambda n: pack_time(plan, costs, tokens, n))


def suggest_own(
    chosen: ZeroMemory, source: ModelSource, optim: OptimWrapper, device: torch.device, mesh: Mesh, name: str
) -> None:
    """Log it if our own sharding would be faster by arithmetic, where it fits."""
    if mesh.size == 1 or chosen.costs is None:
        return
    division = memory.division(source, optim, device, mesh)
    own = memory.of_mesh(source, optim, device, mesh, division)
    if own.most is None or own.plan.room is None or own.plan.peak(min(own.most, memory.LEAST)) > own.plan.room:
        return
    once, copy = _once(num_parameters(source.config), mesh), optim.compute_dtype(device)
    gradient = optim.gradient_dtype(device).itemsize * once
    gathers = copy.itemsize * once
    each = (0 if division.weights else 2 * gathers) + (0 if division.gradients else gradient)
    sent_once = BESIDE * (gathers * division.weights + gradient * division.gradients)
    count = optim.accumulative_counts
    ours = count * pack_time(own.plan, Costs(beside=each), PACK, -(-PACK // own.most)) + sent_once
    theirs = count * pack_time(chosen.plan, chosen.costs, PACK, best_parts(chosen.plan, chosen.costs, PACK))
    theirs += chosen.costs.iteration
    if theirs >= WORTH * ours:
        logger.info(
            f"--deepspeed {name}: without it, or with --fsdp full, this trains by xtuner's own sharding, by arithmetic "
            f"{100 * (theirs / ours - 1):.0f} % faster; checkpoints of either resume under the other"
        )
