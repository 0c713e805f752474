"""Memory and speed of each way to train a workload on a number of GPUs, and which ways fit."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from xtuner.core.errors import ConfigError
from xtuner.data.loading import balance
from xtuner.dist.mesh import Mesh, divisors, make_mesh
from xtuner.engine import memory
from xtuner.engine.gpu_kinds import CARD_SHARE, LINK_SHARE, MEASURED, GpuKind
from xtuner.engine.kernel_times import EstimatedTimes
from xtuner.engine.prediction import Interconnect, PlannedIteration, predict_iteration
from xtuner.engine.zero import deepspeed_config, zero_memory
from xtuner.model.flops import matmul_parameters, num_parameters
from xtuner.optim.adamw import FORMS
from xtuner.train.forecast.workload import Workload

NODE = 8  # GPUs
STAGES = ("zero1", "zero2", "zero3")
MAX_SHARERS = 64  # ranks that share a pack
MAX_GPUS = 4096
WINDOWS = 4  # drawn to estimate the wait for the slowest rank


@dataclass(frozen=True)
class Cluster:
    """
    Args:
        network: bytes per second and GPU between nodes, nominal.
        host: bytes of host memory that each GPU's activations may use.
    """

    kind: GpuKind
    network: float = 50e9
    host: int = 0

    @property
    def links(self) -> Interconnect:
        return Interconnect(within=self.kind.link * LINK_SHARE, between=self.network * CARD_SHARE, node=NODE)


@dataclass(frozen=True)
class Way:
    """A way to train.

    Args:
        engine: fsdp for our own sharding or one process, or a stage of ZeRO.
        fsdp: "full" or "hybrid".
        sharers: ranks that share a pack.
    """

    engine: str
    fsdp: str | None = None
    sharers: int = 1

    @property
    def name(self) -> str:
        shared = f", packs shared by {self.sharers}" if self.sharers > 1 else ""
        alone = "one process" if self.engine == "fsdp" else self.engine.replace("zero", "ZeRO-")
        return {"full": "sharded", "hybrid": "hybrid"}.get(self.fsdp or "", alone) + shared

    def options(self) -> list[str]:
        """Words of the command line: sharding over all ranks is the default of several processes."""
        if self.engine != "fsdp":
            return ["--deepspeed", f"deepspeed_{self.engine}"]
        return ["--fsdp", "hybrid"] if self.fsdp == "hybrid" else []


@dataclass(frozen=True)
class Forecast:
    """One way on a number of GPUs.

    Args:
        parts: bytes a GPU, by part.
        terms: ms of an iteration, by part.
        iteration: tokens of all ranks in an iteration.
    """

    way: Way
    gpus: int
    parts: dict[str, float]
    free: float
    fits: bool
    plan: memory.MemoryPlan
    micro_batch: int
    terms: dict[str, float]
    iteration: int
    mfu: float

    @property
    def peak(self) -> float:
        return sum(self.parts.values())

    @property
    def tokens_per_s(self) -> float:
        """Of each GPU."""
        return 1000 * self.iteration / self.gpus / sum(self.terms.values())

    def hours(self, tokens: float) -> float:
        return tokens / (self.tokens_per_s * self.gpus) / 3600


def list_ways(work: Workload, gpus: int) -> Iterator[Way]:
    """The ways to train with that number of GPUs. Raises: ConfigError if it is not a multiple of the sharing ranks."""
    if gpus == 1:
        if work.sharers and work.sharers > 1:
            make_mesh(None, gpus, work.sharers)
        yield Way("fsdp")
        return
    sharers = [work.sharers or 1]
    make_mesh(None, gpus, sharers[0])
    if work.is_long or not work.sharers:
        sharers = [n for n in divisors(gpus) if sharers[0] <= n <= MAX_SHARERS and not n & (n - 1)] or sharers
    for count in sharers:
        yield Way("fsdp", "full", count)
        if gpus > NODE and not gpus % NODE and not NODE % count:
            yield Way("fsdp", "hybrid", count)
    if 1 in sharers and work.optim.states is FORMS["fp32"] and not (work.source.adapter or work.optim.muon):
        yield from map(Way, STAGES)


def forecast(work: Workload, way: Way, cluster: Cluster, gpus: int) -> Forecast:
    """Memory and speed by the plan that would train."""
    kind, c, optim = cluster.kind, work.source.config, work.optim
    mesh = make_mesh(way.fsdp, gpus, way.sharers)
    pack, packs, free = -(-work.pack // mesh.cp), optim.accumulative_counts, int(kind.free)
    plan, state = plan_memory(work, way, mesh, free, cluster.host)
    most, squares = plan.micro_batch_tokens(pack), float(work.costs.mean()) / mesh.cp * packs
    is_one = bool(work.costs.mean() > 0.5 * work.pack**2)  # a pack is a document, which cannot be cut
    row = plan.longest_row or pack * is_one
    each = max(row, most) if is_one else most
    parts = packs * -(-pack // each)
    there = PlannedIteration(
        plan, parts, pack * packs, packs, mesh, optim.gradient_dtype(_device(work)).itemsize,
        work.document if mesh.cp > 1 else 0,
    )  # fmt: skip
    form = optim.state_form(_device(work))
    trained = work.source.count_trained().total / num_parameters(c)
    needed = work.source.training_flops(1, 0) / (6 * matmul_parameters(c))  # less if weights are frozen
    stored = (form.bytes if form else 16) * trained
    times = EstimatedTimes(c, kind, pack * packs, parts, squares, stored, work.source.products, needed)
    slowest = squares + extra_squares(work, mesh, times)
    terms, _ = predict_iteration(
        times, there, way.engine, cluster.links, squares, slowest, MEASURED.bandwidth / kind.bandwidth
    )
    peak = plan.peak_bytes(pack, longest=row)
    used = state | {"activations": peak - plan.state - plan.library_bytes, "libraries": plan.library_bytes}
    room = plan.state + memory.RESERVE_BYTES + memory.COLLECTIVE_BYTES * (gpus > 1) <= free
    fits = room and plan.fits(most) and plan.fits(row) and peak <= free
    flops = work.source.training_flops(pack * packs, squares)
    mfu = flops / (sum(terms.values()) / 1000 * kind.flops)
    return Forecast(way, gpus, used, free, fits, plan, each, terms, pack * packs * gpus, mfu)


def plan_memory(
    work: Workload, way: Way, mesh: Mesh, free: int, host: int
) -> tuple[memory.MemoryPlan, dict[str, float]]:
    """(the plan that `engine/strategies/select.py` would choose, bytes of its state by part)"""
    source, optim, pack = work.source, work.optim, -(-work.pack // mesh.cp)
    if way.engine == "fsdp":
        device = _device(work)
        plan = memory.plan_memory(source, optim, device, mesh, pack, free, document=work.document, host=host)
        return plan, memory.state_parts(source, optim, device, mesh, plan.division)
    cpu = torch.device("cpu")  # the same states, without asking a GPU
    settings = deepspeed_config.prepare_settings(
        f"deepspeed_{way.engine}", source, optim, cpu, mesh.size, validate=False
    )
    found = zero_memory.plan_zero_memory(source, optim, cpu, mesh, settings, pack, free)
    return found, zero_memory.zero_state_parts(source, optim, cpu, mesh.size, settings, found.summing)


def _device(work: Workload) -> torch.device:
    """Where the optimizer's state is known without a GPU: AdamW's and Muon's forms; others are tried on the CPU."""
    known = work.optim.muon or work.optim.state_form(torch.device("cuda")) is not None
    return torch.device("cuda" if known else "cpu")


def extra_squares(work: Workload, mesh: Mesh, times: EstimatedTimes) -> float:
    """By how much the slowest rank's Σ len² exceeds the mean, as packs are dealt."""
    packs = work.optim.accumulative_counts
    if mesh.dp_size == 1 or len(work.costs) == 1:
        return 0.0
    pair = (times.attention_ms(1e9) - times.attention_ms(0)) / 1e9
    fixed = (times.products + times.elementwise + times.attention_ms(0)) / packs
    share = _waiting(work.costs.tobytes(), mesh.dp_size, packs, work.balance, fixed / pair * mesh.cp)
    mean = fixed / pair * packs + times.squares
    return share / (1 - share) * mean


@functools.lru_cache
def _waiting(costs: bytes, ranks: int, packs: int, window: int, fixed: float) -> float:
    """Share of an iteration that the mean rank waits, over drawn packs, which cost `fixed` and their Σ len²."""
    drawn = np.random.RandomState(0).choice(np.frombuffer(costs), ranks * packs * max(window, 1) * WINDOWS)
    return balance.waiting_share(drawn, lambda found: fixed + found, ranks, packs, window)


def forecast_all(work: Workload, cluster: Cluster, gpus: int) -> list[Forecast]:
    """All ways on that number of GPUs, the fastest that fits first, those that do not fit last."""
    if work.source.products != "own" and not cluster.kind.fp8:
        raise ConfigError(
            f"{cluster.kind.title} does not have the products in fp8 that training needs",
            where="model.products; --gpu",
            do="leave products out, or give a Hopper GPU",
        )
    found = [forecast(work, way, cluster, gpus) for way in list_ways(work, gpus)]
    return sorted(found, key=lambda f: (not f.fits, -f.tokens_per_s))


def fewest_gpus(work: Workload, cluster: Cluster, more_than: int) -> int | None:
    """The first of twice, four times, … as many GPUs on which a way fits."""
    counts = (more_than * 2**i for i in range(1, MAX_GPUS.bit_length()) if more_than * 2**i <= MAX_GPUS)
    return next((n for n in counts if any(f.fits for f in forecast_all(work, cluster, n))), None)


def what_would_fit(work: Workload, cluster: Cluster, gpus: int) -> list[str]:
    """Changes with which the workload fits, each alone."""
    advice = []
    if work.optim.states.name != "8bit" and work.optim.state_form(torch.device("cuda")) and not work.optim.muon:
        leaner = replace(work, optim=work.optim.with_states("8bit"))
        if any(f.fits for f in forecast_all(leaner, cluster, gpus)):
            advice.append('optim_wrapper.states = "8bit"')
    if more := fewest_gpus(work, cluster, gpus):
        advice.append(f"{more} GPUs")
    if work.is_long or work.pack > memory.MIN_MICRO_BATCH:
        length = work.pack // 2
        while length >= memory.MIN_MICRO_BATCH:
            document = min(work.document, length) if length > memory.USUAL_PACK else 0
            shorter = replace(work, pack=length, document=document)
            if any(f.fits for f in forecast_all(shorter, cluster, gpus)):
                advice.append(f"packs of {length:,} tokens")
                break
            length //= 2
    return advice
