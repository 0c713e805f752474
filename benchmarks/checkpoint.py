"""Saving beside training, and resuming, of `xtuner train` itself, beside what the disk alone can do.

    python benchmarks/checkpoint.py 1.8b --folder /scratch

A run saves after 8 iterations and is killed (SIGKILL) when the checkpoint is whole; then it is resumed, and killed
after its first iteration. Told: how long training waited for the save, an iteration's usual time, bytes a second of
save and load, the disk's own bytes a second, seconds from the command to the first iteration after the resume.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from cases import CASES, machine, write_data
from ours import config_of, watched, words_of

SAVE_AT = 8
SIZE = 4 * 2**30  # bytes of the file that measures the disk


def disk(folder: Path) -> tuple[float, float]:
    """Bytes a second that one file is written with, synced, and read with from the disk itself."""
    path, block = folder / "disk", os.urandom(2**26)
    begin = time.perf_counter()
    with open(path, "wb") as f:
        for _ in range(SIZE // len(block)):
            f.write(block)
        f.flush()
        os.fsync(f.fileno())
        written = SIZE / (time.perf_counter() - begin)
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    begin = time.perf_counter()
    with open(path, "rb", buffering=0) as f:
        while f.read(2**26):
            pass
    read = SIZE / (time.perf_counter() - begin)
    path.unlink()
    return written, read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=list(CASES))
    parser.add_argument("--folder", type=Path, help="where data and checkpoints go")
    a = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="xtuner-bench-", dir=a.folder))
    write_data(folder / "data", 64)
    (folder / "config.py").write_text(config_of(CASES[a.case], folder / "data", None, 0))
    words = [*words_of(folder / "config.py", folder / "w", "single"), "--cfg-options", f"save_steps={SAVE_AT}"]
    written, read = disk(folder)
    print(f"the disk alone: writes {written / 2**20:,.0f} MiB/s, reads {read / 2**20:,.0f} MiB/s", flush=True)
    for _, line in watched(words, "saved .*training waited"):
        print(line, end="", flush=True)
    (scalars,) = folder.glob("w/*/vis_data/scalars.json")
    times = [json.loads(line)["time"] for line in scalars.read_text().splitlines()]
    print(f"an iteration: {statistics.median(times[3:]):.2f} s; all: {times}")
    for seconds, line in watched([*words, "--resume"], r"iter +\d+/"):
        print(f"{seconds:6.1f} s  {line}", end="", flush=True)
    print(json.dumps(machine()))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
