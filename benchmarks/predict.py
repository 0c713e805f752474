"""Several GPUs of one host, predicted by arithmetic from one GPU's measured times (one_gpu.py). Every term is printed.

    time = compute + computed again + engine's own + optimizer ÷ ranks + collectives that nothing hides
         + what hidden ones take from the compute beside them + attention of the rank with the most of it

Each rank takes one pack an iteration (accumulative_counts = 1, where collectives weigh most). What is sent was read in
torch 2.13 (FSDP2) and DeepSpeed 0.19.8, with the settings that are shipped:

- ZeRO-1, ZeRO-2: gradients are bf16, cast to fp32 (communication_data_type) and *all-reduced* in buckets of 200 million
  (use_multi_rank_bucket_allreduce is on by default: every rank receives all, and keeps its part). Hidden under the
  backward (overlap_comm), but for the last bucket and the embedding. Then all weights are gathered in bf16: not hidden.
- ZeRO-3: weights are gathered in bf16 before forward and backward; what is used again within 10⁹ parameters (head, last
  blocks) stays. Only what the prefetch (50 million, and up to the end of a tensor) covers is taken as hidden.
  Gradients are reduce-scattered in fp32, hidden but for the last bucket and the embedding.
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
from one_gpu import GIB, MACHINES, MODELS, PASSES, THROUGH, Machine, Measured

from xtuner.dist.mesh import Mesh
from xtuner.engine import memory, zero_config, zero_memory
from xtuner.engine.optim import OptimWrapper
from xtuner.model.flops import PEAK, matmul_parameters, training_flops
from xtuner.model.plan import Plan

COPIES = 3e12  # bytes a second of memory
ENGINES = ("fsdp", "zero1", "zero2", "zero3")
BUCKET = 200e6  # numbers: reduce_bucket_size of the shipped settings
PREFETCH = 50e6  # numbers: stage3_prefetch_bucket_size
REUSE = 1e9  # numbers: stage3_max_reuse_distance, DeepSpeed's default
TERMS = (
    "products", "attention", "elementwise, copies", "idle", "computed again", "engine", "optimizer",
    "exposed", "beside hidden", "slowest rank",
)  # fmt: skip


@dataclass(frozen=True)
class Links:
    """How fast GPUs exchange: measured by bandwidth.py, else assumed.

    Assumed: what four H100 of one host reached with 1 GiB (2026-11-27, multicast off): 300 of NVLink 4's 450 GB/s each
    way, and 50 µs before the first byte; compute beside a collective loses 39 % of its time.
    """

    measured: dict[str, Any] | None = None

    @property
    def slowdown(self) -> float:
        return float(self.measured["slowdown"]) if self.measured else 0.39

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


def sent(m: Measured, engine: str, ranks: int, links: Links) -> Sent:
    """What DeepSpeed sends in an iteration of one pack, and how much compute hides."""
    layers, one = m.source.config.num_layers, m.ends / 2
    share = m.block * layers / matmul_parameters(m.source.config)  # of the products; the head has the rest
    compute = (m.products * share + m.attention + m.elementwise) / layers  # ms a block, forward and backward
    backward = compute * 0.7  # attention's is 2.5, the products' 2 forwards

    def gather(n: float) -> float:
        return links.ms("all_gather", 2 * n, ranks)

    def scatter(n: float) -> float:
        return links.ms("reduce_scatter", 4 * n, ranks)

    def reduce(n: float) -> float:
        return links.ms("all_reduce", 4 * n, ranks)

    each = (ranks - 1) / ranks
    if engine in ("zero1", "zero2"):
        buckets = max((m.parameters - one) / BUCKET - 1, 0)
        beside = backward * BUCKET / m.block
        late = reduce(BUCKET) + reduce(one) + gather(m.parameters) + buckets * max(0, reduce(BUCKET) - beside)
        return Sent((8 + 2) * m.parameters * each, late, buckets * min(reduce(BUCKET), beside))
    if engine == "zero3":
        staying = int(max(REUSE - 2 * one, 0) / (2 * m.block)) + 1  # blocks; and the head
        covered, fetched = _prefetched(m), layers + layers - staying
        late = fetched * gather(m.block - covered) + 2 * gather(one)  # the embedding, first and last
        hides = gather(covered)
        more = layers * max(0, scatter(m.block) + hides - backward)
        bytes_sent = 2 * (2 * m.parameters - one - staying * m.block) + 4 * m.parameters
        late += scatter(BUCKET) + scatter(one) + more
        hidden = fetched * hides + gather(one) + scatter(m.parameters - one - BUCKET) - more
        return Sent(bytes_sent * each, late, hidden)
    raise AssertionError(engine)


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


def _prefetched(m: Measured) -> float:
    """Numbers of a block that ZeRO-3 gathers before they are needed: whole tensors, until there are 50 million."""
    c, covered = m.source.config, 0.0
    joint = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    ffn = c.hidden_size * c.intermediate_size
    for tensor in (c.hidden_size * joint, c.num_heads * c.head_dim * c.hidden_size, ffn, ffn, ffn):
        if covered < PREFETCH:
            covered += tensor
    return covered


@dataclass(frozen=True)
class Room:
    """As engine/memory.py decides: bytes of state, what blocks may keep, micro-batches that a pack is cut into."""

    state: int
    plan: Plan
    parts: int
    division: memory.Division = memory.ALL_FULL


def room(m: Measured, engine: str, ranks: int, free: float) -> Room | None:
    """None if it does not fit."""
    optim, cpu = OptimWrapper(dict(type=torch.optim.AdamW, lr=1), dtype="bf16"), torch.device("cpu")
    if engine == "fsdp":
        mesh = Mesh(dp_shard=ranks, local_size=ranks)
        found = memory.of_mesh(m.source, optim, torch.device("cuda"), mesh, PACK, int(free))
        assert found.most
        there = Room(found.state, found.plan, -(-PACK // found.most), found.division)
        return there if found.fits(min(found.most, PACK)) else None
    settings = zero_config.read(f"deepspeed_{engine}")
    state = zero_memory.zero_state(m.source, optim, cpu, ranks, settings)
    left = int(free - state - memory.RESERVE)
    plan = Plan(m.source.config, 2, max(left, 0))
    return Room(state, plan, 1) if plan.peak(PACK) <= left else None


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


def engines_own(m: Measured, engine: str, ranks: int, slower: float, parts: int, division: memory.Division) -> float:
    """ms that an engine costs beside compute, optimizer and collectives: 1.8B's on one GPU, by parameters; once for
    each part of a pack."""
    if engine == "fsdp":  # sums of rows, where they are added up in each micro-batch: read both, write one
        rows = 0 if division.gradients else 12 * m.parameters / ranks
        return 1000 * parts * rows / COPIES * slower
    small = MODELS["1.8b"]
    there = room(small, engine, 1, MACHINES["H100"].free)
    assert there
    tokens_per_s, squares = THROUGH[engine]
    compute = small.fixed + small.a + small.b * squares
    cost = 1000 * PACK / tokens_per_s - compute - again(small, there)
    everywhere, mine = PASSES[engine]
    left = (everywhere + mine / ranks) / (everywhere + mine)
    return cost * left * slower * parts * m.parameters / small.parameters


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
    collectives = sent_by_own(m, ranks, links, there) if own else sent(m, engine, ranks, links)
    each = squares[: len(squares) // ranks * ranks].reshape(-1, ranks)
    slowest = float(each.max(axis=1).mean())
    values = (
        m.products,
        m.a + m.b * float(squares.mean()),
        (m.elementwise + m.copies) * machine.slower,
        m.idle,
        again(m, there),
        engines_own(m, engine, ranks, machine.slower, there.parts, there.division),
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
