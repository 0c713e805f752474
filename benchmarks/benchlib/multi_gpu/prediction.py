"""Speed on several GPUs of one host, predicted from the times of one GPU (single_gpu_times.py). All terms are printed.

The arithmetic is xtuner/engine/prediction.py. Each rank takes one pack per iteration (accumulative_counts = 1, where
collectives have the largest share).
"""

from dataclasses import dataclass

import torch
from benchlib.multi_gpu.single_gpu_times import GIB, MACHINES, MODELS, Machine, Measured
from benchlib.multi_gpu.waiting_time import Floats
from benchlib.workloads import PACK

from xtuner.dist.mesh import Mesh
from xtuner.engine import memory
from xtuner.engine.prediction import (
    TERMS,
    Interconnect,
    PlannedIteration,
    Traffic,
    predict_iteration,
    sharded_traffic,
    zero_traffic,
)
from xtuner.engine.zero import deepspeed_config, zero_memory
from xtuner.model.flops import PEAK, training_flops
from xtuner.optim.optim_wrapper import OptimWrapper

__all__ = ["ENGINES", "Interconnect", "Traffic", "plan_memory", "predict", "sharded_traffic", "table", "zero_traffic"]
ENGINES = ("fsdp", "zero1", "zero2", "zero3")


def plan_memory(m: Measured, engine: str, ranks: int, free: float) -> PlannedIteration | None:
    """None if it does not fit."""
    optim, mesh = OptimWrapper(dict(type=torch.optim.AdamW, lr=1), dtype="bf16"), Mesh(dp_shard=ranks, local_size=ranks)
    found: memory.MemoryPlan
    if engine == "fsdp":
        found = memory.plan_memory(m.source, optim, torch.device("cuda"), mesh, PACK, int(free))
    else:  # AdamW has the same states on a CPU, so that no GPU is needed
        settings = deepspeed_config.prepare_settings(f"deepspeed_{engine}", m.source, optim, torch.device("cpu"), ranks)
        found = zero_memory.plan_zero_memory(m.source, optim, torch.device("cpu"), mesh, settings, PACK, int(free))
    assert found.max_tokens
    there = PlannedIteration(found, -(-PACK // found.max_tokens), PACK, mesh=mesh)
    return there if found.fits(found.micro_batch_tokens(PACK)) else None


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
    each = squares[: len(squares) // ranks * ranks].reshape(-1, ranks)
    slowest, usual = float(each.max(axis=1).mean()), float(squares.mean())
    terms, sent = predict_iteration(m, there, engine, links, usual, slowest, machine.slower)
    ms = sum(terms.values())
    flops = training_flops(m.source.config, PACK, int(squares.mean()))
    peak = there.plan.peak_bytes(PACK, longest=0)
    return Prediction(terms, sent, 1000 * PACK / ms, flops / (ms / 1000 * PEAK["H100"]), peak)


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
