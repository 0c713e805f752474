"""Speed of training at the real shape, with random weights: ours, and the same work by others.

    python benchmarks/single_gpu.py 7b                          # one case; a minute or two on one GPU
    python benchmarks/single_gpu.py 1.8b --engine zero2
    python benchmarks/single_gpu.py 7b --products fp8
    python benchmarks/single_gpu.py 7b --adapter qlora          # or lora; --pack 8192; --memory 16: as on a smaller GPU
    python benchmarks/single_gpu.py 7b --adapter qlora --engine hf-liger                # or unsloth
    python benchmarks/single_gpu.py 1.8b --engine hf-liger      # a peer; benchlib/peers/ says what to install
    python benchmarks/single_gpu.py 7b --engine torchtitan --products fp8 --profile
    python benchmarks/single_gpu.py 1.8b --engine hf --tiny     # tries it on a CPU; measures nothing
    python benchmarks/single_gpu.py --table                     # all results, as Markdown

Ours is `xtuner train` itself with a shipped config, loader, hooks and logging. A case runs for `--iterations` and is
appended to `--results` as one JSON line: tokens per second and MFU (medians after the first `--warm` iterations; model
FLOPs as counted in xtuner/model/flops.py, over the nominal peak), measured and expected peak memory, seconds from the
command to the first iteration, and with `--profile` the time by part. The table adds the MFU with attention counted
over whole packs, as other tools do ("whole").
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

from benchlib import xtuner_training
from benchlib.results_table import table
from benchlib.workloads import ADAPTERS, CASES, PACK, PACKS, Terms, describe_machine

PEERS = ("hf", "hf-liger", "torchtitan", "unsloth")
OWN_PRODUCTS = ("own", "fp8", "fp8_full")
PEER_PRODUCTS = ("fp8", "fp8_rowwise", "fp8_rowwise_forward")


def main() -> None:
    begin = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="?", choices=list(CASES))
    parser.add_argument("--engine", default="single", choices=[*xtuner_training.ENGINES, *PEERS])
    parser.add_argument(
        "--states", choices=["fp32", "split", "bf16", "8bit"], help="AdamW's state instead of the case's"
    )
    parser.add_argument("--adapter", choices=list(ADAPTERS.values()), help="on all linear layers, of bf16 or of nf4")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter; alpha is twice as much")
    parser.add_argument("--pack", type=int, default=PACK, help="tokens of a pack; documents stay the same")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--warm", type=int, default=5, help="iterations before the measurement")
    parser.add_argument("--profile", action="store_true", help="time kernels in two more iterations")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results.jsonl"))
    parser.add_argument("--table", action="store_true", help="print all results")
    parser.add_argument(
        "--attention", help="instead of the fastest: ours flash4, cudnn, varlen, flex; peers flex, varlen, sdpa, flash4"
    )
    products = [*OWN_PRODUCTS, *(name for name in PEER_PRODUCTS if name not in OWN_PRODUCTS)]
    parser.add_argument(
        "--products",
        choices=products,
        help=f"of blocks: ours {', '.join(OWN_PRODUCTS)}; peers {', '.join(PEER_PRODUCTS)} (by torchao)",
    )
    parser.add_argument("--tiny", action="store_true", help="a small model and short packs, on a CPU; not recorded")
    own = parser.add_argument_group("ours only")
    own.add_argument("--tokenizer", help="a folder with tokenizer.model; without it there are no sampling hooks")
    own.add_argument("--memory", type=float, metavar="GIB", help="occupy the rest of the GPU, as if it were smaller")
    own.add_argument("--folder", help="for data, config and log")
    peers = parser.add_argument_group("peers only")
    peers.add_argument(
        "--recompute", choices=["none", "selective", "full"], help="activation recomputation in the backward"
    )
    a = parser.parse_args()
    if a.iterations <= a.warm + (3 if a.profile and a.engine in xtuner_training.ENGINES else 0):
        parser.error("--iterations leaves none to measure")
    if a.tiny and a.memory:
        parser.error("--memory is of a GPU")
    if a.iterations > PACKS - 2:
        parser.error(f"--iterations: there are {PACKS} packs")
    if a.case:
        weights = next((kind for kind, name in ADAPTERS.items() if name == a.adapter), None)
        terms = Terms(weights, a.rank) if weights else None
        states = a.states or ("fp32" if terms else CASES[a.case].states)
        case = replace(CASES[a.case], states=states, pack=a.pack, terms=terms)
        if a.products and a.products not in (PEER_PRODUCTS if a.engine in PEERS else OWN_PRODUCTS):
            parser.error(f"--products {a.products} is not of {a.engine}")
        if a.engine in PEERS:
            if a.tokenizer or a.folder or a.memory:
                parser.error("--tokenizer, --memory and --folder are for ours")
            from benchlib.peers import training_loop

            found = training_loop.measure(case, a, begin)
        elif a.recompute:
            parser.error("--recompute is for peers")
        else:
            found = xtuner_training.measure(case, a)
        found = {
            "case": case.name,
            "engine": a.engine,
            "states": case.states,
            "terms": case.terms and case.terms.name,
            "pack": case.pack,
            "limited": f"{a.memory:g}G" if a.memory else None,
            "date": time.strftime("%Y-%m-%d"),
            **describe_machine(),
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
