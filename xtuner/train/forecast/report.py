"""Forecasts as text and as JSON."""

import shlex
from collections.abc import Sequence
from typing import Any

from xtuner.core.log import human_bytes
from xtuner.model.flops import num_parameters
from xtuner.train.forecast.forecast import NODE, Cluster, Forecast
from xtuner.train.forecast.workload import Workload

GIB = 2**30
PARTS = ("weights", "gradients", "optimizer", "buffers", "activations", "libraries")


def command(found: Forecast, words: Sequence[str], overrides: Sequence[str], sharers: int | None) -> str:
    """The command line that trains this way.

    Args:
        words: the config.
        overrides: KEY=VALUE of the config.
        sharers: ranks that share a pack by the config; None for "auto".
    """
    options = [*overrides]
    if found.way.sharers != sharers:
        options = [option for option in options if not option.startswith("sequence_parallel_size=")]
        options.append(f"sequence_parallel_size={found.way.sharers}")
    more = [*found.way.options(), *(["--cfg-options", *options] if options else [])]
    train = ["xtuner", "train", *words]
    if found.gpus == 1:
        return shlex.join([*train, *more])
    if found.gpus <= NODE:
        return f"NPROC_PER_NODE={found.gpus} " + shlex.join([*train, *more])
    nodes = -(-found.gpus // NODE)
    start = ["srun", f"--nodes={nodes}", f"--ntasks-per-node={NODE}", f"--gpus-per-node={NODE}"]
    return shlex.join([*start, *train, "--launcher", "slurm", *more])


def describe(work: Workload, cluster: Cluster) -> str:
    """What is planned, in three lines."""
    kind, count = cluster.kind, num_parameters(work.source.config)
    mark = "" if kind.measured else "; estimated: not measured on this kind of GPU"
    lines = [
        f"model     {count / 1e9:.2f} B parameters; {work.optim.describe().split('(')[0]}, states "
        f"{work.optim.states.name}; packs of {work.pack:,} tokens, {work.optim.accumulative_counts} an iteration",
        f"data      {work.data}" + (f"; {work.tokens / 1e9:,.3g} B tokens to train on" if work.tokens else ""),
        f"GPU       {kind.title}, {kind.free / GIB:.1f} GiB free, {NODE} a node, {cluster.network * 8 / 1e9:g} Gbit/s "
        f"a GPU between nodes{mark}",
    ]
    return "\n".join(lines)


def format_ways(rows: Sequence[Forecast]) -> str:
    """Memory a GPU by part, and speed, of each way on the same number of GPUs."""
    width = max(len(row.way.name) for row in rows)
    width = max(width, len(_title(rows[0].gpus)))
    heads = (*PARTS[:4], "activ.", "libr.", "GiB", "micro-batch", "tok/s/GPU", "MFU")
    lines = [f"{_title(rows[0].gpus):<{width}}  " + "  ".join(f"{h:>{max(len(h), 6)}}" for h in heads)]
    for row in rows:
        cells = [f"{row.parts.get(part, 0) / GIB:.1f}" for part in PARTS]
        cells += [f"{row.peak / GIB:.1f}", f"{row.micro_batch:,}"]
        cells += [f"{row.tokens_per_s:,.0f}", f"{row.mfu:.3f}"] if row.fits else ["does not fit", ""]
        text = "  ".join(f"{cell:>{max(len(h), 6)}}" for cell, h in zip(cells, heads, strict=True))
        lines.append(f"{row.way.name:<{width}}  {text}".rstrip())
    return "\n".join(lines)


def _title(gpus: int) -> str:
    return "one GPU" if gpus == 1 else f"{gpus:,} GPUs"


def format_scaling(best: Sequence[Forecast], tokens: float | None) -> str:
    """The fastest way that fits on each number of GPUs."""
    heads = ["GPUs", "tok/s/GPU", "MFU", "scaling", "tokens an iteration", "hours", "GPU-hours"]
    heads = heads[: None if tokens else 5]
    lines = ["  ".join(f"{h:>10}" for h in heads) + "  way"]
    for row in best:
        cells = [f"{row.gpus:,}", f"{row.tokens_per_s:,.0f}", f"{row.mfu:.3f}"]
        cells += [f"{row.tokens_per_s / best[0].tokens_per_s:.1%}", f"{row.iteration:,}"]
        if tokens:
            hours = row.hours(tokens)
            cells += [f"{hours:,.1f}", f"{hours * row.gpus:,.0f}"]
        text = "  ".join(f"{cell:>{max(len(h), 10)}}" for cell, h in zip(cells, heads, strict=True))
        lines.append(f"{text}  {row.way.name}")
    return "\n".join(lines)


def as_json(work: Workload, cluster: Cluster, rows: Sequence[Forecast], commands: dict[int, str]) -> dict[str, Any]:
    """All figures: bytes, ms, tokens per second and GPU."""
    return {
        "parameters": num_parameters(work.source.config),
        "gpu": cluster.kind.name,
        "estimated": not cluster.kind.measured,
        "free": int(cluster.kind.free),
        "data": work.data,
        "tokens": work.tokens,
        "commands": {str(gpus): text for gpus, text in commands.items()},
        "ways": [
            {
                "gpus": row.gpus, "way": row.way.name, "options": row.way.options(), "sharers": row.way.sharers,
                "fits": row.fits, "bytes": {k: int(v) for k, v in row.parts.items()}, "peak": int(row.peak),
                "micro_batch": row.micro_batch, "tokens_an_iteration": row.iteration,
                "ms": row.terms, "tokens_per_s_per_gpu": row.tokens_per_s, "mfu": row.mfu,
                "hours": row.hours(work.tokens) if work.tokens else None,
                "gpu_hours": row.hours(work.tokens) * row.gpus if work.tokens else None,
            }
            for row in rows
        ],
    }  # fmt: skip


def format_fit(gpus: int, cluster: Cluster, least: Forecast, advice: Sequence[str]) -> str:
    """What to say of a number of GPUs on which nothing fits."""
    need = f"{_title(gpus)}: nothing fits; {least.way.name} needs the least, {human_bytes(int(least.peak))} of "
    need += f"{human_bytes(int(cluster.kind.free))} free"
    return need + (
        f". What would fit: {'; or '.join(advice)}" if advice else ". No number of GPUs up to 4,096 would fit"
    )
