"""Speed of training at the real shape, with random weights: ours, and the same work by others.

    python benchmarks/train.py 7b                             # one case; a minute or two on one GPU
    python benchmarks/train.py 1.8b --engine zero2
    python benchmarks/train.py 7b --products fp8
    python benchmarks/train.py 1.8b --engine hf-liger         # a peer; peer.py says how, peer_*.py what to install
    python benchmarks/train.py 7b --engine torchtitan --profile
    python benchmarks/train.py 1.8b --engine hf --tiny        # tries a peer on a CPU; measures nothing
    python benchmarks/train.py --table                        # what has been measured, as Markdown

Ours is `xtuner train` itself: shipped template, loader, hooks and logging on. A case runs until `--iterations` are done
and is appended to `--results` as one JSON line: the median over iterations after the first `--warm`, tokens a second,
MFU (model FLOPs as xtuner/model/flops.py counts them, over the nominal peak), the peak of memory beside what was
expected before the run, seconds from the command to the first iteration, and with `--profile` the time by part. The
table adds the MFU with attention counted over whole packs, as other tools do ("whole").
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import ours
from cases import CASES, PACKS, machine
from table import table

PEERS = ("hf", "hf-liger", "torchtitan")


def main() -> None:
    begin = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="?", choices=list(CASES))
    parser.add_argument("--engine", default="single", choices=[*ours.ENGINES, *PEERS])
    parser.add_argument("--states", choices=["fp32", "split", "bf16", "8bit"], help="AdamW's state, not the case's own")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--warm", type=int, default=5, help="iterations that do not count")
    parser.add_argument("--profile", action="store_true", help="time kernels in two more iterations")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results.jsonl"))
    parser.add_argument("--table", action="store_true", help="print what has been measured")
    parser.add_argument(
        "--attention", help="not the fastest: ours flash4, cudnn, varlen, flex; peers flex, varlen, sdpa"
    )
    own = parser.add_argument_group("ours only")
    own.add_argument("--products", choices=["own", "fp8"], help="what blocks multiply in")
    own.add_argument("--tokenizer", help="a folder with tokenizer.model; without it the sampling hooks are left out")
    own.add_argument("--folder", help="where data, config and log go")
    peers = parser.add_argument_group("peers only")
    peers.add_argument("--recompute", choices=["none", "selective", "full"], help="what the backward computes again")
    peers.add_argument("--tiny", action="store_true", help="a small model and short packs, on a CPU; not recorded")
    a = parser.parse_args()
    if a.iterations <= a.warm + (3 if a.profile and a.engine in ours.ENGINES else 0):
        parser.error("--iterations leaves none to count")
    if a.iterations > PACKS - 2:
        parser.error(f"--iterations: there are {PACKS} packs")
    if a.case:
        case = replace(CASES[a.case], states=a.states or CASES[a.case].states)
        if a.engine in PEERS:
            if a.products or a.tokenizer or a.folder:
                parser.error("--products, --tokenizer and --folder are for ours")
            import peer

            found = peer.measure(case, a, begin)
        elif a.tiny or a.recompute:
            parser.error("--tiny and --recompute are for peers")
        else:
            found = ours.measure(case, a)
        found = {
            "case": case.name,
            "engine": a.engine,
            "states": case.states,
            "date": time.strftime("%Y-%m-%d"),
            **machine(),
            **found,
        }
        if not a.tiny:
            with open(a.results, "a") as f:
                f.write(json.dumps(found) + "\n")
        print(json.dumps({k: v for k, v in found.items() if k not in ("losses", "norms")}, indent=1))
    if a.table or not a.case:
        print(table(a.results))


if __name__ == "__main__":
    main()
