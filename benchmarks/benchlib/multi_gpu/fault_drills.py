"""Stops, kills or suspends ranks of `xtuner train` on one host, resumes the run, and checks its losses.

Signals are sent from outside to real processes of our launcher (NPROC_PER_NODE). Each drill is compared, iteration by
iteration, with an undisturbed run. Losses agree to 1e-5 in fp32 on CPUs, and to 1e-3 (of about 11) in bf16 on GPUs,
where sums over another number of ranks are rounded in another order.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchlib.multi_gpu.bandwidth import OFF
from benchlib.workloads import SHAPES, Case, write_data
from benchlib.xtuner_training import render_config, train_command

ITERATIONS, TINY_ITERATIONS = 24, 12
SAVE_EVERY = 6  # iterations
SAVED = r"saved \S*iter_(\d+)\.pth"
Act = Callable[[int], None]  # acts on a launcher's process
NAMES = ("stopped", "killed", "hung")


class Ended(NamedTuple):
    code: int
    seconds: float  # from the action until the last process was gone
    text: str


class Drill:
    """Runs of one config in one folder.

    Args:
        gpus: the normal number of ranks.
        tiny: a tiny model on CPUs.
    """

    def __init__(self, folder: Path, gpus: int, tiny: bool) -> None:
        self.folder, self.gpus = folder, gpus
        self.pack, shape = (512, "tiny") if tiny else (8192, "short")
        self.tolerance = 1e-5 if tiny else 1e-3
        self.iterations, data = TINY_ITERATIONS if tiny else ITERATIONS, folder / "data"
        write_data(data, self.iterations * gpus + gpus, pack=self.pack, vocabulary=SHAPES[shape].vocabulary)
        self.config = folder / "config.py"
        self.config.write_text(render_config(Case(shape, shape, "fp32"), data, None, 0))
        self.environ = {**os.environ, **OFF, "PYTHONUNBUFFERED": "1"} | ({"CUDA_VISIBLE_DEVICES": ""} if tiny else {})
        self.environ["XTUNER_SILENT_SECONDS"] = "5" if tiny else "20"

    def go(self, name: str, ranks: int, act: Act | None = None, when: str = "", **options: Any) -> Ended:
        """Run to the end; after the first line that matches `when`, apply `act` to the launcher's process."""
        words = [*train_command(self.config, self.folder / name, "fsdp"), "--resume", "--cfg-options"]
        options = {"max_length": self.pack, "save_steps": SAVE_EVERY, "warm_up_ratio": 0.1, **options}
        words += [f"{key}={value}" for key, value in options.items()]
        environ = {**self.environ, "NPROC_PER_NODE": str(ranks)}
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ)
        assert process.stdout is not None
        acted, lines = time.perf_counter(), []
        try:
            for line in process.stdout:
                lines.append(line)
                if act and re.search(when, line):
                    acted = time.perf_counter()
                    act(process.pid)
                    act = None
        finally:
            process.kill()  # if interrupted; workers end with their parent
        code = process.wait()
        ended = Ended(code, time.perf_counter() - acted, "".join(lines))
        with open(self.folder / f"{name}.log", "a") as f:
            f.write(ended.text)
        return ended

    def losses(self, name: str) -> dict[int, list[float]]:
        """Logged losses by iteration: one, or two for a repeated iteration."""
        found: dict[int, list[float]] = {}
        for file in sorted((self.folder / name).glob("*/vis_data/scalars.json")):
            for record in map(json.loads, file.read_text().splitlines()):
                found.setdefault(record["iter"], []).append(record["loss"])
        return found

    def off(self, name: str) -> float:
        """The largest difference of a loss from the undisturbed run's; infinity if an iteration is missing."""
        ours, theirs = self.losses(name), self.losses("undisturbed")
        if ours.keys() != theirs.keys():
            return float("inf")
        return max(abs(loss - theirs[i][0]) for i, every in ours.items() for loss in every)


def worker(launcher: int, rank: int) -> int:
    """The process id of a rank, found through its launcher, which starts them in order."""
    return int(Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()[rank])


def first_resumed(text: str) -> int | None:
    found = re.search(r"iter +(\d+)/", text)
    return int(found[1]) if found else None


def saved(text: str) -> int:
    """The last iteration that a run has logged as saved; -1 for none."""
    return int((re.findall(SAVED, text) or [-1])[-1])


def drills(folder: Path, gpus: int, tiny: bool, names: Sequence[str] = NAMES) -> list[dict[str, Any]]:
    """Run the drills in turn. `as_promised`: the rank was named, the run ended and resumed, and losses agree."""
    shutil.rmtree(folder, ignore_errors=True)
    d = Drill(folder, gpus, tiny)
    found: list[dict[str, Any]] = []

    def note(what: str, ended: Ended, wanted: bool, name: str, resumed: int | None) -> None:
        off = d.off(name)
        record = {
            "gpus": gpus,
            "tiny": tiny,
            "what": what,
            "code": ended.code,
            "seconds": round(ended.seconds, 1),
            "resumed_at": resumed,
            "off": off,
            "as_promised": wanted and off <= d.tolerance,
        }
        print(row(record), flush=True)
        found.append(record)

    print(HEAD, flush=True)
    first = d.go("undisturbed", gpus, save_steps=d.iterations)
    if first.code:
        raise SystemExit(f"the undisturbed run ended with {first.code}:\n{first.text[-3000:]}")
    last, terminate = gpus - 1, lambda pid: os.kill(pid, signal.SIGTERM)

    if "stopped" in names:
        stopped = d.go("stopped", gpus, terminate, r"iter +4/")
        half = d.go("stopped", gpus // 2, terminate, r"iter +\d+/")
        again = d.go("stopped", gpus)
        wanted = (stopped.code, half.code, again.code) == (75, 75, 0)
        resumed = first_resumed(half.text)
        wanted = wanted and resumed == saved(stopped.text) + 1 and first_resumed(again.text) == saved(half.text) + 1
        note(f"SIGTERM on {gpus}, again on {gpus // 2}, to the end on {gpus}", stopped, wanted, "stopped", resumed)

    for name, number in (("killed", signal.SIGKILL), ("hung", signal.SIGSTOP)):
        if name not in names:
            continue
        ended = d.go(name, gpus, lambda pid, n=number: os.kill(worker(pid, last), n), SAVED)
        again = d.go(name, gpus)
        resumed = first_resumed(again.text)
        wanted = ended.code == (128 + signal.SIGKILL if name == "killed" else 1) and f"rank {last}" in ended.text
        wanted = wanted and again.code == 0 and resumed == saved(ended.text) + 1
        note(f"{number.name} of rank {last}, to the end on {gpus}", ended, wanted, name, resumed)
    if all(record["as_promised"] for record in found):  # else keep logs and checkpoints for analysis
        shutil.rmtree(folder)
    return found


HEAD = "| what | exit code | gone after s | resumed at iteration | largest difference of a loss | as promised |\n"
HEAD += "|---|---|---|---|---|---|"


def row(r: Mapping[str, Any]) -> str:
    promised = "yes" if r["as_promised"] else "NO"
    cells = (r["what"], r["code"], r["seconds"], r["resumed_at"], f"{r['off']:.1e}", promised)
    return "| " + " | ".join(map(str, cells)) + " |"
