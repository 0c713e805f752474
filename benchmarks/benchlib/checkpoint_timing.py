"""Times one save and one resume of `xtuner train`, and the raw speed of the disk.

A run saves after 8 iterations and is killed (SIGKILL) when the checkpoint is complete; then it is resumed, and killed
after its first iteration. Reported: how long training waited for the save, the usual time of an iteration, bytes per
second of save, load and disk, seconds from the command to the first iteration after the resume.
"""

import json
import math
import os
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchlib.command_output import stream_lines

SAVE_AT = 8
SIZE = 4 * 2**30  # bytes of the file that measures the disk
ROUNDED = 0.05  # s: times below it are 0.0 in the log
SAVED = r"saved .* in ([\d.]+) s .*training waited ([\d.]+) s"


def disk(folder: Path, size: int = SIZE) -> tuple[float, float]:
    """(write, read) bytes per second of one file, with fsync and without the page cache."""
    path, block = folder / "disk", os.urandom(min(2**26, size))
    begin = time.perf_counter()
    with open(path, "wb") as f:
        for _ in range(size // len(block)):
            f.write(block)
        f.flush()
        os.fsync(f.fileno())
        written = size / (time.perf_counter() - begin)
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    begin = time.perf_counter()
    with open(path, "rb", buffering=0) as f:
        while f.read(2**26):
            pass
    read = size / (time.perf_counter() - begin)
    path.unlink()
    return written, read


def save_and_resume(
    words: Sequence[str], work: Path, log: Path, environ: Mapping[str, str] = os.environ, size: int = SIZE
) -> dict[str, Any]:
    """Time a run in `work` that is killed after its first checkpoint, and its resume; both write to `log`.

    Args:
        words: the run's command, with its first save at SAVE_AT.
        size: of the file that measures the disk.
    """
    work.mkdir(parents=True, exist_ok=True)
    written, read = disk(work, size)
    found: dict[str, Any] = {"disk_writes": written, "disk_reads": read}
    with open(log, "w") as f:
        for until, more in ((SAVED, []), (r"iter +\d+/", ["--resume"])):
            first, line = math.nan, ""
            for seconds, line in stream_lines([*words, *more], until, environ):
                f.write(line)
                if math.isnan(first) and re.search(r"iter +\d+/", line):
                    first = seconds
                if saved := re.search(SAVED, line):
                    (folder,) = work.glob("iter_*.pth")
                    held = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
                    found |= {"bytes": held, "saved": max(float(saved[1]), ROUNDED), "waited": float(saved[2])}
                if loaded := re.search(r"loaded in ([\d.]+) s", line):
                    found["loaded"] = float(loaded[1])
            found["resumed" if more else "first"] = first
            if math.isnan(first) or "saved" not in found:
                return found | {"failed": line or "no output"}
    scalars = min(work.glob("*/vis_data/scalars.json"))  # of the first of the two
    times = [json.loads(line)["time"] for line in scalars.read_text().splitlines()]
    return found | {"seconds": statistics.median(times[3:SAVE_AT]), "beside": times[SAVE_AT:]}


def describe(r: Mapping[str, Any]) -> str:
    """The result of `save_and_resume` as a sentence."""
    mib, beside = 2**20, f"; iterations during the save {max(r['beside']):.2f} s at most" if r["beside"] else ""
    return (
        f"{r['bytes'] / 2**30:.1f} GiB saved in {r['saved']:.1f} s ({r['bytes'] / r['saved'] / mib:,.0f} MiB/s; the "
        f"disk alone writes {r['disk_writes'] / mib:,.0f}, reads {r['disk_reads'] / mib:,.0f}), training waited "
        f"{r['waited']:.2f} s; an iteration takes {r['seconds']:.2f} s{beside}; first iteration {r['first']:.0f} s "
        f"after the command, after a resume {r['resumed']:.0f} s, of which loading takes {r['loaded']:.1f} s"
    )
