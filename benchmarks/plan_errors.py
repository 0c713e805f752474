"""What `xtuner plan` predicts, next to what was measured here and what others published. No GPU is needed.

Our own figures are those of docs/performance.md, with the Σ len² that their MFU implies. Others' are of their own
software: the plan is for ours on the same shapes, tokens and network, so that mainly the scaling compares.
"""

import argparse
import copy
import functools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from benchlib.workloads import SHAPES

from xtuner.engine.gpu_kinds import KINDS
from xtuner.model import from_scratch
from xtuner.model.flops import matmul_parameters
from xtuner.optim.optim_wrapper import OptimWrapper
from xtuner.train.forecast.forecast import Cluster, Forecast, Way, forecast
from xtuner.train.forecast.workload import Workload, assume_packs

K = 1024


@dataclass(frozen=True)
class Measured:
    """A row of docs/performance.md; `mfu` says which Σ len² its packs had."""

    name: str
    gpu: str
    gpus: int
    way: Way
    shape: str
    states: str
    tokens_per_s: float
    mfu: float
    pack: int = 32 * K
    document: int = 0
    products: str = "own"


OWN, FULL = Way("fsdp"), Way("fsdp", "full")
MEASURED = (
    Measured("one H100, 7B, 8-bit state", "h100", 1, OWN, "7b", "8bit", 12_618, 0.597),
    Measured("one H100, 7B, products in fp8", "h100", 1, OWN, "7b", "8bit", 15_667, 0.726, products="fp8"),
    Measured("one H100, 7B, one 32k document", "h100", 1, OWN, "7b", "8bit", 7_363, 0.520),
    Measured("one H100, 1.8B", "h100", 1, OWN, "1.8b", "fp32", 48_495, 0.542),
    Measured("one H100, 1.8B, products in fp8", "h100", 1, OWN, "1.8b", "fp32", 57_152, 0.630, products="fp8"),
    Measured("one H100, 1.8B, one 32k document", "h100", 1, OWN, "1.8b", "fp32", 26_691, 0.536),
    Measured("4 H100, 7B", "h100", 4, FULL, "7b", "fp32", 12_077, 0.567),
    Measured("4 H100, 7B, products in fp8", "h100", 4, FULL, "7b", "fp32", 14_460, 0.680, products="fp8"),
    Measured("4 H100, 7B, ZeRO-1", "h100", 4, Way("zero1"), "7b", "fp32", 11_600, 0.549),
    Measured("4 H100, 7B, ZeRO-2", "h100", 4, Way("zero2"), "7b", "fp32", 10_556, 0.497),
    Measured("4 H100, 7B, ZeRO-3", "h100", 4, Way("zero3"), "7b", "fp32", 10_226, 0.480),
    Measured("4 H100, 1.8B", "h100", 4, FULL, "1.8b", "fp32", 47_014, 0.527),
    Measured("4 H100, 1.8B, ZeRO-1", "h100", 4, Way("zero1"), "1.8b", "fp32", 45_056, 0.505),
    Measured("4 H100, 1.8B, ZeRO-3", "h100", 4, Way("zero3"), "1.8b", "fp32", 43_361, 0.487),
    Measured("4 H100, 20B, 8-bit state", "h100", 4, FULL, "20b", "8bit", 4_246, 0.517),
    Measured("4 H200, 7B", "h200", 4, FULL, "7b", "fp32", 12_533, 0.5875),
    Measured("4 H200, 7B, products in fp8", "h200", 4, FULL, "7b", "fp32", 15_910, 0.746, products="fp8"),
    Measured("4 H200, 1.8B", "h200", 4, FULL, "1.8b", "fp32", 47_682, 0.531),
    Measured("4 H200, 1.8B, ZeRO-1", "h200", 4, Way("zero1"), "1.8b", "fp32", 45_716, 0.513),
    Measured("4 H100, 7B, 8-bit state", "h100", 4, FULL, "7b", "8bit", 12_615, 0.589),
    Measured("4 H100, 7B, 8-bit state, one 128k document shared by 4", "h100", 4, Way("fsdp", "full", 4), "7b", "8bit",
             3_341, 0.497, 128 * K, 128 * K),
    Measured("4 H100, 7B, 8-bit state, one 256k document shared by 4", "h100", 4, Way("fsdp", "full", 4), "7b", "8bit",
             1_977, 0.500, 256 * K, 256 * K),
    Measured("4 H100, 7B, 8-bit state, short documents in packs of 128k shared by 4", "h100", 4, Way("fsdp", "full", 4),
             "7b", "8bit", 11_831, 0.547, 128 * K),
)  # fmt: skip


@dataclass(frozen=True)
class Published:
    """Tokens per second and GPU by others, by number of GPUs; a rank has `packs` packs in documents of `length`."""

    name: str
    gpu: str
    network: float  # Gbit/s a GPU between nodes
    way: Way
    shape: dict[str, Any]
    pack: int
    packs: int
    length: int
    found: dict[int, float]
    sums: str | None = None


def llama(hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, vocabulary: int) -> dict[str, Any]:
    return dict(
        family="llama", vocab_size=vocabulary, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads,
    )  # fmt: skip


INTERNLM = llama(4096, 32, 32, 32, 11008, 103_168)
MPT = llama(4096, 32, 32, 32, 10923, 50_432)  # its two matrices of 4 × hidden have as many weights
LLAMA = llama(4096, 32, 32, 8, 14336, 128_256)
COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024)
TGS = (4078, 3939, 3919, 3944, 3928, 3920, 3835, 3625), (4062, 3842, 3752, 3690, 3571, 3209, 2861, 2271)
PUBLISHED = (
    Published("InternEvo 7B, state sharded over each node", "a100", 50, Way("fsdp", "hybrid"), INTERNLM, 4 * K, 4,
              2 * K, dict(zip(COUNTS, TGS[0], strict=True)), "bf16"),
    Published("InternEvo 7B, state sharded over all", "a100", 50, Way("zero1"), INTERNLM, 4 * K, 4, 2 * K,
              dict(zip(COUNTS, TGS[1], strict=True))),
    Published("llm-foundry 7B", "h100", 400, FULL, MPT, 12 * K, 1, 2 * K, {8: 10_643, 512: 0.909 * 10_643}),
    Published("torchtitan 8B (500 W, 2.4 TB/s)", "h100", 400, FULL, LLAMA, 16 * K, 1, 8 * K, {8: 6_667, 128: 6_514}),
)  # fmt: skip


@functools.cache
def predict_measured(row: Measured) -> Forecast:
    source = from_scratch(**SHAPES[row.shape].fields(), activation_checkpointing=True, products=row.products)  # type: ignore[arg-type]
    c, peak = source.config, KINDS[row.gpu].flops
    pairs = (row.mfu * peak / row.tokens_per_s - 6 * matmul_parameters(c)) / (6 * c.num_layers * c.query_width)
    costs = assume_packs(32 * K)[0] if row.pack <= 32 * K else np.full(1, 1.0)
    if (row.shape == "7b" and row.mfu == 0.520) or row.mfu == 0.536:
        costs = np.full(1, 1.0)  # each pack is one document
    optim = OptimWrapper(dict(type=torch.optim.AdamW, lr=1), dtype="bf16", states=row.states)
    work = Workload(source, optim, row.pack, row.document, costs * pairs * row.pack / costs.mean(), None, 1, 1, "")
    return forecast(work, row.way, Cluster(KINDS[row.gpu]), row.gpus)


def predict_published(row: Published) -> dict[int, Forecast]:
    source = from_scratch(**row.shape, activation_checkpointing=True)
    optim = OptimWrapper(dict(type=torch.optim.AdamW, lr=1), dtype="bf16", accumulative_counts=row.packs, sums=row.sums)
    work = Workload(source, optim, row.pack, 0, np.full(1, float(row.pack * row.length)), None, 1, 1, "")
    cluster = Cluster(KINDS[row.gpu], row.network * 1e9 / 8)
    alone = replace(row.way, fsdp="full") if row.way.fsdp == "hybrid" else row.way  # on one node
    return {n: forecast(copy.copy(work), row.way if n > 8 else alone, cluster, n) for n in row.found}


def error(predicted: float, measured: float) -> str:
    return f"{100 * (predicted / measured - 1):+.1f} %".replace("-", "−")


def measured_table() -> str:
    lines = ["| measured here | tok/s/GPU | predicted | off |", "|---|---|---|---|"]
    for row in MEASURED:
        found = predict_measured(row).tokens_per_s
        lines.append(f"| {row.name} | {row.tokens_per_s:,.0f} | {found:,.0f} | {error(found, row.tokens_per_s)} |")
    return "\n".join(lines)


def published_table() -> str:
    lines = [
        "| published | GPUs | tok/s/GPU | predicted for ours | off | scaling | predicted | off |",
        f"|{'---|' * 8}",
    ]
    for row in PUBLISHED:
        found = predict_published(row)
        first = min(row.found)
        for n, speed in row.found.items():
            ours, share = found[n].tokens_per_s, speed / row.found[first]
            scaled = ours / found[first].tokens_per_s
            lines.append(
                f"| {row.name} | {n:,} | {speed:,.0f} | {ours:,.0f} | {error(ours, speed)} "
                f"| {share:.1%} | {scaled:.1%} | {error(scaled, share)} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    print(f"{measured_table()}\n\n{published_table()}")


if __name__ == "__main__":
    main()
