"""Peers on several GPUs of one host, on the packs of `xtuner train`, compared with the results of `xtuner_runs.py`.

One process per GPU takes pack order[i · N + rank] in iteration i and runs the loop of peers/training_loop.py with
state sharded by FSDP2, with our learning rates and initial weights: losses must equal ours. If a peer exceeds LIMIT or
loses a rank, all its processes are ended; one that ran out of memory or exceeded LIMIT is not repeated.
"""

import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from benchlib.gpu_memory import in_use
from benchlib.multi_gpu import xtuner_runs
from benchlib.multi_gpu.bandwidth import OFF
from benchlib.peers.training_loop import LR, Loop, Settings, build
from benchlib.workloads import PACK, SHAPES, add_to_python_path, packs_in_training_order

from xtuner.data.loading.batch import Batch
from xtuner.engine import CosineAnnealingLR, LinearLR
from xtuner.model.flops import peak_flops, training_flops
from xtuner.optim.schedule import Schedule

Record = dict[str, Any]
PACKAGES = {"hf": "transformers", "hf-liger": "liger_kernel", "torchtitan": "torchtitan"}
LIMIT = 300.0  # s for one peer, compilers included
LATE = "not done in {:.0f} s"
ENOUGH = 1.2  # required speed relative to the best peer
# Recomputation modes tried on GPUs; (torchtitan, 7b): the second is faster, but may run out of memory
CHOICES = {
    ("torchtitan", "1.8b"): ("selective", "full"),
    ("torchtitan", "7b"): ("full", "selective", "budget-0.3"),
    ("hf-liger", "1.8b"): ("full", "none"),
    ("hf-liger", "7b"): ("full", "none"),
}


class PeerJob(NamedTuple):
    engine: str
    shape: str
    recompute: str
    gpus: int
    data: str = "usual"  # see `xtuner_runs.data`

    @property
    def name(self) -> str:
        return f"{self.shape}-{self.engine}-{self.recompute}-{self.gpus}" + f"-{self.data}" * (self.data != "usual")


def jobs(gpus: int, shapes: Sequence[str]) -> list[PeerJob]:
    """The most promising mode of each first. On CPUs torchtitan needs packs of one document, and Liger does not run."""
    if list(shapes) == ["tiny"]:
        tiny = [("hf", "full", "usual"), ("hf", "none", "long"), ("torchtitan", "selective", "long")]
        return [PeerJob(engine, "tiny", recompute, gpus, data) for engine, recompute, data in tiny]
    found = [
        PeerJob(engine, shape, recompute, gpus)
        for i in range(max(map(len, CHOICES.values())))
        for (engine, shape), tried in CHOICES.items()
        if shape in shapes
        for recompute in tried[i : i + 1]
    ]
    return found


def run(chosen: Sequence[PeerJob], results: Path, folder: Path, tiny: bool, deadline: float) -> int:
    """Run the jobs that are not in `results` yet in turn. Returns the number of failures other than lack of memory."""
    final = (None, LATE.format(LIMIT))
    done = {PeerJob(*r["job"]) for r in xtuner_runs.read(results) if r.get("failed") in final or r.get("out_of_memory")}
    failed = 0
    for job in chosen:
        if job in done:
            continue
        if importlib.util.find_spec(PACKAGES[job.engine]) is None:
            print(f"{job.name}: skipped, {PACKAGES[job.engine]} is not installed", flush=True)
            failed += not tiny
            continue
        left = deadline - time.monotonic()
        if left < 0:
            print(f"{job.name} and later runs are left for another call", flush=True)
            break
        record = measure(job, folder, tiny, min(LIMIT, max(left, 60)))
        with open(results, "a") as f:
            f.write(json.dumps(record) + "\n")
        failed += "failed" in record and not record["out_of_memory"]
    return failed


def measure(job: PeerJob, folder: Path, tiny: bool, limit: float) -> Record:
    """Start one process per GPU. Returns the record of rank 0, or the reason of the failure."""
    data = xtuner_runs.data(folder, tiny, job.data)
    run_folder = Path(tempfile.mkdtemp(prefix=f"{job.name}-", dir=folder))
    words = [sys.executable, "-m", "benchlib.multi_gpu.peer_runs", json.dumps(job), str(data), str(run_folder)]
    words.append(str(int(tiny)))
    environ = add_to_python_path(os.environ) | OFF | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    environ |= {"CUDA_VISIBLE_DEVICES": ""} if tiny else {}
    begin, ranks, logs = time.monotonic(), [], [run_folder / f"log-{rank}" for rank in range(job.gpus)]
    try:
        for rank, log in enumerate(logs):
            with open(log, "w") as f:
                ranks.append(subprocess.Popen([*words, str(rank)], env=environ, stdout=f, stderr=subprocess.STDOUT))
        while any(rank.poll() is None for rank in ranks) and not any(rank.returncode for rank in ranks):
            if time.monotonic() - begin > limit:
                break
            time.sleep(0.05)
        time.sleep(0 if all(rank.returncode == 0 for rank in ranks) else 1)  # others may have seen more
    finally:
        for rank in ranks:  # the others may wait for a dead one
            rank.kill()
        codes = [rank.wait() for rank in ranks]
    record: Record = {"job": list(job), "tiny": tiny, "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
    record |= {"device": xtuner_runs.device(tiny), "seconds": time.monotonic() - begin}
    if any(codes):
        text = "\n".join(log.read_text() for log in logs)
        why = re.findall(r"^.*(?:Error|error:|SystemExit|benchmarks/\S+ says).*$", text, re.MULTILINE)
        ended = why[0] if why else LATE.format(limit) if max(codes) <= 0 else text.strip()[-300:]
        print(f"{job.name}: failed, see {run_folder}\n  {ended}", flush=True)
        return record | {"failed": ended.strip(), "out_of_memory": "OutOfMemoryError" in text}
    record |= json.loads((run_folder / "found.json").read_text())
    each = record["tokens_per_s"] / job.gpus
    print(f"{job.name}: {each:,.0f} tok/s/GPU, loss {record['losses'][-1]:.4f}", flush=True)
    return record


def worker(job: PeerJob, data: Path, run_folder: Path, tiny: bool, rank: int) -> None:
    """The work of each process; rank 0 writes `found.json`."""
    begin = time.perf_counter()
    device = torch.device("cpu") if tiny else torch.device("cuda", rank)
    if not tiny:
        torch.cuda.set_device(device)
    ranks, length = job.gpus, xtuner_runs.TINY_PACK if tiny else PACK
    dist.init_process_group(
        "gloo" if tiny else "nccl",
        init_method=f"file://{run_folder}/meet",
        rank=rank,
        world_size=ranks,
        device_id=None if tiny else device,
    )
    mesh = dist.init_device_mesh(device.type, (ranks,), mesh_dim_names=("fsdp",))
    shape = SHAPES[job.shape].config
    compute = torch.float32 if tiny else torch.bfloat16
    settings = Settings(job.engine, shape, device, "fp32", job.data == "long", None, job.recompute, compute, mesh)
    packs, order = packs_in_training_order(data, length)
    read = [Batch.from_item(packs[i]) for i in order[: xtuner_runs.ITERATIONS * ranks]]
    iterations = [read[i : i + ranks] for i in range(0, len(read), ranks)]
    peer = build(settings)
    loop, found, first = Loop(peer, settings), [], 0.0
    for iterated in loop.iterate(iterations, rates(len(order), ranks)):
        first = first or time.perf_counter() - begin
        found.append(iterated)
        if len(found) == xtuner_runs.WARM and not tiny:
            torch.cuda.reset_peak_memory_stats()  # forget the autotuning of compilers
    memory = torch.tensor([0 if tiny else torch.cuda.max_memory_allocated(), in_use(device)], device=device)
    dist.all_reduce(memory, dist.ReduceOp.MAX)
    counted, peak = found[xtuner_runs.WARM :], peak_flops(device)
    speeds = [length * ranks / it.seconds for it in counted]
    flops = [
        training_flops(shape, length, sum(pack.attention_pairs for pack in group) // ranks) / it.seconds
        for group, it in zip(iterations[xtuner_runs.WARM :], counted, strict=True)
    ]
    if rank == 0:
        record = {
            "engine": peer.name,
            "versions": peer.versions,
            "tokens_per_s": statistics.median(speeds),
            "mean": statistics.harmonic_mean(speeds),
            "spread": [min(speeds), max(speeds)],
            "mfu": peak and statistics.median(flops) / peak,
            "memory": int(memory[0]),
            "in_use": int(memory[1]),
            "first": first,
            "losses": [it.loss for it in found],
            "norms": [it.norm for it in found],
        }
        (run_folder / "found.json").write_text(json.dumps(record))
    dist.barrier()
    dist.destroy_process_group()


def rates(packs: int, ranks: int) -> list[float]:
    """Learning rates of the shipped configs, for one epoch of that number of packs."""
    last = packs // ranks
    chosen: dict[str, Any] = dict(by_epoch=True, convert_to_iter_based=True)
    warm_up = dict(type=LinearLR, start_factor=1 / 40, begin=0, end=0.025, **chosen)
    falling = dict(type=CosineAnnealingLR, eta_min=LR * 0.15, begin=0.025, end=1, **chosen)
    schedule = Schedule.from_config(LR, [warm_up, falling], last, last)
    return [schedule(i) for i in range(xtuner_runs.ITERATIONS)]


def table(results: Path, of_ours: Path) -> str:
    """Ours and peers by shape, and our speed relative to the best peer."""
    ours = {
        (job.shape, job.gpus): r
        for r in xtuner_runs.read(of_ours)
        if "failed" not in r
        and (job := xtuner_runs.Job(*r["job"])) == xtuner_runs.Job("speed", job.shape, "fsdp", job.gpus, job.gpus)
    }
    latest = {PeerJob(*r["job"]): r for r in xtuner_runs.read(results)}
    lines = [
        "| shape, GPUs | by | tok/s/GPU (from–to) | MFU | GiB by PyTorch, driver | losses differ from ours by |",
        "|---|---|---|---|---|---|",
    ]
    said = []
    for shape, gpus in dict.fromkeys((job.shape, job.gpus) for job in latest):
        mine = ours.get((shape, gpus))
        if mine:
            lines.append(_row(f"{shape}, {gpus}", "ours", gpus, mine, ""))
        theirs = {job: r for job, r in latest.items() if (job.shape, job.gpus) == (shape, gpus)}
        for job, r in theirs.items():
            if "failed" in r:
                why = "out of memory" if r["out_of_memory"] else r["failed"][:80].replace("|", "/")
                lines.append(f"| {shape}, {gpus} | {job.name} | failed: {why} |" + " |" * 3)
                continue
            off = ""
            if mine and job.data == "usual":
                off = f"{max(abs(x - y) for x, y in zip(r['losses'], mine['losses'], strict=False)):.1e}"
            lines.append(_row(f"{shape}, {gpus}", r["engine"] + f" ({job.data})" * (job.data != "usual"), gpus, r, off))
        there = [r for job, r in theirs.items() if "failed" not in r and job.data == "usual"]
        if mine and there:
            best = max(there, key=lambda r: r["tokens_per_s"])
            times = mine["tokens_per_s"] / best["tokens_per_s"]
            verdict = "" if mine["tiny"] else f" ({ENOUGH:g} × required: {'yes' if times >= ENOUGH else 'NO'})"
            said.append(f"{shape}, {gpus} GPUs: ours is {times:.2f} × the best, {best['engine']}{verdict}")
    return "\n".join([*lines, "", *said])


def _row(what: str, by: str, gpus: int, r: Record, off: str) -> str:
    low, high = (speed / gpus / 1e3 for speed in r["spread"])
    cells = [
        what,
        by,
        f"{r['tokens_per_s'] / gpus:,.0f} ({low:.1f}–{high:.1f}k)",
        f"{r['mfu']:.3f}" if r["mfu"] else "",
    ]
    cells.append(f"{r['memory'] / 2**30:.1f}" + (f", {r['in_use'] / 2**30:.1f}" if r.get("in_use") else ""))
    return f"| {' | '.join([*cells, off])} |"


if __name__ == "__main__":
    if len(sys.argv) != 6:
        raise SystemExit("this is one process of `multi_gpu.py peers`")
    given = json.loads(sys.argv[1])
    worker(PeerJob(*given), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4] == "1", int(sys.argv[5]))
