"""Does AdamW's state in fewer bytes learn as well? Each form trains the demo's model on the demo's real text.

    make demo && python benchmarks/states.py demo/out

On a CPU, where weights of the bf16 forms are bf16 numbers that compute in fp32; about four minutes a form on two cores.
Told: the mean training loss over quarters of the run, the loss on unseen files, and how far weights ended from fp32's.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from xtuner.engine.adamw import FORMS

CONFIG = "internlm2_tiny_w_tokenized_dataset_copy.py"


def run(words: list[str], folder: Path) -> str:
    command = [sys.executable, "-m", "xtuner.cli.main", *words]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def measure(name: str, demo: Path, folder: Path) -> dict[str, Any]:
    config = folder / f"{name.replace('8bit', 'eight')}.py"
    shutil.copy(demo / CONFIG, config)
    work = folder / f"work-{name}"
    options = [f"states={name}", "evaluation_inputs=[]", "save_optimizer=False", "default_hooks.logger.interval=1"]
    run(["train", str(config), "--work-dir", str(work), "--cfg-options", *options], demo)
    (scalars,) = work.glob("*/vis_data/scalars.json")
    losses = [r["loss"] for r in map(json.loads, scalars.read_text().splitlines()) if "loss" in r]
    quarter = len(losses) // 4
    last = work / (work / "last_checkpoint").read_text().strip()
    run(["convert", "pth_to_hf", str(config), str(last), str(folder / f"hf-{name}"), "--fp32"], demo)
    unseen = run(["eval", "loss", str(folder / f"hf-{name}"), "data/valid", "--max-length", "1024"], demo)
    found = re.search(r"^all +[\d,]+ +([\d.]+)", unseen, re.MULTILINE)
    assert found
    return {
        "quarters": [statistics.mean(losses[i : i + quarter]) for i in range(0, 4 * quarter, quarter)],
        "last": statistics.mean(losses[-20:]),
        "unseen": float(found[1]),
        "weights": load_file(last / "weights" / "model.safetensors"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="demo/out after `make demo`")
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    a = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="xtuner-states-"))
    found: dict[str, dict[str, Any]] = {}
    print(
        "| form | training loss by quarter | last 20 | unseen | weights from fp32's |\n" + "|---" * 5 + "|", flush=True
    )
    for name in a.forms:
        r = found[name] = measure(name, a.demo.resolve(), folder)
        far = [(w - found[a.forms[0]]["weights"][n]).norm() / w.norm() for n, w in r["weights"].items()]
        quarters = " ".join(f"{q:.4f}" for q in r["quarters"])
        print(f"| {name} | {quarters} | {r['last']:.4f} | {r['unseen']:.4f} | {float(max(far)):.1e} |", flush=True)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
