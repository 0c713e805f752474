"""Several GPUs of one host, predicted by arithmetic from one GPU's measured times (one_gpu.py). Every term is printed.

    time = compute + computed again + copies of gradients + optimizer ÷ ranks + collectives that nothing hides
         + what hidden ones take from the compute beside them + attention of the rank with the most of it

Each rank takes one pack an iteration (accumulative_counts = 1, where collectives weigh most). What is sent was read in
DeepSpeed 0.19.8, with the settings that are shipped:

- ZeRO as `engine/zero/zero_memory.py` chooses. Whole sums of gradients: sent once to their owners, in fp32, or in bf16
  as they are; then all weights are gathered in bf16; neither is hidden. DeepSpeed's own way, with each micro-batch:
  under stage 2 gradients are cast to fp32 and *all-reduced* in buckets, hidden under the backward but for the last
  bucket and the embedding. Under stage 3 weights are gathered in bf16 before forward and backward, what is used
  again within 10⁹ parameters (head, last blocks) stays; gradients are reduce-scattered in fp32, hidden but for the last
  bucket and the embedding.
- FSDP, our own strategy: what `engine/memory.py` chooses to keep full. Full weights are gathered once an iteration,
  under the first blocks' forward; otherwise a block's before its forward and before its backward, in each micro-batch.
  Full gradients are reduce-scattered once, under the last micro-batch's backward; otherwise in each.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from balance import Floats
from bandwidth import bus_bytes
from cases import PACK
from one_gpu import GIB, MACHINES, MODELS, Machine, Measured

from xtuner.dist.mesh import Mesh
from xtuner.engine import memory
from xtuner.engine.zero import deepspeed_config, zero_memory
from xtuner.model.activation_memory import Plan
from xtuner.model.flops import PEAK, matmul_parameters, training_flops
from xtuner.optim.optim_wrapper import OptimWrapper

ENGINES = ("fsdp", "zero1", "zero2", "zero3")
BUCKET = 200e6  # numbers: reduce_bucket_size of the shipped settings
REUSE = 1e9  # numbers: stage3_max_reuse_distance, DeepSpeed's default
TERMS = (
    "products", "attention", "elementwise, copies", "idle", "computed again", "gradients", "optimizer",
    "exposed", "slowed by hidden", "slowest rank",
)  # fmt: skip


@dataclass(frozen=True)
class Links:
    """How fast GPUs exchange: measured by bandwidth.py, else assumed.

    Assumed: what four H100 of one host reached with 1 GiB (2026-11-27, multicast off): 300 of NVLink 4's 450 GB/s each
    way, and 50 µs before the first byte; compute during a collective loses 30 % of its time.
    """

    measured: dict[str, Any] | None = None

    @property
    def slowdown(self) -> float:
        return float(self.measured["slowdown"]) if self.measured else 0.3

    def ms(self, name: str, size: float, ranks: int) -> float:
        """Of a collective whose whole tensor has `size` bytes."""
        if ranks == 1 or not size:
            return 0.0
        sent = bus_bytes(name, int(size), ranks)
        if not self.measured:
            return 0.05 + sent / 300e9 * 1000
        points = sorted((int(s), reached) for s, reached in self.measured["bytes_per_s"][name].items())
        sizes, reached = zip(*points, strict=True)
        return float(1000 * sent / np.interp(np.log(size), np.log(sizes), reached))


@dataclass(frozen=True)
class Sent:
    """Collectives of one iteration, ms."""

    bytes: float  # that each rank sends
    exposed: float  # that nothing hides
    hidden: float


def sent_by_zero(m: Measured, engine: str, ranks: int, links: Links, there: "Room") -> Sent:
    """What DeepSpeed sends in an iteration of one pack, and how much compute hides."""
    layers, one, each, parts = m.source.config.num_layers, m.ends / 2, (ranks - 1) / ranks, there.parts
    share = m.block * layers / matmul_parameters(m.source.config)  # of the products; the head has the rest
    compute = (m.products * share + m.attention + m.elementwise) / layers  # ms a block, forward and backward
    backward = compute / parts * 0.7  # attention's is 2.5, the products' 2 forwards

    def gather(n: float) -> float:
        return links.ms("all_gather", 2 * n, ranks)

    def scatter(n: float, itemsize: int = 4) -> float:
        return links.ms("reduce_scatter", itemsize * n, ranks)

    def reduce(n: float) -> float:
        return links.ms("all_reduce", 4 * n, ranks)

    if there.way != "deepspeed":
        itemsize = 4 if there.way == "fp32" else 2
        late = scatter(m.parameters, itemsize) + gather(m.parameters)
        return Sent((itemsize + 2) * m.parameters * each, late, 0)
    if engine != "zero3":
        buckets = max((m.parameters - one) / BUCKET - 1, 0)
        meanwhile = backward * BUCKET / m.block  # ms that compute takes until the next bucket
        late = reduce(BUCKET) + reduce(one) + buckets * max(0, reduce(BUCKET) - meanwhile)
        hidden = buckets * min(reduce(BUCKET), meanwhile)
        return Sent((8 * parts + 2) * m.parameters * each, parts * late + gather(m.parameters), parts * hidden)
    staying = int(max(REUSE - 2 * one, 0) / (2 * m.block)) + 1  # blocks; and the head
    fetched, hides = layers + layers - staying, gather(m.block)
    more = layers * max(0, scatter(m.block) + hides - backward)
    bytes_sent = 2 * (2 * m.parameters - one - staying * m.block) + 4 * m.parameters
    late = 2 * gather(one) + scatter(BUCKET) + scatter(one) + more  # the embedding, first and last
    hidden = fetched * hides + gather(one) + scatter(m.parameters - one - BUCKET) - more
    return Sent(parts * bytes_sent * each, parts * late, parts * hidden)


def sent_by_own(m: Measured, ranks: int, links: Links, there: "Room") -> Sent:
    """The same of our own strategy."""
    layers, one, parts = m.source.config.num_layers, m.ends / 2, there.parts
    compute = (m.products + m.attention + m.elementwise) / parts  # ms a micro-batch
    forward, backward = compute * 0.3, compute * 0.7
    gather, scatter = (
        lambda n: links.ms("all_gather", 2 * n, ranks),
        lambda n: links.ms("reduce_scatter", 4 * n, ranks),
    )
    weights, gradients = layers * gather(m.block) + 2 * gather(one), layers * scatter(m.block) + 2 * scatter(one)
    gathers = 1 if there.division.weights else 2 * parts
    reductions = 1 if there.division.gradients else parts
    first, last = gather(one), scatter(m.block) + scatter(one)  # nothing computes before, or after
    late = first + last + gathers * max(0, weights - forward) + reductions * max(0, gradients - backward)
    everything = gathers * weights + reductions * gradients
    numbers = 2 * gathers + 4 * reductions
    return Sent(numbers * m.parameters * (ranks - 1) / ranks, late, max(everything - late, 0))


@dataclass(frozen=True)
class Room:
    """As engine/memory.py decides: bytes of state, what blocks may keep, micro-batches that a pack is cut into."""

    state: int
    plan: Plan
    parts: int
    division: memory.Division = memory.ALL_FULL
    way: str = ""  # in which ZeRO sums gradients


def room(m: Measured, engine: str, ranks: int, free: float) -> Room | None:
    """None if it does not fit."""
    optim, mesh = OptimWrapper(dict(type=torch.optim.AdamW, lr=1), dtype="bf16"), Mesh(dp_shard=ranks, local_size=ranks)
    way, found = "", None
    if engine == "fsdp":
        found = memory.of_mesh(m.source, optim, torch.device("cuda"), mesh, PACK, int(free))
    else:  # on a CPU PyTorch's AdamW has the same states, and needs no GPU to be asked
        settings = deepspeed_config.read(f"deepspeed_{engine}")
        found = zero_memory.of_zero(m.source, optim, torch.device("cpu"), mesh, settings, PACK, int(free))
        way = found.way
    assert found.most
    there = Room(found.state, found.plan, -(-PACK // found.most), found.division, way)
    return there if found.fits(found.tokens(PACK)) else None


def again(m: Measured, there: Room) -> float:
    """ms of what is computed twice, at the speed of the products that were measured."""
    c, total = m.source.config, 0.0
    ms = m.products / (6 * matmul_parameters(c))  # of one multiplication-addition a token, times 2
    joint = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    whole = 2 * m.block * ms + (m.attention / 3.5 + m.elementwise / 3) / c.num_layers
    for keep in there.plan.keeps(PACK // there.parts):
        if not keep.attention:
            total += whole
            continue
        total += 2 * ms * c.hidden_size * joint * (not keep.qkv)
        total += 2 * ms * c.hidden_size * c.num_heads * c.head_dim * (not keep.residual)
        total += 2 * ms * c.hidden_size * 2 * c.intermediate_size * (not keep.gate_up)
    return total


def copies(m: Measured, ranks: int, there: Room) -> float:
    """ms of an H100's memory that sums of gradients take in addition to the products that make them, by arithmetic."""
    if not there.way:  # sums of rows, where they are added up in each micro-batch: read both, write one
        moved = 0 if there.division.gradients else 12 * m.parameters / ranks * there.parts
    elif there.way == "deepspeed":
        moved = zero_memory.COPIED * m.parameters * there.parts
    else:  # to the buckets that are sent
        moved = (12 if there.way == "fp32" else 6) * m.parameters
    return 1000 * moved / zero_memory.COPYING


@dataclass(frozen=True)
class Prediction:
    terms: dict[str, float]  # ms of an iteration
    bytes: float  # that each rank sends
    tokens_per_s: float  # of one GPU
    mfu: float
    peak: float  # bytes of memory


def alone(m: Measured, machine: Machine, squares: Floats) -> float:
    """Tokens a second of one GPU without an engine."""
    bound = m.elementwise + m.optimizer_there + m.copies
    times = m.fixed - bound + bound * machine.slower + m.a + m.b * squares
    return float(1000 * PACK / times.mean())


def predict(m: Measured, machine: Machine, engine: str, ranks: int, squares: Floats, links: Links) -> Prediction | None:
    """One engine on so many GPUs; None if it does not fit.

    Args:
        squares: Σ len² of the packs in the order in which they are taken.
    """
    there = room(m, engine, ranks, machine.free)
    if there is None:
        return None
    own = engine == "fsdp"
    collectives = sent_by_own(m, ranks, links, there) if own else sent_by_zero(m, engine, ranks, links, there)
    each = squares[: len(squares) // ranks * ranks].reshape(-1, ranks)
    slowest = float(each.max(axis=1).mean())
    values = (
        m.products,
        m.a + m.b * float(squares.mean()),
        (m.elementwise + m.copies) * machine.slower,
        m.idle,
        again(m, there),
        copies(m, ranks, there) * machine.slower,
        m.optimizer * machine.slower / ranks,
        collectives.exposed,
        links.slowdown * collectives.hidden,
        m.b * (slowest - float(squares.mean())),
    )
    terms, ms = dict(zip(TERMS, values, strict=True)), sum(values)
    flops = training_flops(m.source.config, PACK, int(squares.mean()))
    peak = there.state + there.plan.peak(PACK // there.parts)
    return Prediction(terms, collectives.bytes, 1000 * PACK / ms, flops / (ms / 1000 * PEAK["H100"]), peak)


def table(links: Links, squares: Floats, ranks: int) -> str:
    """All machines, models and engines on so many GPUs; every row's terms, in ms, add up to its time.

    The last column: if packs were dealt so that no rank waits for a slower one.
    """
    head = f"| {ranks} GPUs | {' | '.join(TERMS)} | ms | GB sent | tok/s/GPU | MFU | GiB | of one GPU | dealt |"
    lines = [head, "|---|" + "---|" * (len(TERMS) + 7)]
    for kind, machine in MACHINES.items():
        for name, m in MODELS.items():
            for engine in ENGINES:
                p = predict(m, machine, engine, ranks, squares, links)
                if p is None:
                    lines.append(f"| {kind}, {name}, {engine} | does not fit |" + " |" * (len(TERMS) + 6))
                    continue
                base, ms = alone(m, machine, squares), sum(p.terms.values())
                cells = " | ".join(f"{ms:.0f}" for ms in p.terms.values())
                lines.append(
                    f"| {kind}, {name}, {engine} | {cells} | {ms:.0f} | {p.bytes / 1e9:.1f} "
                    f"| {p.tokens_per_s:,.0f} | {p.mfu:.3f} | {p.peak / GIB:.0f} | {p.tokens_per_s / base:.1%} "
                    f"| {1000 * PACK / (ms - p.terms['slowest rank']) / base:.1%} |"
                )
    return "\n".join(lines)
