"""Made `reference/checkpoints_337ac99/`: checkpoints of runs by an earlier version, and the losses that follow them.

    git archive COMMIT | tar -x -C OLD_TREE
    PYTHONPATH=tests python tests/helpers/make_old_checkpoints.py OLD_TREE

Each run of RUNS trains `config.py` with the old tree. Kept are its checkpoint of iteration 5 and the losses of
iterations 6 to 15, in losses.json.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from helpers.corpus import write_corpus

KEPT = Path(__file__).resolve().parents[1] / "reference" / "checkpoints_337ac99"
AT, LOSSES = 5, 10
RUNS: dict[str, tuple[int, tuple[str, ...]]] = {  # name → (processes, options)
    "single_fp32": (1, ()),
    "single_8bit": (1, ("--cfg-options", "states=8bit")),
    "fsdp": (2, ("--fsdp", "full", "--cfg-options", "accumulative_counts=1")),
    "zero1": (2, ("--deepspeed", "deepspeed_zero1", "--cfg-options", "accumulative_counts=1")),
    "zero3": (2, ("--deepspeed", "deepspeed_zero3", "--cfg-options", "accumulative_counts=1")),
}


def main(old_tree: str) -> None:
    losses = {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_corpus(Path("corpus"), 10)
        shutil.copy(KEPT / "config.py", "config.py")
        for name, (processes, options) in RUNS.items():
            environment = {**os.environ, "PYTHONPATH": old_tree, "NPROC_PER_NODE": str(processes)}
            words = [sys.executable, "-m", "xtuner", "train", "config.py", "--work-dir", name, *options]
            subprocess.run(words, check=True, env=environment)
            shutil.copytree(Path(name, f"iter_{AT}.pth"), KEPT / name, dirs_exist_ok=True)
            (scalars,) = Path(name).glob("*/vis_data/scalars.json")
            lines = {r["iter"]: r["loss"] for r in map(json.loads, scalars.read_text().splitlines())}
            losses[name] = [lines[AT + 1 + i] for i in range(LOSSES)]
    computed_by = [torch.__version__, torch.backends.cpu.get_cpu_capability()]
    (KEPT / "losses.json").write_text(json.dumps({"computed_by": computed_by, **losses}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
