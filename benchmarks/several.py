"""Several GPUs of one host: what collectives reach, a prediction, runs beside it, faults, what balancing would gain.

    python benchmarks/several.py all                   # everything below on this host's GPUs; what is done is kept
    python benchmarks/several.py bandwidth             # collectives over 1 MiB … 1 GiB, to bandwidth-N.json
    python benchmarks/several.py predict               # from one GPU's times: every term, 2, 4 and 8 GPUs
    python benchmarks/several.py run --gpus 1,2,4,8    # `xtuner train` itself, to runs.jsonl; then the table
    python benchmarks/several.py peers                 # torchtitan, transformers + Liger next to ours, same packs
    python benchmarks/several.py faults                # SIGTERM and N → N/2 → N, kill −9, a rank that stands still
    python benchmarks/several.py balance               # the wait for the slowest rank, what dealing packs would gain

`--only '7b-fsdp-4-speed-4*,7b-torchtitan*'` selects runs of `run` and `peers` by name, in that order; a name that
matches none lists all. With --minutes nothing begins later, and what is left out is done by the same command again.

With --tiny all of it runs on two CPU processes in minutes. NVLink multicast is off in everything that is started
(NCCL_NVLS_ENABLE=0). predict.py, balance.py, bandwidth.py, faults.py and peers.py say what each does, runs.py the runs.
"""

import argparse
import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

import balance
import bandwidth
import faults
import one_gpu
import peers
import predict
import runs

SHAPES = ("1.8b", "7b", "20b")
FOLDER = Path(__file__).parent / "several"


def links(results: Path, gpus: int) -> predict.Links:
    """As measured on so many GPUs, or assumed."""
    file = results / f"bandwidth-{gpus}.json"
    found = json.loads(file.read_text()) if file.exists() else None
    return predict.Links(found if found and found["device"] != "cpu" else None)


def show_bandwidth(a: argparse.Namespace) -> None:
    for gpus in (n for n in a.gpus if n > 1):
        file = a.results / f"bandwidth-{gpus}.json"
        if not file.exists():
            found = bandwidth.measure(gpus, a.tiny)
            file.write_text(json.dumps(found, indent=1) + "\n")
        print(bandwidth.table(json.loads(file.read_text())), flush=True)


def show_prediction(a: argparse.Namespace) -> None:
    """Of the real models, whatever this machine is; on the very packs that `run` uses."""
    squares = runs.squares(runs.data(a.folder, False), False)
    for gpus in (n for n in a.gpus if n > 1):
        found = links(a.results, gpus)
        how = f"measured on {found.measured['device']}" if found.measured else "assumed"
        print(f"\n{gpus} GPUs, exchange {how}\n\n{predict.table(found, squares, gpus)}", flush=True)


def show_runs(a: argparse.Namespace, chosen: Sequence[runs.Job]) -> int:
    failed = runs.run(chosen, a.results / "runs.jsonl", a.folder, a.tiny, a.deadline)
    print(runs.table(a.results / "runs.jsonl", a.folder, lambda n: links(a.results, n)), flush=True)
    return failed


def show_peers(a: argparse.Namespace, chosen: Sequence[peers.PeerJob]) -> int:
    """Ours first, where it is not in the results, so that both are measured on one machine."""
    ours = dict.fromkeys(runs.Job("speed", job.shape, "fsdp", job.gpus, job.gpus) for job in chosen)
    failed = runs.run(list(ours), a.results / "runs.jsonl", a.folder, a.tiny, a.deadline)
    failed += peers.run(chosen, a.results / "peers.jsonl", a.folder, a.tiny, a.deadline)
    print(peers.table(a.results / "peers.jsonl", a.results / "runs.jsonl"), flush=True)
    return failed


def show_faults(a: argparse.Namespace) -> int:
    found = faults.drills(a.folder / "faults", a.gpus[-1], a.tiny, a.drills)
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
    parser.add_argument("--engines", nargs="+", default=list(predict.ENGINES), choices=predict.ENGINES)
    parser.add_argument("--drills", nargs="+", default=list(faults.NAMES), choices=faults.NAMES)
    parser.add_argument("--minutes", type=float, default=1e9, help="no run begins later; again: go on with the others")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on CPU processes")
    parser.add_argument("--results", type=Path, help="where results are kept (default: benchmarks/several/KIND_OF_GPU)")
    parser.add_argument("--folder", type=Path, help="where data, checkpoints and logs go (default: RESULTS/work)")
    a = parser.parse_args()
    here = 2 if a.tiny else runs.gpus_here()
    if a.verb == "balance":
        if a.gpus:
            parser.error("balance is of 2, 4, 8 and 64 ranks, wherever they are")
        print(balance.table(one_gpu.MODELS))
        return
    if a.verb == "predict":
        a.gpus = a.gpus or [2, 4, 8]
        if a.gpus == [1]:
            parser.error("--gpus 1: one GPU has nothing to predict")
    elif here < 2:
        parser.error("there are not two GPUs here; --tiny runs on two CPU processes")
    a.gpus = a.gpus or [n for n in (1, 2, 4, 8) if n <= here]
    if a.verb != "predict" and a.gpus[-1] > here:
        parser.error(f"--gpus {a.gpus[-1]}: there are {here} here")
    if a.verb == "peers" and a.gpus[-1] == 1:
        parser.error("--gpus 1: peers on one GPU are for train.py")
    if a.only is not None and a.verb not in ("run", "peers", "all"):
        parser.error(f"--only selects among runs; {a.verb} has none")
    if a.verb in ("faults", "all") and a.gpus[-1] % 2:
        parser.error(f"--gpus {a.gpus[-1]}: faults resume on half as many")
    a.shapes = ["tiny"] if a.tiny else a.shapes
    a.results = a.results or FOLDER / re.sub(r"\W+", "-", runs.device(a.tiny).lower())
    a.folder = a.folder or a.results / "work"
    mine = runs.jobs(a.gpus, a.shapes, a.engines) if a.verb in ("run", "all") else []
    theirs = peers.jobs(a.gpus[-1], a.shapes) if a.verb in ("peers", "all") else []
    try:
        chosen = runs.select([*mine, *theirs], a.only)
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
        failed += show_runs(a, [job for job in chosen if isinstance(job, runs.Job)])
    if a.verb in ("peers", "all"):
        failed += show_peers(a, [job for job in chosen if isinstance(job, peers.PeerJob)])
    if a.verb in ("faults", "all"):
        failed += show_faults(a)
    if a.verb == "all":
        print(balance.table(one_gpu.MODELS))
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
