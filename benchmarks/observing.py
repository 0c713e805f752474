"""What observing a run costs: iteration time with everything on and with everything off, in turns (off on off on …).

    python benchmarks/observing.py CONFIG --rounds 3 --iterations 200 [--ranks 2] [--cfg-options KEY=VALUE …]

On: a log line, metrics, TensorBoard and both trackers (offline, if installed) at every iteration; loss watch, times
of ranks, `on_event`, and a board that follows the run with a page that asks for it every two seconds. Off: none of
these, and no timer, throughput or logger hook. Compared are the median and the tenth percentile of an iteration's time
over all runs of a kind, without the first iterations; the latter is less disturbed by other programs. Give a config
with short iterations to see the time that is added, and one of your own to see its share.
"""

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import urllib.request
from pathlib import Path
from typing import Any

from xtuner.core.system.sysinfo import installed

SKIPPED = 20  # iterations at the beginning
POLL = 2.0  # s between two requests of the page

COMMON = '''
import json as _json, time as _time
from xtuner.train.hooks import Hook as _Hook
class Clock(_Hook):
    """The end of every iteration."""
    priority = 1
    def __init__(self, path):
        self.path, self.ends = path, []
    def after_iteration(self, run, it):
        self.ends.append(_time.perf_counter())
        if len(self.ends) == LAST:
            if run.mesh.is_main:
                open(self.path, "w").write(_json.dumps(self.ends))
            (run.work_dir / "STOP").touch()
custom_hooks = [dict(type=Clock, path=PATH)]
'''
OFF = """
from xtuner.train.reporting import rank_times as _rank_times
_rank_times.EVERY = 10**9
default_hooks = {name: hook for name, hook in default_hooks.items() if name not in ("logger", "timer", "checkpoint")}
"""
ON = """
from xtuner.train.hooks import CheckpointHook as _Saves, IterTimerHook as _Timer, LoggerHook as _Logger
from xtuner.train.hooks import ThroughputHook as _Speed
custom_hooks.append(dict(type=_Speed))
default_hooks = {name: hook for name, hook in default_hooks.items() if name != "checkpoint"}
default_hooks.update(timer=dict(type=_Timer), logger=dict(type=_Logger, interval=1))
on_event = "true {json}"
"""


def run_once(config: Path, on: bool, folder: Path, args: argparse.Namespace) -> list[float]:
    """Seconds of each iteration."""
    times = folder / "times.json"
    text = config.read_text() + COMMON.replace("PATH", repr(str(times))).replace("LAST", str(args.iterations + SKIPPED))
    own = folder / config.name
    own.write_text(text + (ON if on else OFF))
    words = [sys.executable, "-m", "xtuner", "train", str(own), "--work-dir", str(folder / "run")]
    trackers = [name for name in ("swanlab", "wandb") if installed(name)] if on else []
    words += [word for name in trackers for word in ("--tracker", name)]
    env = {**os.environ, "WANDB_MODE": "offline", "SWANLAB_MODE": "offline"}
    if args.ranks > 1:
        env["NPROC_PER_NODE"] = str(args.ranks)
    options = [*args.cfg_options, "save_steps=-1", "evaluation_inputs=[]"]
    board = Board(folder) if on else None
    done = subprocess.run([*words, "--cfg-options", *options], env=env, capture_output=True, text=True)
    requests = board.close() if board else 0
    if not times.exists():
        raise SystemExit(
            f"the run ended with {done.returncode} before {args.iterations} iterations:\n{done.stderr[-3000:]}"
        )
    ends = json.loads(times.read_text())[SKIPPED:]
    seconds = [b - a for a, b in itertools.pairwise(ends)]
    what = f"on, {' and '.join(trackers) or 'no trackers installed'}, {requests} requests to the board" if on else "off"
    print(f"{1000 * statistics.median(seconds):9.3f} ms, {len(seconds)} iterations, {what}", flush=True)
    return seconds


class Board:
    """`xtuner board`, and a page that asks it for all runs."""

    def __init__(self, folder: Path) -> None:
        words = [sys.executable, "-m", "xtuner", "board", str(folder), "--port", "0"]
        self._process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert self._process.stdout
        found = None
        while found is None and (line := self._process.stdout.readline()):
            found = re.search(r"http://[\d.]+:\d+", line)
        if found is None:
            raise SystemExit("xtuner board did not start")
        self._address, self._requests, self._ended = found[0], 0, threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()

    def _ask(self) -> None:
        while not self._ended.wait(POLL):
            runs: dict[str, Any] = json.load(urllib.request.urlopen(f"{self._address}/api/runs"))
            for run in runs["runs"]:
                urllib.request.urlopen(f"{self._address}/api/run?id={urllib.request.quote(run['id'])}").read()
            self._requests += 1

    def close(self) -> int:
        self._ended.set()
        self._thread.join()
        self._process.terminate()
        self._process.wait()
        return self._requests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind")
    parser.add_argument("--iterations", type=int, default=200, help="measured in each run")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--cfg-options", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    seconds: dict[bool, list[list[float]]] = {False: [], True: []}
    for _ in range(args.rounds):
        for on in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                seconds[on].append(run_once(args.config, on, Path(folder), args))
    for name, find in (("median", statistics.median), ("tenth percentile", lambda s: statistics.quantiles(s, n=10)[0])):
        off, on_ = (find([x for run in seconds[on] for x in run]) for on in (False, True))
        alone = [find(run) for run in seconds[False]]
        spread = max(alone) - min(alone)
        print(f"{name}: off {1000 * off:.3f} ms, on {1000 * on_:.3f} ms: {1000 * (on_ - off):+.3f} ms, "
              f"{(on_ - off) / off:+.2%}; runs that are off differ by {1000 * spread:.3f} ms")  # fmt: skip


if __name__ == "__main__":
    main()
