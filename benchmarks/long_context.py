"""Long documents: `xtuner train` with one document a pack, shared by all GPUs, and mixed with short ones.

    python benchmarks/long_context.py                       # every run that this host's GPUs allow
    python benchmarks/long_context.py 128k 256k --gpus 4    # some of them
    python benchmarks/long_context.py --tiny                # lengths of 512 on two CPU processes; measures nothing

    128k 256k 512k 1m    one document of that length a pack, all parameters of 7B, shared by all GPUs
    256k-alone 384k-alone    the same on one GPU
    long short mixed     packs of one 128k document; of documents of lognormal lengths (median 700), 128k tokens; of
                         both. The sum of the first two times over the third is what mixing costs
    128k-torchtitan 256k-torchtitan    torchtitan's context parallelism on the packs of the first two, with fp32 state
    own-packs shared-packs    short documents in packs of 32,768: one pack a GPU, or as many packs, each shared by all

From 256k on, three iterations are run and the first is not counted. Each run is appended to `--results` as one JSON
line; then all are printed as a table. MFU counts the causal pairs inside documents (xtuner/model/flops.py).
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchlib.gpu_memory import read_most_in_use
from benchlib.multi_gpu.bandwidth import OFF
from benchlib.workloads import (
    MEDIAN,
    PACK,
    SHAPES,
    Case,
    add_to_python_path,
    describe_machine,
    draw_documents,
    draw_documents_of,
)
from benchlib.xtuner_training import hold_memory, read_metrics, render_config, run_until, train_command

from xtuner.data.format.writer import write_bin

K = 1024
LONG = 128 * K


@dataclass(frozen=True)
class Job:
    """
    Args:
        pack: its tokens.
        long: tokens of the first document of every pack; 0 for none. Short documents follow.
        alone: on one GPU.
        shared: all GPUs share each pack; else each has its own.
        packs: per iteration, None for one a GPU.
        peer: torchtitan trains (benchlib/peers/shared_packs.py).
    """

    pack: int
    long: int = 0
    alone: bool = False
    shared: bool = True
    packs: int | None = 1
    peer: bool = False

    @property
    def iterations(self) -> int:
        return 3 if self.long >= 256 * K else 8

    @property
    def warm(self) -> int:
        return 1 if self.long >= 256 * K else 3


JOBS = {f"{n}k": Job(n * K, n * K) for n in (128, 256, 512)} | {
    "1m": Job(1024 * K, 1024 * K),
    "256k-alone": Job(256 * K, 256 * K, alone=True),
    "384k-alone": Job(384 * K, 384 * K, alone=True),
    "long": Job(LONG, LONG),
    "short": Job(LONG),
    "mixed": Job(2 * LONG, LONG),
    "128k-torchtitan": Job(128 * K, 128 * K, peer=True),
    "256k-torchtitan": Job(256 * K, 256 * K, peer=True),
    "own-packs": Job(PACK, shared=False, packs=None),
    "shared-packs": Job(PACK, packs=None),
}


def write_packs(folder: Path, job: Job, packs: int, vocabulary: int, scale: int) -> None:
    """Every pack begins with its long document, if any; short ones fill it."""
    for i in range(packs):
        texts = draw_documents_of([job.long // scale] * bool(job.long), vocabulary)
        left = (job.pack - job.long) // scale
        if left:
            texts += draw_documents(left, vocabulary, max(MEDIAN // scale, 2), left, i)
            texts[-1] = texts[-1][: len(texts[-1]) - (sum(map(len, texts)) - job.pack // scale)]
        write_bin(folder / f"pack_{i}.bin", [text for text in texts if text])


def measure(name: str, a: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run one job. Returns its record, with `failed` if it ended before its last iteration."""
    job, scale = JOBS[name], 256 if a.tiny else 1
    shape = "tiny" if a.tiny else a.shape
    gpus = 1 if job.alone else a.gpus
    packs = job.packs or gpus
    place = folder / name
    write_packs(place / "data", job, packs * (job.iterations + 1), SHAPES[shape].vocabulary, scale)
    if job.peer:
        return measure_peer(name, job, a, place)
    config, work = place / "config.py", place / "work"
    config.write_text(render_config(Case(name, shape, a.states), place / "data", None, 0, place))
    words = train_command(config, work, "fsdp" if gpus > 1 else "single")
    sharers = gpus if job.shared else 1
    options = {
        "max_length": job.pack // scale,
        "sequence_parallel_size": sharers,
        "accumulative_counts": packs * sharers // gpus,
        "save_optimizer": False,
        "max_epochs": 1,
        "warm_up_ratio": 0.5,
        "default_hooks.logger.interval": 1,
        **({"model.products": a.products} if a.products else {}),
    }
    words += ["--cfg-options", *(f"{key}={value}" for key, value in options.items()), *a.option]
    environ = add_to_python_path({**os.environ, **OFF, "NPROC_PER_NODE": str(gpus)})
    environ |= {"CUDA_VISIBLE_DEVICES": ""} if a.tiny else {}
    begin = time.monotonic()
    with hold_memory(a.memory, gpus) as held:
        ended = run_until(words, job.iterations, place / "log", environ, deadline=begin + a.limit)
    record = {"job": name, "shape": shape, "gpus": gpus, "states": a.states, "products": a.products or "own"}
    record |= {"date": time.strftime("%Y-%m-%d"), "expected": ended.expected, "first": ended.first}
    record |= {"limited": f"{a.memory:g}G" if a.memory else None, **describe_machine()}
    if ended.iteration < job.iterations:
        said = re.findall(r"xtuner: (.*)", (place / "log").read_text())
        return {**record, "failed": (ended.short or said or [ended.last.strip()])[0]}
    found = read_metrics(work, job.warm, job.iterations)
    lines = next(work.glob("*/vis_data/scalars.json")).read_text().splitlines()
    times = [json.loads(line)["time"] for line in lines][job.warm : job.iterations]
    return record | {
        "tokens_per_s": found["tokens_per_s"] / gpus,
        "mfu": found["mfu"],
        "seconds": sorted(times)[len(times) // 2],
        "times": times,
        "losses": found["losses"],
        "in_use": (read_most_in_use(place) or held) - held,
    }


def measure_peer(name: str, job: Job, a: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Run a job by torchtitan, on packs that are written in `place`."""
    record = {"job": name, "shape": a.shape, "gpus": a.gpus, "states": "fp32", "products": "own"}
    record |= {"date": time.strftime("%Y-%m-%d"), "expected": "", **describe_machine()}
    if importlib.util.find_spec("torchtitan") is None:
        return record | {"failed": "torchtitan is not installed (benchlib/peers/torchtitan_model.py)"}
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(a.gpus)]
    words += ["-m", "benchlib.peers.shared_packs", str(place / "data"), str(job.pack), a.shape]
    words += [str(job.iterations), str(job.warm), str(place / "result.json")]
    environ = add_to_python_path({**os.environ, **OFF})
    with open(place / "log", "w") as log:
        try:
            subprocess.run(words, env=environ, stdout=log, stderr=subprocess.STDOUT, timeout=a.limit, check=True)
        except subprocess.TimeoutExpired:
            return record | {"failed": f"not done in {a.limit:.0f} s"}
        except subprocess.CalledProcessError:
            errors = re.findall(r"^.*Error: .*$", (place / "log").read_text(), re.MULTILINE)
            return record | {"failed": errors[0].strip() if errors else "see its log"}
    return record | json.loads((place / "result.json").read_text())


def table(records: list[dict[str, Any]]) -> str:
    lines = ["| run | GPUs | tok/s/GPU | MFU | s an iteration | GiB in use (expected) |", "|---|---|---|---|---|---|"]
    for r in records:
        name = ", ".join(filter(None, (r["job"], r["shape"], r["states"], r["products"], r.get("limited"))))
        if "failed" in r:
            lines.append(f"| {name} | {r['gpus']} | failed: {r['failed'][:200]} | | | |")
            continue
        expected = re.search(r"peak ([\d.]+ \w+)", r["expected"])
        used = f"{r['in_use'] / 2**30:.1f}" if r["in_use"] else "–"
        mfu = f"{r['mfu']:.3f}" if r["mfu"] else "–"
        lines.append(
            f"| {name} | {r['gpus']} | {r['tokens_per_s']:,.0f} | {mfu} | {r['seconds']:.2f} "
            f"| {used} ({expected[1] if expected else '–'}) |"
        )
    last = {r["job"]: r["seconds"] for r in records if "failed" not in r}
    if {"long", "short", "mixed"} <= last.keys():
        lines.append(f"\nLong and short documents in one pack: {(last['long'] + last['short']) / last['mixed']:.3f} of "
                     "the speed of each alone")  # fmt: skip
    if {"own-packs", "shared-packs"} <= last.keys():
        lines.append(f"\nPacks of short documents shared by all GPUs: {last['own-packs'] / last['shared-packs']:.3f} "
                     "of the speed of one pack a GPU")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", metavar="RUN", help=f"{', '.join(JOBS)}; all without one")
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--shape", choices=["1.8b", "7b", "20b"], default="7b")
    parser.add_argument("--states", default="8bit", help="form of AdamW's state")
    parser.add_argument("--products", choices=["own", "fp8"])
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="of the config; repeatable")
    parser.add_argument("--limit", type=float, default=600, help="seconds after which a run is stopped")
    parser.add_argument("--memory", type=float, metavar="GIB", help="occupy the rest of each GPU, as if smaller")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/long_context.jsonl"))
    parser.add_argument("--tiny", action="store_true", help="short documents on two CPU processes; not recorded")
    a = parser.parse_args()
    if unknown := [name for name in a.jobs if name not in JOBS]:
        parser.error(f"no run is called {unknown[0]}; there are {', '.join(JOBS)}")
    if a.tiny:
        if any(JOBS[name].peer for name in a.jobs):
            parser.error("torchtitan's shared attention does not run on CPUs")
        a.states, a.gpus, a.memory = "fp32", 2, None
    records = []
    with tempfile.TemporaryDirectory(prefix="xtuner-bench-") as folder:
        for name in a.jobs or [name for name, job in JOBS.items() if not (a.tiny and job.peer)]:
            records.append(measure(name, a, Path(folder)))
            if not a.tiny:
                with open(a.results, "a") as f:
                    f.write(json.dumps(records[-1]) + "\n")
            print(json.dumps({k: v for k, v in records[-1].items() if k not in ("losses", "times")}), flush=True)
    print(table(records))


if __name__ == "__main__":
    main()
