"""Speed on several GPUs of one host, predicted from the times of one GPU (single_gpu_times.py). All terms are printed.

    time = compute + recomputation + gradient copies + optimizer ÷ ranks + exposed collectives
         + slowdown of compute by hidden collectives + additional attention of the slowest rank

What DeepSpeed adds, in copies and waits for the host, is in engine/zero/zero_time.py.

Each rank takes one pack per iteration (accumulative_counts = 1, where collectives have the largest share). The traffic
was read from the code of DeepSpeed 0.19.8 with the shipped settings:

- ZeRO with the gradient exchange that `engine/zero/zero_memory.py` chooses. Full gradient sums: reduced once to their
  owners, in fp32 or bf16; then all weights are gathered in bf16; both exposed. DeepSpeed's own exchange, in each
  micro-batch: stage 2 casts gradients to fp32 and *all-reduces* them in buckets, hidden under the backward except for
  the last bucket and the embedding. Stage 3 gathers weights in bf16 before forward and backward; those used again
  within 10⁹ parameters (head, last blocks) stay; gradients are reduce-scattered in fp32, hidden except for the last
  bucket and the embedding.
- FSDP, our own strategy, with the division that `engine/memory.py` chooses. Full weights are gathered once per
  iteration, under the forward of the first blocks; else each block's before its forward and its backward, in each
  micro-batch. Full gradients are reduce-scattered once, under the backward of the last micro-batch; else in each.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from benchlib.multi_gpu.bandwidth import bus_bytes
from benchlib.multi_gpu.single_gpu_times import GIB, MACHINES, MODELS, Machine, Measured
from benchlib.multi_gpu.waiting_time import Floats
from benchlib.workloads import PACK

from xtuner.dist.mesh import Mesh
from xtuner.engine import memory
from xtuner.engine.zero import deepspeed_config, zero_memory, zero_time
from xtuner.model.activation_memory import ActivationPlan
from xtuner.model.flops import PEAK, matmul_parameters, training_flops
from xtuner.optim.optim_wrapper import OptimWrapper

ENGINES = ("fsdp", "zero1", "zero2", "zero3")
BUCKET = 200e6  # numbers: reduce_bucket_size of the shipped settings
REUSE = 1e9  # numbers: stage3_max_reuse_distance, DeepSpeed's default
TERMS = (
    "products", "attention", "elementwise, copies", "idle", "recomputation", "gradients", "optimizer",
    "exposed", "slowed by hidden", "slowest rank",
)  # fmt: skip


@dataclass(frozen=True)
class Interconnect:
    """Speed of collectives: measured by bandwidth.py, else assumed.

    Assumed values are those of four H100 of one host with 1 GiB (2026-11-27, multicast off): 300 of NVLink 4's 450 GB/s
    each way, a latency of 50 µs; concurrent compute is slowed down by 30 % of a collective's time.
    """

    measured: dict[str, Any] | None = None

    @property
    def slowdown(self) -> float:
        return float(self.measured["slowdown"]) if self.measured else 0.3

    def ms(self, name: str, size: float, ranks: int) -> float:
        """Duration of a collective on a full tensor of `size` bytes."""
        if ranks == 1 or not size:
            return 0.0
        sent = bus_bytes(name, int(size), ranks)
        if not self.measured:
            return 0.05 + sent / 300e9 * 1000
        points = sorted((int(s), reached) for s, reached in self.measured["bytes_per_s"][name].items())
        sizes, reached = zip(*points, strict=True)
        return float(1000 * sent / np.interp(np.log(size), np.log(sizes), reached))


@dataclass(frozen=True)
class Traffic:
    """Collectives of one iteration, ms."""

    bytes: float  # sent by each rank
    exposed: float
    hidden: float


def zero_traffic(m: Measured, engine: str, ranks: int, links: Interconnect, there: "MemoryPlan") -> Traffic:
    """DeepSpeed's traffic in an iteration of one pack."""
    layers, one, each, parts = m.source.config.num_layers, m.ends / 2, (ranks - 1) / ranks, there.parts
    share = m.block * layers / matmul_parameters(m.source.config)  # of the matrix products; the rest is the head
    compute = (m.products * share + m.attention + m.elementwise) / layers  # ms per block, forward and backward
    backward = compute / parts * 0.7  # attention's takes 2.5 forwards, the products' 2

    def gather(n: float) -> float:
        return links.ms("all_gather", 2 * n, ranks)

    def scatter(n: float, itemsize: int = 4) -> float:
        return links.ms("reduce_scatter", itemsize * n, ranks)

    def reduce(n: float) -> float:
        return links.ms("all_reduce", 4 * n, ranks)

    if there.way != "deepspeed":
        itemsize = 4 if there.way == "fp32" else 2
        late = scatter(m.parameters, itemsize) + gather(m.parameters)
        return Traffic((itemsize + 2) * m.parameters * each, late, 0)
    if engine != "zero3":
        buckets = max((m.parameters - one) / BUCKET - 1, 0)
        meanwhile = backward * BUCKET / m.block  # ms of compute until the next bucket
        late = reduce(BUCKET) + reduce(one) + buckets * max(0, reduce(BUCKET) - meanwhile)
        hidden = buckets * min(reduce(BUCKET), meanwhile)
        return Traffic((8 * parts + 2) * m.parameters * each, parts * late + gather(m.parameters), parts * hidden)
    staying = int(max(REUSE - 2 * one, 0) / (2 * m.block)) + 1  # blocks, in addition to the head
    fetched, hides = layers + layers - staying, gather(m.block)
    more = layers * max(0, scatter(m.block) + hides - backward)
    bytes_sent = 2 * (2 * m.parameters - one - staying * m.block) + 4 * m.parameters
    late = 2 * gather(one) + scatter(BUCKET) + scatter(one) + more  # the embedding is first and last
    hidden = fetched * hides + gather(one) + scatter(m.parameters - one - BUCKET) - more
    return Traffic(parts * bytes_sent * each, parts * late, parts * hidden)


def sharded_traffic(m: Measured, ranks: int, links: Interconnect, there: "MemoryPlan") -> Traffic:
    """Traffic of our own strategy."""
    layers, one, parts = m.source.config.num_layers, m.ends / 2, there.parts
    compute = (m.products + m.attention + m.elementwise) / parts  # ms per micro-batch
    forward, backward = compute * 0.3, compute * 0.7
    gather, scatter = (
        lambda n: links.ms("all_gather", 2 * n, ranks),
        lambda n: links.ms("reduce_scatter", 4 * n, ranks),
    )
    weights, gradients = layers * gather(m.block) + 2 * gather(one), layers * scatter(m.block) + 2 * scatter(one)
    gathers = 1 if there.division.weights else 2 * parts
    reductions = 1 if there.division.gradients else parts
    first, last = gather(one), scatter(m.block) + scatter(one)  # no compute before the first or after the last
    late = first + last + gathers * max(0, weights - forward) + reductions * max(0, gradients - backward)
    everything = gathers * weights + reductions * gradients
    numbers = 2 * gathers + 4 * reductions
    return Traffic(numbers * m.parameters * (ranks - 1) / ranks, late, max(everything - late, 0))


@dataclass(frozen=True)
class MemoryPlan:
    """The plan of engine/memory.py, and how many micro-batches a pack has."""

    plan: memory.MemoryPlan
    parts: int

    @property
    def activations(self) -> ActivationPlan:
        return self.plan.activations

    @property
    def division(self) -> memory.Division:
        return self.plan.division

    @property
    def way(self) -> str:
        """ZeRO's exchange of gradients; "" for our own strategy."""
        return self.plan.summing if isinstance(self.plan, zero_memory.ZeroMemoryPlan) else ""


def plan_memory(m: Measured, engine: str, ranks: int, free: float) -> MemoryPlan | None:
    """None if it does not fit."""
    optim, mesh = OptimWrapper(dict(type=torch.optim.AdamW, lr=1), dtype="bf16"), Mesh(dp_shard=ranks, local_size=ranks)
    found: memory.MemoryPlan
    if engine == "fsdp":
        found = memory.plan_memory(m.source, optim, torch.device("cuda"), mesh, PACK, int(free))
    else:  # AdamW has the same states on a CPU, so that no GPU is needed
        settings = deepspeed_config.prepare_settings(f"deepspeed_{engine}", m.source, optim, torch.device("cpu"), ranks)
        found = zero_memory.plan_zero_memory(m.source, optim, torch.device("cpu"), mesh, settings, PACK, int(free))
    assert found.max_tokens
    there = MemoryPlan(found, -(-PACK // found.max_tokens))
    return there if found.fits(found.micro_batch_tokens(PACK)) else None


def recomputation_ms(m: Measured, there: MemoryPlan) -> float:
    """ms of recomputation, at the measured speed of matrix products."""
    c, total = m.source.config, 0.0
    ms = m.products / (6 * matmul_parameters(c))  # per FLOP and token
    joint = c.qkv_width
    whole = 2 * m.block * ms + (m.attention / 3.5 + m.elementwise / 3) / c.num_layers
    for keep in there.activations.choose_kept(PACK // there.parts):
        if not keep.attention:
            total += whole
            continue
        total += 2 * ms * c.hidden_size * joint * (not keep.qkv)
        total += 2 * ms * c.hidden_size * c.num_heads * c.head_dim * (not keep.residual)
        total += 2 * ms * c.hidden_size * 2 * c.intermediate_size * (not keep.gate_up)
    return total


def gradient_copy_ms(m: Measured, engine: str, ranks: int, there: MemoryPlan) -> float:
    """ms by which an H100's iteration is longer because of memory traffic for gradient sums and DeepSpeed's gathers, in
    addition to the matrix products, by arithmetic."""
    if not there.way:  # sharded sums added up in each micro-batch: two reads, one write
        moved = 0.0 if there.division.gradients else 12 * m.parameters / ranks * there.parts
    elif there.way == "deepspeed":
        copied = zero_time.copied_bytes(int(engine[-1]), ranks) * m.parameters * there.parts
        moved = zero_time.COPY_SHARE * copied
        if engine == "zero3":
            moved += zero_time.end_bytes(m.source.config, int(BUCKET)) * there.parts
    else:  # into communication buckets
        moved = (12 if there.way == "fp32" else 6) * m.parameters
    return 1000 * moved / zero_time.COPYING


def optimizer_ms(m: Measured, ranks: int, there: MemoryPlan) -> float:
    """ms of the step on an H100."""
    copied = zero_time.step_bytes(there.way) * m.parameters / zero_time.COPYING if there.way else 0.0
    return (m.optimizer + 1000 * copied) / ranks


def idle_ms(m: Measured, engine: str, there: MemoryPlan) -> float:
    """ms without kernels: launches at the start of each micro-batch, and waits for the host under stage 3."""
    launches = m.idle * there.parts / m.parts
    if engine != "zero3":
        return launches
    c = m.source.config
    share = m.block * c.num_layers / matmul_parameters(c)
    forward = (m.products * share / 3 + m.attention / 3.5 + m.elementwise / 3) / c.num_layers / there.parts
    return launches + 1000 * zero_time.host_seconds(c, forward / 1000, there.parts)


@dataclass(frozen=True)
class Prediction:
    terms: dict[str, float]  # ms per iteration
    bytes: float  # sent by each rank
    tokens_per_s: float  # per GPU
    mfu: float
    peak: float  # bytes of memory


def single_gpu_speed(m: Measured, machine: Machine, squares: Floats) -> float:
    """Tokens per second of one GPU without an engine."""
    bound = m.elementwise + m.optimizer_there + m.copies
    times = m.fixed - bound + bound * machine.slower + m.a + m.b * squares
    return float(1000 * PACK / times.mean())


def predict(
    m: Measured, machine: Machine, engine: str, ranks: int, squares: Floats, links: Interconnect
) -> Prediction | None:
    """One engine on that number of GPUs; None if it does not fit.

    Args:
        squares: Σ len² of the packs in training order.
    """
    there = plan_memory(m, engine, ranks, machine.free)
    if there is None:
        return None
    own = engine == "fsdp"
    collectives = sharded_traffic(m, ranks, links, there) if own else zero_traffic(m, engine, ranks, links, there)
    each = squares[: len(squares) // ranks * ranks].reshape(-1, ranks)
    slowest = float(each.max(axis=1).mean())
    values = (
        m.products,
        m.a + m.b * float(squares.mean()),
        (m.elementwise + m.copies) * machine.slower,
        idle_ms(m, engine, there),
        recomputation_ms(m, there),
        gradient_copy_ms(m, engine, ranks, there) * machine.slower,
        optimizer_ms(m, ranks, there) * machine.slower,
        collectives.exposed,
        links.slowdown * collectives.hidden,
        m.b * (slowest - float(squares.mean())),
    )
    terms, ms = dict(zip(TERMS, values, strict=True)), sum(values)
    flops = training_flops(m.source.config, PACK, int(squares.mean()))
    peak = there.plan.peak_bytes(PACK, longest=0)
    return Prediction(terms, collectives.bytes, 1000 * PACK / ms, flops / (ms / 1000 * PEAK["H100"]), peak)


def table(links: Interconnect, squares: Floats, ranks: int) -> str:
    """All machines, models and engines on that number of GPUs; the terms of a row, in ms, add up to its time.

    The last column: with packs balanced so that no rank waits.
    """
    head = f"| {ranks} GPUs | {' | '.join(TERMS)} | ms | GB sent | tok/s/GPU | MFU | GiB | of one GPU | balanced |"
    lines = [head, "|---|" + "---|" * (len(TERMS) + 7)]
    for kind, machine in MACHINES.items():
        for name, m in MODELS.items():
            for engine in ENGINES:
                p = predict(m, machine, engine, ranks, squares, links)
                if p is None:
                    lines.append(f"| {kind}, {name}, {engine} | does not fit |" + " |" * (len(TERMS) + 6))
                    continue
                base, ms = single_gpu_speed(m, machine, squares), sum(p.terms.values())
                cells = " | ".join(f"{ms:.0f}" for ms in p.terms.values())
                lines.append(
                    f"| {kind}, {name}, {engine} | {cells} | {ms:.0f} | {p.bytes / 1e9:.1f} "
                    f"| {p.tokens_per_s:,.0f} | {p.mfu:.3f} | {p.peak / GIB:.0f} | {p.tokens_per_s / base:.1%} "
                    f"| {1000 * PACK / (ms - p.terms['slowest rank']) / base:.1%} |"
                )
    return "\n".join(lines)
