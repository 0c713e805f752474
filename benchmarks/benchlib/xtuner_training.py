"""Runs `xtuner train` with a shipped config in a process of its own, and reads its metrics."""

import argparse
import json
import math
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from benchlib.command_output import stream_lines
from benchlib.gpu_memory import read_most_in_use
from benchlib.workloads import PACKS, SHAPES, TINY_PACK, Case, add_to_python_path

from xtuner.config.load import SHIPPED

ENGINES = ("single", "zero1", "zero2", "zero3", "fsdp")


def render_config(case: Case, data: Path, tokenizer: str | None, profile: int, counted: Path | None = None) -> str:
    """The shipped config with random weights of its shape, otherwise unchanged.

    Args:
        profile: the iteration that is timed by part; 0 for none.
        counted: where ranks write their use of GPU memory (gpu_memory.py); needs `add_to_python_path`, as a case with
            `terms` does.
    """
    text = (SHIPPED / f"internlm2_{SHAPES[case.shape].template}_w_tokenized_dataset.py").read_text()
    source, fields = "from_scratch", SHAPES[case.shape].fields()
    if case.terms:
        source, terms = "from_scratch_with_adapter", case.terms
        fields |= dict(frozen_weights=terms.weights, rank=terms.rank, alpha=terms.alpha, targets=terms.TARGETS)
    shape = ", ".join(f"{key}={value!r}" for key, value in fields.items())
    text = re.sub(r"(?s)\nmodel = dict\(.*?\n\)\n", f"\nmodel = dict(type={source}, {shape}, seed=0,\n"
                  "    activation_checkpointing=True)\n", text)  # fmt: skip
    module = "benchlib.random_base" if case.terms else "xtuner.model"
    text = text.replace("from xtuner.model import from_pretrained", f"from {module} import {source}")
    text = re.sub(r"\nmax_length = \d+", f"\nmax_length = {case.pack}", text)
    text = text.replace("/path/to/your/dataset", str(data))
    text = text.replace('\nstates = "fp32"', f'\nstates = "{case.states}"')
    if tokenizer:
        text = re.sub(r'pretrained_model_name_or_path = ".*"', f'pretrained_model_name_or_path = "{tokenizer}"', text)
    else:  # the two hooks that need one
        text = re.sub(r"(?s)\n    dict\(type=DatasetInfoHook.*?\),\n", "\n", text)
        text = re.sub(r"(?s)\n    dict\(\n        type=EvaluateChatHook.*?\n    \),\n", "\n", text)
    if counted:
        text += "\nfrom benchlib.gpu_memory import GpuMemoryHook\n"
        text += f'custom_hooks.append(dict(type=GpuMemoryHook, folder="{counted}"))\n'
    if profile:
        text += "\nfrom xtuner.train.reporting.profile import ProfileHook\n"
        text += f"custom_hooks.append(dict(type=ProfileHook, begin={profile}, iterations=2))\n"
    return text


def train_command(config: Path, work: Path, engine: str) -> list[str]:
    """The command line of `xtuner train`. Engines: single, zero1, zero2, zero3, fsdp."""
    words = [sys.executable, "-m", "xtuner.cli.main", "train", str(config), "--work-dir", str(work)]
    return words + {"single": [], "fsdp": ["--fsdp", "full"]}.get(engine, ["--deepspeed", f"deepspeed_{engine}"])


@dataclass
class TrainingOutput:
    """What a run has logged: seconds to its first iteration, expected memory, last iteration, last line, lines about
    exhausted memory."""

    first: float | None = None
    expected: str = ""
    iteration: int = 0
    last: str = ""
    short: list[str] = field(default_factory=list)


def run_until(
    words: list[str],
    iterations: int,
    log: Path,
    environ: Mapping[str, str] = os.environ,
    echo: bool = False,
    deadline: float = math.inf,
) -> TrainingOutput:
    """Run `xtuner train` for that number of iterations; its output goes to `log`."""
    found = TrainingOutput()
    with open(log, "w") as f:
        for seconds, found.last in stream_lines(words, rf"iter +{iterations}/", environ, deadline):
            f.write(found.last)
            if echo:
                print(found.last, end="", flush=True)
            if at := re.search(r"iter +(\d+)/", found.last):
                found.iteration = int(at[1])
                found.first = found.first or seconds
            if expected := re.search(r"memory: .*", found.last):
                found.expected = expected[0]
            if (
                re.search(r"memory ran out|out of memory|OutOfMemory", found.last, re.IGNORECASE)
                and len(found.short) < 9
            ):
                found.short.append(found.last.strip())
    return found


def read_metrics(work: Path, warm: int, last: int) -> dict[str, Any]:
    """Metrics of a run: speeds after the first `warm` iterations; losses and norms of all, up to `last`."""
    (scalars,) = work.glob("*/vis_data/scalars.json")
    every = [json.loads(line) for line in scalars.read_text().splitlines()]
    every = [r for r in every if r["iter"] <= last]  # it may have started another one before it was killed
    records = [r for r in every if r["iter"] > warm]
    return {
        "tokens_per_s": statistics.median(r["tokens_per_s"] for r in records),
        "mean": statistics.harmonic_mean([r["tokens_per_s"] for r in records]),
        "spread": [min(r["tokens_per_s"] for r in records), max(r["tokens_per_s"] for r in records)],
        "mfu": statistics.median(r["mfu"] for r in records) if "mfu" in records[0] else None,
        "memory": max(r["memory"] for r in records),
        "data_time": max(r["data_time"] for r in records),
        "losses": [r["loss"] for r in every],
        "norms": [r["grad_norm"] for r in every],
    }


@contextmanager
def hold_memory(left: float | None, gpus: int = 1) -> Iterator[int]:
    """Allocate all of the first GPUs but `left` GiB each, as if they were smaller ones; yields the bytes in use on one.
    None: nothing."""
    if left is None:
        yield 0
        return
    held, used = [], []
    for device in range(gpus):
        free, total = torch.cuda.mem_get_info(device)
        held.append(torch.empty(max(free - int(left * 2**30), 0), dtype=torch.uint8, device=device))
        free, total = torch.cuda.mem_get_info(device)
        used.append(total - free)
        print(f"{free / 2**30:.2f} GiB of GPU {device} are left", flush=True)
    yield max(used)
    del held


def measure(case: Case, a: argparse.Namespace) -> dict[str, Any]:
    """Run `xtuner train` on a case for the requested iterations. Returns a row of the table."""
    if a.tiny:
        case = replace(case, shape="tiny", pack=TINY_PACK)
    elif not torch.cuda.is_available():
        raise SystemExit("these models need a GPU; --tiny tries a small one on a CPU")
    chosen = {"attention": a.attention, "products": a.products}
    chosen = {name: value for name, value in chosen.items() if value}
    engine = " ".join([a.engine, *chosen.values()])
    folder = Path(a.folder or tempfile.mkdtemp(prefix="xtuner-bench-")) / f"{case.name}-{engine.replace(' ', '-')}"
    folder.mkdir(parents=True, exist_ok=True)
    case.write_data(folder / "data", PACKS, SHAPES[case.shape].vocabulary if a.tiny else 0)
    last = a.iterations - (3 if a.profile else 0)
    config = folder / "config.py"
    config.write_text(render_config(case, folder / "data", a.tokenizer, last + 1 if a.profile else 0, folder))
    words = train_command(config, folder / "work", a.engine)
    words += ["--cfg-options", *(f"model.{name}={value}" for name, value in chosen.items())] if chosen else []
    with hold_memory(a.memory) as held:
        ended = run_until(words, a.iterations, folder / "log", add_to_python_path(os.environ), echo=True)
    used = read_most_in_use(folder)
    if ended.first is None:
        raise SystemExit(f"{case.name} did not reach its first iteration; see {folder / 'log'}")
    profiles = list((folder / "work").glob("*/profile.json"))
    return {
        "engine": engine,
        **read_metrics(folder / "work", a.warm, last),
        "in_use": None if a.tiny or used is None else used - held,
        "first": ended.first,
        "expected": ended.expected,
        "profile": json.loads(profiles[0].read_text())["parts"] if profiles else None,
    }
