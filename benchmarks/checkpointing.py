"""Speed of saving during training and of resuming, next to the raw speed of the disk.

    python benchmarks/checkpointing.py 1.8b --folder /scratch    # one GPU; `multi_gpu.py run` does it on more

benchlib/checkpoint_timing.py describes what is measured.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from benchlib.checkpoint_timing import SAVE_AT, describe, save_and_resume
from benchlib.workloads import CASES, describe_machine, write_data
from benchlib.xtuner_training import render_config, train_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=list(CASES))
    parser.add_argument("--folder", type=Path, help="where data and checkpoints go")
    a = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="xtuner-bench-", dir=a.folder))
    write_data(folder / "data", 64)
    (folder / "config.py").write_text(render_config(CASES[a.case], folder / "data", None, 0))
    words = [*train_command(folder / "config.py", folder / "w", "single"), "--cfg-options", f"save_steps={SAVE_AT}"]
    found = save_and_resume(words, folder / "w", folder / "log")
    if "failed" in found:
        raise SystemExit(f"{found['failed']}\nsee {folder / 'log'}")
    print(describe(found))
    print(json.dumps(describe_machine()))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
