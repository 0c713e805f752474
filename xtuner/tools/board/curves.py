"""The curves of a run, joined over its starts and reduced to what a screen can show.

In every bucket of pixels the lowest and the highest value are kept, so that a single spike among 100,000 iterations
stays visible. The x axis is always iterations here; the page converts to tokens and hours with `axes`.
"""

import itertools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xtuner.tools.board.work_dirs import RunFiles

Numbers = NDArray[Any]
AXIS_POINTS = 1000  # of the conversion to tokens and hours
HIDDEN = ("targets", "eta", "tokens")  # figures that are not curves
SMOOTHED = "loss_smoothed"
MARKS = 400  # of one kind; more would cover each other


class Curves:
    """All curves of a run: name → (iterations, values)."""

    def __init__(self, run: RunFiles) -> None:
        self._all: dict[str, tuple[Numbers, Numbers]] = {}
        for key in dict.fromkeys(k for start, _ in run.parts for k in start.curves):
            parts = [(np.array(s.curves[key][0]), np.array(s.curves[key][1]), until)
                     for s, until in run.parts if key in s.curves]  # fmt: skip
            kept = [(i[i <= until], v[i <= until]) if until is not None else (i, v) for i, v, until in parts]
            iterations, values = np.concatenate([i for i, _ in kept]), np.concatenate([v for _, v in kept])
            order = np.argsort(iterations, kind="stable")  # damaged files may not be sorted
            self._all[key] = iterations[order], values[order]

    def last(self, key: str) -> float | None:
        values = self._all[key][1] if key in self._all else np.zeros(0)
        return float(values[-1]) if len(values) and math.isfinite(values[-1]) else None

    @property
    def last_iteration(self) -> int:
        return max((int(i[-1]) for i, _ in self._all.values() if len(i)), default=0)

    def axes(self) -> dict[str, list[float]]:
        """Tokens and hours of training at some iterations, to be interpolated."""
        iterations, seconds = self._all.get("time", (np.zeros(0), np.zeros(0)))
        each = np.diff(iterations, prepend=0)
        hours = np.cumsum(np.where(np.isfinite(seconds), seconds, 0) * each) / 3600
        some = np.unique(np.linspace(0, max(self.last_iteration, 1), AXIS_POINTS).round())
        tokens_at, tokens = self._all.get("tokens", (np.zeros(0), np.zeros(0)))
        return {
            "iter": [int(i) for i in some],
            "tokens": _at(some, tokens_at, tokens),
            "hours": _at(some, iterations, hours),
        }

    def reduce(self, begin: float, end: float, buckets: int, smoothing: float | None) -> dict[str, Any]:
        """Every curve between two iterations: name → [iterations, values], at most four points a bucket.

        Args:
            smoothing: iterations over which `loss_smoothed` averages; None: as the run recorded it.
        """
        shown = {k: c for k, c in self._all.items() if k not in HIDDEN and k != "applied"}
        if smoothing is not None and "loss" in shown:
            iterations, losses = shown["loss"]
            span = (iterations[-1] - iterations[0] + 1) if len(iterations) else 1
            shown[SMOOTHED] = iterations, smooth(losses, round(smoothing * len(losses) / span))
        reduced = {}
        for key, (iterations, values) in shown.items():
            left = max(int(np.searchsorted(iterations, begin)) - 1, 0)  # one more at each side: lines leave the screen
            right = int(np.searchsorted(iterations, end, "right")) + 1
            reduced[key] = reduce_points(iterations[left:right], values[left:right], buckets)
        return reduced

    def unapplied(self) -> list[int]:
        """Iterations of log lines with a step that was not applied although it had targets."""
        iterations, applied = self._all.get("applied", (np.zeros(0), np.zeros(0)))
        counted = dict(zip(*(a.tolist() for a in self._all.get("targets", (np.zeros(0), np.zeros(0)))), strict=True))
        return [int(i) for i in iterations[applied == 0] if counted.get(i, 1) > 0][-MARKS:]


def reduce_points(iterations: Numbers, values: Numbers, buckets: int) -> list[list[Any]]:
    """First, lowest, highest and last point of each bucket, as JSON; values that are not finite become null."""
    if len(iterations) > 4 * buckets:
        edges = np.linspace(0, len(iterations), buckets + 1).astype(int)
        lowest = np.where(np.isfinite(values), values, np.inf)
        highest = np.where(np.isfinite(values), values, -np.inf)
        kept = [0, len(iterations) - 1]
        for left, right in itertools.pairwise(edges):
            kept += [int(left + lowest[left:right].argmin()), int(left + highest[left:right].argmax())]
        gaps = np.flatnonzero(~np.isfinite(values))[:buckets]
        chosen = np.unique(np.concatenate([kept, gaps]).astype(int))
        iterations, values = iterations[chosen], values[chosen]
    return [
        iterations.tolist(),
        [float(f"{v:.6g}") if math.isfinite(v) else None for v in values.tolist()],
    ]


def smooth(values: Numbers, window: int) -> Numbers:
    """As `loss_plot.smooth`: the mean of `window` values around each, smaller towards the first, gaps skipped."""
    number = len(values)
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    place = np.arange(number)
    half = max(window // 2, 0)
    left = np.minimum(half, place)
    right = np.minimum(np.where(place < half, left, half) + place + 1, number)
    inside = counts[right] - counts[place - left]
    total = sums[right] - sums[place - left]
    return np.where(inside > 0, total / np.maximum(inside, 1), np.nan)


def _at(places: Numbers, known: Numbers, values: Numbers) -> list[float]:
    known, values = known[np.isfinite(values)], values[np.isfinite(values)]
    if not len(known):
        return []
    begun = known[0] > 0  # nothing at iteration 0
    known, values = (np.concatenate([[0], a]) if begun else a for a in (known, values))
    return [float(f"{v:.7g}") for v in np.interp(places, known, values)]
