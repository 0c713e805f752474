"""Runs `xtuner train` to its end or to a time limit; reads, compares and draws the losses."""

import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from benchlib.command_output import stream_lines

WINDOW = 20  # iterations that a point of a drawn curve is the mean of, and from whose median a spike rises
TOLERANCE = 0.003  # by how much of the reference's loss another may be above it
SPIKE = 0.1  # nats that no curve needs to explain
NEVER = r"(?!)"


@dataclass(frozen=True)
class Curve:
    """Training losses of the iterations 1, 2, …; iteration → loss on unseen documents; median speed."""

    losses: list[float]
    unseen: dict[int, float]
    tokens_per_s: float

    def last_tenth(self, iterations: int) -> float:
        """Mean over the last tenth of that many iterations."""
        return statistics.mean(self.losses[iterations - max(iterations // 10, 1) : iterations])


def read_curve(work: Path) -> Curve | None:
    """The losses of all starts of a run; None if there are none yet. A start replaces what was logged of the iterations
    that it repeats."""
    records: dict[int, dict[str, float]] = {}
    unseen: dict[int, float] = {}
    for file in sorted(work.glob("*/vis_data/scalars.json")):
        found = [json.loads(line) for line in file.read_text().split("\n")[:-1]]
        begin = min((r["iter"] for r in found), default=math.inf)
        records = {i: r for i, r in records.items() if i < begin}
        unseen = {i: loss for i, loss in unseen.items() if i < begin}
        records |= {r["iter"]: r for r in found if "loss" in r}
        unseen |= {r["iter"]: r["val_loss"] for r in found if "val_loss" in r}
    losses = [records[i]["loss"] for i in sorted(records)]
    speed = statistics.median(r["tokens_per_s"] for r in records.values()) if records else math.nan
    return Curve(losses, unseen, speed) if losses else None


def train(
    config: Path,
    work: Path,
    options: Sequence[str],
    iterations: int,
    seconds: float,
    save: bool,
    resumable: bool,
    report: Callable[[], None],
) -> str:
    """Train until the loss on unseen documents is logged after that many iterations. Returns the end of the output.

    Args:
        options: of the command `xtuner train`.
        seconds: a limit; a resumable run then saves a checkpoint, which takes more time.
        save: also write the last checkpoint.
        resumable: continue from the newest checkpoint of `work`, if any; checkpoints have the optimizer's state.
        report: called about every half minute.
    """
    words = [sys.executable, "-m", "xtuner.cli.main", "train", str(config), "--work-dir", str(work)]
    words += [*options, *(["--resume"] if resumable else [])]
    deadline, due, requested = time.monotonic() + seconds, time.monotonic() + 30, False
    last: list[str] = []
    finished = rf"validation at iteration {iterations}:"
    for _, line in stream_lines(words, NEVER if save else finished, deadline=math.inf if resumable else deadline):
        last = [*last[-30:], line]
        if re.search(finished, line):
            _await_record(work, iterations)
        if resumable and not requested and time.monotonic() > deadline and " iter " in line:
            (work / "STOP").touch()
            requested = True
        if time.monotonic() > due:
            report()
            due = time.monotonic() + 30
    return "".join(last)


def _await_record(work: Path, iterations: int) -> None:
    """Wait until the loss of a line that has been logged is also in the run's records, so that it may be killed."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and iterations not in getattr(read_curve(work), "unseen", {}):
        time.sleep(0.05)


@dataclass(frozen=True)
class Verdict:
    """A curve next to the reference's, over the iterations that both have; `unseen` at the last one where both were
    evaluated. Shares are of the reference's loss, above 0 where it is lower.

    A spike is by how much (own loss - reference's loss, which is of the same tokens) rises above its median over the 20
    iterations before, or above 0 where that is more: the end of a spike of the other is none. After the first tenth of
    the run. The reference's spikes are those of the opposite difference.
    """

    iterations: int
    last_tenth: float
    unseen: float
    spike: float
    reference_spike: float

    @property
    def passed(self) -> bool:
        limit = max(SPIKE, self.reference_spike)
        return self.last_tenth <= TOLERANCE and self.unseen <= TOLERANCE and self.spike <= limit


def judge(curve: Curve, reference: Curve) -> Verdict | None:
    """None if they have too little in common."""
    n = min(len(curve.losses), len(reference.losses))
    evaluated = [i for i in curve.unseen if i in reference.unseen and i <= n]
    if n <= 2 * WINDOW or not evaluated:
        return None
    difference = np.array(curve.losses[:n]) - np.array(reference.losses[:n])
    return Verdict(
        n,
        curve.last_tenth(n) / reference.last_tenth(n) - 1,
        curve.unseen[max(evaluated)] / reference.unseen[max(evaluated)] - 1,
        _largest_spike(difference),
        _largest_spike(-difference),
    )


def _largest_spike(difference: np.ndarray) -> float:
    begin = max(WINDOW, len(difference) // 10)
    before = [np.median(difference[i - WINDOW : i]) for i in range(begin, len(difference))]
    return float((difference[begin:] - np.maximum(before, 0)).max())


def smooth(losses: Sequence[float]) -> np.ndarray:
    return np.convolve(losses, np.ones(WINDOW) / WINDOW, "valid")


def draw(panels: Mapping[str, Mapping[str, Sequence[float]]], picture: Path, label: str = "nats per token") -> None:
    """One panel after another: title → name → values that begin at iteration WINDOW."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, places = pyplot.subplots(1, len(panels), figsize=(5.5 * len(panels), 4), layout="constrained")
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    for axes, (title, curves) in zip(np.atleast_1d(places), panels.items(), strict=True):
        for name, values in curves.items():
            at = WINDOW + np.arange(len(values))
            axes.plot(at, values, color=f"C{names.index(name)}", label=name, linewidth=1)
        axes.set(title=title, xlabel="iteration")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    np.atleast_1d(places)[0].set(ylabel=label)
    figure.savefig(picture, dpi=100)
    pyplot.close(figure)
