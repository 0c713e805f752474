"""Seconds of an iteration on any number of GPUs, predicted from the times of one (kernel_times.py).

    time = compute + recomputation + gradient copies + optimizer ÷ ranks + exposed collectives
         + slowdown of compute by hidden collectives + additional attention of the slowest rank

What DeepSpeed adds, in copies and waits for the host, is in zero/zero_time.py. Traffic of a rank in an iteration:

- ZeRO (DeepSpeed 0.19.8, shipped settings) with the gradient exchange that `zero/zero_memory.py` chooses. Full gradient
  sums: reduced to their owners, in fp32 once, in bf16 once a pack; then all weights are gathered in bf16; both exposed.
  DeepSpeed's own exchange, in each micro-batch: stage 2 casts gradients to fp32 and *all-reduces* them in
  buckets, hidden under the backward except for the last bucket and the embedding. Stage 3 gathers weights in bf16
  before forward and backward; those used again within 10⁹ parameters (head, last blocks) stay; gradients are
  reduce-scattered in fp32, hidden except for the last bucket and the embedding.
- Our own strategy with the division that `memory.py` chooses. Full weights are gathered once per iteration, under the
  forward of the first blocks; else each block's before its forward and its backward, in each micro-batch. Full
  gradients are reduce-scattered once, under the backward of the last micro-batch; else in each. Replicas of a hybrid
  mesh all-reduce each rank's rows at the end.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from xtuner.dist.mesh import Mesh
from xtuner.engine import memory
from xtuner.engine.kernel_times import KernelTimes
from xtuner.engine.step_time import BETWEEN_NODES, OVERLAP_LOSS, WITHIN_NODE, context_costs, speed_over_nodes
from xtuner.engine.zero import zero_memory, zero_time
from xtuner.model.activation_memory import ActivationPlan
from xtuner.model.flops import matmul_parameters

BUCKET = 200e6  # numbers: reduce_bucket_size of the shipped settings
REUSE = 1e9  # numbers: stage3_max_reuse_distance, DeepSpeed's default
LATENCY = 0.05  # ms of a collective within a node
LATENCY_EACH = 0.01  # ms more for each node in it
TERMS = (
    "products", "attention", "elementwise, copies", "idle", "recomputation", "gradients", "optimizer",
    "exposed", "slowed by hidden", "slowest rank",
)  # fmt: skip


def bus_bytes(name: str, size: int, ranks: int) -> float:
    """Bytes that each rank must send, and receive, for a collective on a full tensor of `size` bytes.

    An all-reduce is a reduce-scatter and an all-gather. "Bus bandwidth", as in nccl-tests, is this over time.
    """
    return (2 if name == "all_reduce" else 1) * size * (ranks - 1) / ranks


@dataclass(frozen=True)
class Interconnect:
    """Speed of collectives: as measured on a host, else by arithmetic.

    Assumed values are those of four H100 of one host with 1 GiB (2026-11-27, multicast off): 300 of NVLink 4's 450 GB/s
    each way, a latency of 50 µs; concurrent compute is slowed down by 30 % of a collective's time.

    Args:
        measured: what benchmarks/multi_gpu.py has written.
        within: bytes per second and GPU over the links of a node.
        between: bytes per second of each GPU's card; rings through several nodes use all cards.
        node: ranks on a node.
    """

    measured: dict[str, Any] | None = None
    within: float = WITHIN_NODE
    between: float = BETWEEN_NODES
    node: int = 8

    @property
    def slowdown(self) -> float:
        return float(self.measured["slowdown"]) if self.measured else OVERLAP_LOSS

    def ms(self, name: str, size: float, ranks: int, apart: bool = False) -> float:
        """Duration of a collective on a full tensor of `size` bytes.

        Args:
            apart: each of the ranks is on another node.
        """
        if ranks == 1 or not size:
            return 0.0
        sent, nodes = bus_bytes(name, int(size), ranks), ranks if apart else -(-ranks // self.node)
        if nodes > 1:
            speed = self.between if apart else speed_over_nodes(self.within, self.between, self.node)
            return LATENCY + LATENCY_EACH * nodes + sent / speed * 1000
        if not self.measured:
            return LATENCY + sent / self.within * 1000
        points = sorted((int(s), reached) for s, reached in self.measured["bytes_per_s"][name].items())
        sizes, reached = zip(*points, strict=True)
        return float(1000 * sent / np.interp(np.log(size), np.log(sizes), reached))


@dataclass(frozen=True)
class Traffic:
    """Collectives of one iteration, ms."""

    bytes: float  # sent by each rank
    exposed: float
    hidden: float


def zero_traffic(m: KernelTimes, engine: str, ranks: int, links: Interconnect, there: "PlannedIteration") -> Traffic:
    """DeepSpeed's traffic in an iteration."""
    layers, one, each, parts = m.config.num_layers, m.ends / 2, (ranks - 1) / ranks, there.parts
    share = m.block * layers / matmul_parameters(m.config)  # of the matrix products; the rest is the head
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
        sums = there.packs if there.way == "bf16" else 1
        late = sums * scatter(m.parameters, itemsize) + gather(m.parameters)
        return Traffic((sums * itemsize + 2) * m.parameters * each, late, 0)
    bucket = min(BUCKET, m.parameters - one)  # of small models all but the embedding
    if engine != "zero3":
        buckets = max((m.parameters - one) / BUCKET - 1, 0)
        meanwhile = backward * bucket / m.block  # ms of compute until the next bucket
        late = reduce(bucket) + reduce(one) + buckets * max(0, reduce(bucket) - meanwhile)
        hidden = buckets * min(reduce(bucket), meanwhile)
        return Traffic((8 * parts + 2) * m.parameters * each, parts * late + gather(m.parameters), parts * hidden)
    staying = min(int(max(REUSE - 2 * one, 0) / (2 * m.block)) + 1, layers)  # blocks, in addition to the head
    fetched, hides = layers + layers - staying, gather(m.block)
    more = layers * max(0, scatter(m.block) + hides - backward)
    bytes_sent = 2 * (2 * m.parameters - one - staying * m.block) + 4 * m.parameters
    late = 2 * gather(one) + scatter(bucket) + scatter(one) + more  # the embedding is first and last
    hidden = max(fetched * hides + gather(one) + scatter(m.parameters - one - bucket) - more, 0)
    return Traffic(parts * bytes_sent * each, parts * late, parts * hidden)


def sharded_traffic(m: KernelTimes, ranks: int, links: Interconnect, there: "PlannedIteration") -> Traffic:
    """Traffic of our own strategy."""
    layers, one, parts = m.config.num_layers, m.ends / 2, there.parts
    compute = (m.products + m.attention + m.elementwise) / parts  # ms per micro-batch
    forward, backward = compute * 0.3, compute * 0.7
    gather, scatter = (
        lambda n: links.ms("all_gather", 2 * n, ranks),
        lambda n: links.ms("reduce_scatter", there.gradient_bytes * n, ranks),
    )
    weights, gradients = layers * gather(m.block) + 2 * gather(one), layers * scatter(m.block) + 2 * scatter(one)
    gathers = 1 if there.division.weights else 2 * parts
    reductions = 1 if there.division.gradients else parts
    first, last = gather(one), scatter(m.block) + scatter(one)  # no compute before the first or after the last
    late = first + last + gathers * max(0, weights - forward) + reductions * max(0, gradients - backward)
    everything = gathers * weights + reductions * gradients
    numbers = 2 * gathers + there.gradient_bytes * reductions
    return Traffic(numbers * m.parameters * (ranks - 1) / ranks, late, max(everything - late, 0))


@dataclass(frozen=True)
class PlannedIteration:
    """What a rank does in an iteration, by the plan of memory.py or zero/zero_memory.py.

    Args:
        parts: micro-batches, of all its packs.
        tokens: of all its packs.
        packs: their number.
        gradient_bytes: of an element of our own strategy's gradient sums.
        document: tokens of documents that the ranks of a mesh share; 0 if only those at cuts are shared.
    """

    plan: memory.MemoryPlan
    parts: int
    tokens: int
    packs: int = 1
    mesh: Mesh = field(default_factory=Mesh)
    gradient_bytes: int = 4
    document: int = 0

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


def recomputation_ms(m: KernelTimes, there: PlannedIteration) -> float:
    """ms of recomputation, at the measured speed of matrix products."""
    c, total = m.config, 0.0
    ms = m.products / (6 * matmul_parameters(c))  # per FLOP and token
    joint = c.qkv_width
    whole = 2 * m.block * ms + (m.attention / 3.5 + m.elementwise / 3) / c.num_layers
    for keep in there.activations.choose_kept(there.tokens // there.parts):
        if not keep.attention:
            total += whole
            continue
        total += 2 * ms * c.hidden_size * joint * (not keep.qkv)
        total += 2 * ms * c.hidden_size * c.num_heads * c.head_dim * (not keep.residual)
        total += 2 * ms * c.hidden_size * 2 * c.intermediate_size * (not keep.gate_up)
    return total


def gradient_copy_ms(m: KernelTimes, engine: str, ranks: int, there: PlannedIteration) -> float:
    """ms by which an H100's iteration is longer because of memory traffic for gradient sums and DeepSpeed's gathers, in
    addition to the matrix products, by arithmetic."""
    if not there.way:  # sharded sums added up in each micro-batch: two reads, one write
        moved = 0.0 if there.division.gradients else 12 * m.parameters / ranks * there.parts
    elif there.way == "deepspeed":
        copied = zero_time.copied_bytes(int(engine[-1]), ranks) * m.parameters * there.parts
        moved = zero_time.COPY_SHARE * copied
        if engine == "zero3":
            moved += zero_time.end_bytes(m.config, int(BUCKET)) * there.parts
    else:  # into communication buckets
        moved = (12 if there.way == "fp32" else 6 * there.packs) * m.parameters
    return 1000 * moved / zero_time.COPYING


def optimizer_ms(m: KernelTimes, ranks: int, there: PlannedIteration) -> float:
    """ms of the step on an H100."""
    copied = zero_time.step_bytes(there.way) * m.parameters / zero_time.COPYING if there.way else 0.0
    return (m.optimizer + 1000 * copied) / ranks


def idle_ms(m: KernelTimes, engine: str, there: PlannedIteration) -> float:
    """ms without kernels: launches at the start of each micro-batch, and waits for the host under stage 3."""
    launches = m.launch_ms(there.parts)
    if engine != "zero3":
        return launches
    c = m.config
    share = m.block * c.num_layers / matmul_parameters(c)
    forward = (m.products * share / 3 + m.attention / 3.5 + m.elementwise / 3) / c.num_layers / there.parts
    return launches + 1000 * zero_time.host_seconds(c, forward / 1000, there.parts)


def exchange_ms(m: KernelTimes, links: Interconnect, there: PlannedIteration) -> float:
    """ms of sending heads of shared documents, of which half is hidden under attention of other heads."""
    if there.mesh.cp == 1 or not there.document:
        return 0.0
    costs = context_costs(m.config, there.mesh, there.activations.itemsize)
    within = there.mesh.cp <= there.mesh.local_size
    speed = (WITHIN_NODE / links.within) if within else (BETWEEN_NODES / links.between)
    return 0.5 * 1000 * costs.exchanged * there.tokens * speed


def replicas_ms(m: KernelTimes, links: Interconnect, there: PlannedIteration) -> float:
    """ms of the all-reduce of each rank's rows over the replicas of a hybrid mesh."""
    mesh = there.mesh
    return links.ms("all_reduce", there.gradient_bytes * m.parameters / mesh.shard_size, mesh.dp_replicate, apart=True)


def predict_iteration(
    m: KernelTimes,
    there: PlannedIteration,
    engine: str,
    links: Interconnect,
    squares: float,
    slowest: float,
    slower: float = 1.0,
) -> tuple[dict[str, float], float]:
    """(ms of an iteration by TERMS, bytes that each rank sends)

    Args:
        engine: fsdp for our own strategy, or zero1, zero2, zero3.
        squares: Σ len² of a rank's packs, on average; of the slowest rank's.
        slower: times of memory-bound kernels, relative to an H100.
    """
    mesh, own = there.mesh, engine == "fsdp"
    ranks = mesh.shard_size
    found = sharded_traffic(m, ranks, links, there) if own else zero_traffic(m, engine, ranks, links, there)
    exposed = found.exposed + replicas_ms(m, links, there) + exchange_ms(m, links, there)
    usual = m.attention_ms(squares)
    values = (
        m.products,
        usual,
        (m.elementwise + m.copies) * slower,
        idle_ms(m, engine, there),
        recomputation_ms(m, there),
        gradient_copy_ms(m, engine, ranks, there) * slower,
        optimizer_ms(m, ranks, there) * slower,
        exposed,
        links.slowdown * found.hidden,
        m.attention_ms(slowest) - usual,
    )
    return dict(zip(TERMS, values, strict=True)), found.bytes
