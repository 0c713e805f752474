"""Several GPUs of one host: collectives, predicted and measured speed, peers, fault recovery, gain from balancing.

    python benchmarks/multi_gpu.py all                   # everything below on this host's GPUs; results are kept
    python benchmarks/multi_gpu.py bandwidth             # collectives of 1 MiB … 1 GiB, to bandwidth-N.json
    python benchmarks/multi_gpu.py predict               # from one GPU's times: every term, for 2, 4 and 8 GPUs
    python benchmarks/multi_gpu.py run --gpus 1,2,4,8    # `xtuner train` itself, to runs.jsonl; then the table
    python benchmarks/multi_gpu.py peers                 # torchtitan and transformers + Liger on the same packs
    python benchmarks/multi_gpu.py faults                # SIGTERM and N → N/2 → N ranks, SIGKILL, a hanging rank
    python benchmarks/multi_gpu.py balance               # the wait for the slowest rank, the gain from balancing packs

`--only '7b-fsdp-4-speed-4*,7b-torchtitan*'` selects runs of `run` and `peers` by name, in that order; a pattern without
a match lists all names. After --minutes no run starts; the same command continues with the rest.

With --tiny everything runs on two CPU processes in minutes. NVLink multicast is off in all processes
(NCCL_NVLS_ENABLE=0). The modules of benchlib/multi_gpu/ describe the methods.
"""

import argparse
import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

from benchlib.multi_gpu import (
    bandwidth,
    fault_drills,
    peer_runs,
    prediction,
    single_gpu_times,
    waiting_time,
    xtuner_runs,
)

SHAPES = ("1.8b", "7b", "20b")
FOLDER = Path(__file__).parent / "results"


def links(results: Path, gpus: int) -> prediction.Interconnect:
    """Measured on that number of GPUs, or assumed."""
    file = results / f"bandwidth-{gpus}.json"
    found = json.loads(file.read_text()) if file.exists() else None
    return prediction.Interconnect(found if found and found["device"] != "cpu" else None)


def show_bandwidth(a: argparse.Namespace) -> None:
    for gpus in (n for n in a.gpus if n > 1):
        file = a.results / f"bandwidth-{gpus}.json"
        if not file.exists():
            found = bandwidth.measure(gpus, a.tiny)
            file.write_text(json.dumps(found, indent=1) + "\n")
        print(bandwidth.table(json.loads(file.read_text())), flush=True)


def show_prediction(a: argparse.Namespace) -> None:
    """For the real models on any machine, with the packs that `run` uses."""
    squares = xtuner_runs.squares(xtuner_runs.data(a.folder, False), False)
    for gpus in (n for n in a.gpus if n > 1):
        found = links(a.results, gpus)
        how = f"measured on {found.measured['device']}" if found.measured else "assumed"
        print(f"\n{gpus} GPUs, exchange {how}\n\n{prediction.table(found, squares, gpus)}", flush=True)


def show_runs(a: argparse.Namespace, chosen: Sequence[xtuner_runs.Job]) -> int:
    failed = xtuner_runs.run(chosen, a.results / "runs.jsonl", a.folder, a.tiny, a.deadline)
    print(xtuner_runs.table(a.results / "runs.jsonl", a.folder, lambda n: links(a.results, n)), flush=True)
    return failed


def show_peers(a: argparse.Namespace, chosen: Sequence[peer_runs.PeerJob]) -> int:
    """Measures ours first if it is not in the results, so that both are from one machine."""
    ours = dict.fromkeys(xtuner_runs.Job("speed", job.shape, "fsdp", job.gpus, job.gpus) for job in chosen)
    failed = xtuner_runs.run(list(ours), a.results / "runs.jsonl", a.folder, a.tiny, a.deadline)
    failed += peer_runs.run(chosen, a.results / "peers.jsonl", a.folder, a.tiny, a.deadline)
    print(peer_runs.table(a.results / "peers.jsonl", a.results / "runs.jsonl"), flush=True)
    return failed


def show_faults(a: argparse.Namespace) -> int:
    found = fault_drills.drills(a.folder / "faults", a.gpus[-1], a.tiny, a.drills)
    with open(a.results / "faults.jsonl", "a") as f:
        f.writelines(json.dumps(record) + "\n" for record in found)
    return sum(not record["as_promised"] for record in found)


def numbers(text: str) -> list[int]:
    """`1,2,8`, in order."""
    found = sorted({int(part) for part in text.split(",")})
    if found[0] < 1:
        raise ValueError(text)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("all", "bandwidth", "predict", "run", "peers", "faults", "balance"))
    parser.add_argument("--gpus", type=numbers, help="as 1,2,4,8 (default: all powers of two that are here)")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--only", metavar="NAME,…", help="only the runs of these names or patterns, in this order")
    parser.add_argument("--engines", nargs="+", default=list(prediction.ENGINES), choices=prediction.ENGINES)
    parser.add_argument("--drills", nargs="+", default=list(fault_drills.NAMES), choices=fault_drills.NAMES)
    parser.add_argument("--minutes", type=float, default=1e9, help="start no run after that; repeat to continue")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on CPU processes")
    parser.add_argument("--results", type=Path, help="where results are kept (default: benchmarks/results/KIND_OF_GPU)")
    parser.add_argument("--folder", type=Path, help="where data, checkpoints and logs go (default: RESULTS/work)")
    a = parser.parse_args()
    here = 2 if a.tiny else xtuner_runs.gpus_here()
    if a.verb == "balance":
        if a.gpus:
            parser.error("balance is computed for 2, 4, 8 and 64 ranks")
        print(waiting_time.table(single_gpu_times.MODELS))
        return
    if a.verb == "predict":
        a.gpus = a.gpus or [2, 4, 8]
        if a.gpus == [1]:
            parser.error("--gpus 1: predictions are for several GPUs")
    elif here < 2:
        parser.error("this host has fewer than two GPUs; --tiny runs on two CPU processes")
    a.gpus = a.gpus or [n for n in (1, 2, 4, 8) if n <= here]
    if a.verb != "predict" and a.gpus[-1] > here:
        parser.error(f"--gpus {a.gpus[-1]}: there are {here} here")
    if a.verb == "peers" and a.gpus[-1] == 1:
        parser.error("--gpus 1: peers on one GPU are for single_gpu.py")
    if a.only is not None and a.verb not in ("run", "peers", "all"):
        parser.error(f"--only selects among runs; {a.verb} has none")
    if a.verb in ("faults", "all") and a.gpus[-1] % 2:
        parser.error(f"--gpus {a.gpus[-1]}: faults resume on half as many")
    a.shapes = ["tiny"] if a.tiny else a.shapes
    a.results = a.results or FOLDER / re.sub(r"\W+", "-", xtuner_runs.device(a.tiny).lower())
    a.folder = a.folder or a.results / "work"
    mine = xtuner_runs.jobs(a.gpus, a.shapes, a.engines) if a.verb in ("run", "all") else []
    theirs = peer_runs.jobs(a.gpus[-1], a.shapes) if a.verb in ("peers", "all") else []
    try:
        chosen = xtuner_runs.select([*mine, *theirs], a.only)
    except ValueError as e:
        parser.error(str(e))
    os.environ |= bandwidth.OFF
    print("NVLink multicast is off: NCCL_NVLS_ENABLE=0", flush=True)
    a.results.mkdir(parents=True, exist_ok=True)
    a.folder.mkdir(parents=True, exist_ok=True)
    a.deadline = time.monotonic() + 60 * a.minutes
    failed = 0
    if a.verb in ("bandwidth", "all"):
        show_bandwidth(a)
    if a.verb in ("predict", "all"):
        show_prediction(a)
    if a.verb in ("run", "all"):
        failed += show_runs(a, [job for job in chosen if isinstance(job, xtuner_runs.Job)])
    if a.verb in ("peers", "all"):
        failed += show_peers(a, [job for job in chosen if isinstance(job, peer_runs.PeerJob)])
    if a.verb in ("faults", "all"):
        failed += show_faults(a)
    if a.verb == "all":
        print(waiting_time.table(single_gpu_times.MODELS))
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
