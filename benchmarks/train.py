"""Speed of `xtuner train` itself: shipped template, loader, hooks and logging on; random weights of the real shape.

    python benchmarks/train.py 7b                       # one case; a minute or two on one GPU
    python benchmarks/train.py 1.8b --engine zero2
    python benchmarks/train.py --table                  # what has been measured, as Markdown

A case runs until `--iterations` are done, is then ended, and is appended to `--results` as one JSON line: the median
over iterations after the first `--warm`, tokens a second, MFU (model FLOPs as xtuner/model/flops.py counts them, over
the nominal peak), MFU with attention counted over whole packs as other tools do, the peak of memory beside what was
expected before the run, seconds from the command to the first iteration, and the time by part.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from synthetic import documents

from xtuner.config.load import SHIPPED
from xtuner.data.write import write_bin


class Shape(NamedTuple):
    template: str  # whose settings a case takes
    hidden: int
    layers: int
    heads: int
    ffn: int
    kv_heads: int = 8
    vocabulary: int = 92544

    def fields(self) -> dict[str, int]:
        """As `from_scratch` takes them."""
        return dict(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=self.ffn,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            max_position_embeddings=PACK,
        )  # fmt: skip


PACK = 32768
MEDIAN = 700  # tokens of a document
SHAPES = {
    "1.8b": Shape("1_8b", 2048, 24, 16, 8192),
    "7b": Shape("7b", 4096, 32, 32, 14336),
    "short": Shape("1_8b", 2048, 4, 16, 8192),  # 1.8B's width, 4 of its layers: for faults, not for speed
    "tiny": Shape("1_8b", 64, 2, 4, 128, 2, 512),  # for CPUs
}
CASES: dict[str, dict[str, Any]] = {
    "7b": dict(shape="7b", states="8bit"),
    "7b-long": dict(shape="7b", states="8bit", long=True),  # every pack is one document
    "1.8b": dict(shape="1.8b", states="fp32"),
    "1.8b-long": dict(shape="1.8b", states="fp32", long=True),
}


def config_of(case: dict[str, Any], data: Path, tokenizer: str | None, profile: int) -> str:
    """The shipped template with random weights of its shape, and nothing else changed."""
    template = SHAPES[case["shape"]]
    text = (SHIPPED / f"internlm2_{template.template}_w_tokenized_dataset.py").read_text()
    shape = ", ".join(f"{key}={value}" for key, value in template.fields().items())
    text = re.sub(r"(?s)\nmodel = dict\(.*?\n\)\n", f"\nmodel = dict(type=from_scratch, {shape}, seed=0,\n"
                  "    activation_checkpointing=True)\n", text)  # fmt: skip
    text = text.replace("import from_pretrained", "import from_scratch")
    text = text.replace("/path/to/your/dataset", str(data))
    text = text.replace('\nstates = "fp32"', f'\nstates = "{case["states"]}"')
    if tokenizer:
        text = re.sub(r'pretrained_model_name_or_path = ".*"', f'pretrained_model_name_or_path = "{tokenizer}"', text)
    else:  # the two hooks that need one
        text = re.sub(r"(?s)\n    dict\(type=DatasetInfoHook.*?\),\n", "\n", text)
        text = re.sub(r"(?s)\n    dict\(\n        type=EvaluateChatHook.*?\n    \),\n", "\n", text)
    if profile:
        text += "\nfrom xtuner.train.profile import ProfileHook\n"
        text += f"custom_hooks.append(dict(type=ProfileHook, begin={profile}, iterations=2))\n"
    return text


def write_data(folder: Path, packs: int, length: int = 0, pack: int = PACK, vocabulary: int = 92544) -> None:
    """Documents for so many packs, all of `length` tokens, or of lognormal lengths."""
    if length:
        draw = np.random.RandomState(0)
        texts = [draw.randint(3, vocabulary, size=length).tolist() for _ in range(packs * pack // length)]
    else:
        texts = documents(packs * pack, vocabulary, MEDIAN * pack // PACK, pack, 0)
    write_bin(folder / "synthetic.bin", texts)


def words_of(config: Path, work: Path, engine: str) -> list[str]:
    """`xtuner train`, as a user would type it. Engines: single, zero1, zero2, zero3, fsdp."""
    words = [sys.executable, "-m", "xtuner.cli.main", "train", str(config), "--work-dir", str(work)]
    return words + {"single": [], "fsdp": ["--fsdp", "full"]}.get(engine, ["--deepspeed", f"deepspeed_{engine}"])


def watched(words: list[str], until: str, environ: Mapping[str, str] = os.environ) -> Iterator[tuple[float, str]]:
    """(seconds since the start, line) of a command, which is killed after a line that matches `until`."""
    begin, environ = time.perf_counter(), {**environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ)
    assert process.stdout is not None
    for line in process.stdout:
        yield time.perf_counter() - begin, line
        if re.search(until, line):
            process.kill()
    process.wait()


def figures(work: Path, warm: int, last: int) -> dict[str, Any]:
    """What a run has written of its iterations after the first `warm`, up to `last`; losses and norms of all."""
    (scalars,) = work.glob("*/vis_data/scalars.json")
    every = [json.loads(line) for line in scalars.read_text().splitlines()]
    records = [r for r in every if warm < r["iter"] <= last]
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


def measure(name: str, a: argparse.Namespace) -> dict[str, Any]:
    case = CASES[name]
    folder = Path(a.folder or tempfile.mkdtemp(prefix="xtuner-bench-")) / f"{name}-{a.engine}"
    folder.mkdir(parents=True, exist_ok=True)
    write_data(folder / "data", a.iterations + 4, PACK if case.get("long") else 0)
    last = a.iterations - (3 if a.profile else 0)
    config = folder / "config.py"
    config.write_text(config_of(case, folder / "data", a.tokenizer, last + 1 if a.profile else 0))
    words = words_of(config, folder / "work", a.engine)
    first, expected = None, ""
    with open(folder / "log", "w") as log:
        for seconds, line in watched(words, rf"iter +{a.iterations}/"):
            log.write(line)
            print(line, end="", flush=True)
            if first is None and re.search(r"iter +1/", line):
                first = seconds
            if found := re.search(r"memory: .*", line):
                expected = found[0]
    if first is None:
        raise SystemExit(f"{name} did not get to its first iteration; see {folder / 'log'}")
    profiles = list((folder / "work").glob("*/profile.json"))
    return {
        "case": name,
        "engine": a.engine,
        "date": time.strftime("%Y-%m-%d"),
        **machine(),
        **figures(folder / "work", a.warm, last),
        "first": first,
        "expected": expected,
        "profile": json.loads(profiles[0].read_text())["parts"] if profiles else None,
    }


def machine() -> dict[str, str]:
    import torch

    return {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}


def table(results: Path) -> str:
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    lines = [
        "| case | engine | tok/s | MFU | peak GiB | first iteration s | machine, date |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['case']} | {r['engine']} | {r['tokens_per_s']:,.0f} | {r['mfu']:.3f} | {r['memory'] / 2**30:.1f} "
            f"| {r['first']:.0f} | {r['gpu']}, torch {r['torch']}, {r['date']} |"
        )
    for r in rows:
        if r["profile"]:
            parts = ", ".join(f"{part} {ms:.0f}" for part, ms in r["profile"].items() if ms)
            lines.append(f"\n{r['case']}, {r['engine']}, ms an iteration: {parts}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="?", choices=list(CASES))
    parser.add_argument("--engine", default="single", help="single, zero1, zero2, zero3 or fsdp")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--warm", type=int, default=5, help="iterations that do not count")
    parser.add_argument("--profile", action="store_true", help="time kernels in two more iterations")
    parser.add_argument("--tokenizer", help="a folder with tokenizer.model; without it the sampling hooks are left out")
    parser.add_argument("--folder", help="where data, config and log go")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results.jsonl"))
    parser.add_argument("--table", action="store_true", help="print what has been measured")
    a = parser.parse_args()
    if a.case:
        found = measure(a.case, a)
        with open(a.results, "a") as f:
            f.write(json.dumps(found) + "\n")
        print(json.dumps({k: v for k, v in found.items() if k not in ("losses", "norms")}, indent=1))
    if a.table or not a.case:
        print(table(a.results))


if __name__ == "__main__":
    main()
