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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from synthetic import documents

from xtuner.config.load import SHIPPED
from xtuner.data.write import write_bin

SHAPES = {  # hidden, layers, heads, ffn; 8 kv heads of 128, vocabulary 92544
    "1.8b": ("1_8b", 2048, 24, 16, 8192),
    "7b": ("7b", 4096, 32, 32, 14336),
}
CASES: dict[str, dict[str, Any]] = {
    "7b": dict(shape="7b", states="8bit"),
    "7b-long": dict(shape="7b", states="8bit", long=True),  # every pack is one document
    "1.8b": dict(shape="1.8b", states="fp32"),
    "1.8b-long": dict(shape="1.8b", states="fp32", long=True),
}
PACK = 32768


def config_of(case: dict[str, Any], data: Path, tokenizer: str | None, profile: int) -> str:
    """The shipped template with random weights of its shape, and nothing else changed."""
    name, hidden, layers, heads, ffn = SHAPES[case["shape"]]
    text = (SHIPPED / f"internlm2_{name}_w_tokenized_dataset.py").read_text()
    shape = f"vocab_size=92544, hidden_size={hidden}, intermediate_size={ffn}, num_hidden_layers={layers}, "
    shape += f"num_attention_heads={heads}, num_key_value_heads=8, max_position_embeddings=32768"
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


def write_data(folder: Path, packs: int, long: bool) -> None:
    if long:
        draw = np.random.RandomState(0)
        texts = [draw.randint(3, 92544, size=PACK).tolist() for _ in range(packs)]
    else:
        texts = documents(packs * PACK, 92544, 700, PACK, 0)
    write_bin(folder / "synthetic.bin", texts)


def watched(words: list[str], until: str) -> Iterator[tuple[float, str]]:
    """(seconds since the start, line) of a command, which is killed after a line that matches `until`."""
    begin, environ = time.perf_counter(), {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ)
    assert process.stdout is not None
    for line in process.stdout:
        yield time.perf_counter() - begin, line
        if re.search(until, line):
            process.kill()
    process.wait()


def measure(name: str, a: argparse.Namespace) -> dict[str, Any]:
    case = CASES[name]
    folder = Path(a.folder or tempfile.mkdtemp(prefix="xtuner-bench-")) / f"{name}-{a.engine}"
    folder.mkdir(parents=True, exist_ok=True)
    write_data(folder / "data", a.iterations + 4, case.get("long", False))
    last = a.iterations - (3 if a.profile else 0)
    config = folder / "config.py"
    config.write_text(config_of(case, folder / "data", a.tokenizer, last + 1 if a.profile else 0))
    words = [sys.executable, "-m", "xtuner.cli.main", "train", str(config), "--work-dir", str(folder / "work")]
    words += {"single": [], "fsdp": ["--fsdp", "full"]}.get(a.engine, ["--deepspeed", f"deepspeed_{a.engine}"])
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
    (scalars,) = (folder / "work").glob("*/vis_data/scalars.json")
    records = [json.loads(line) for line in scalars.read_text().splitlines()]
    records = [r for r in records if a.warm < r["iter"] <= last]
    profiles = list((folder / "work").glob("*/profile.json"))
    return {
        "case": name,
        "engine": a.engine,
        "date": time.strftime("%Y-%m-%d"),
        **machine(),
        "tokens_per_s": statistics.median(r["tokens_per_s"] for r in records),
        "spread": [min(r["tokens_per_s"] for r in records), max(r["tokens_per_s"] for r in records)],
        "mfu": statistics.median(r["mfu"] for r in records),
        "memory": max(r["memory"] for r in records),
        "data_time": max(r["data_time"] for r in records),
        "first": first,
        "expected": expected,
        "losses": [r["loss"] for r in records],
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
        print(json.dumps({k: v for k, v in found.items() if k != "losses"}, indent=1))
    if a.table or not a.case:
        print(table(a.results))


if __name__ == "__main__":
    main()
