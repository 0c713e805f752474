"""Runs `xtuner train` to its end, reads the losses, and draws them."""

import json
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from benchlib.xtuner_training import stream_lines

UNSEEN = r"validation at iteration .*\ball ([\d.]+)"
WINDOW = 20  # iterations that a point of a curve is the mean of
NEVER = r"(?!)"


@dataclass(frozen=True)
class Curve:
    """Training losses of all iterations, and the loss on unseen documents after the last."""

    losses: list[float]
    unseen: float

    @property
    def quarters(self) -> str:
        each = len(self.losses) // 4
        return " ".join(f"{statistics.mean(self.losses[i : i + each]):.4f}" for i in range(0, 4 * each, each))

    def last(self, iterations: int) -> float:
        return statistics.mean(self.losses[-iterations:])


def train(name: str, config: Path, options: Sequence[str], work: Path, save: bool = False) -> Curve:
    """Train until the loss on unseen documents is logged, or with `save` until the last checkpoint is written."""
    words = [sys.executable, "-m", "xtuner.cli.main", "train", str(config), "--work-dir", str(work), "--cfg-options"]
    words += [*options, "evaluation_inputs=[]", "save_optimizer=False", "default_hooks.logger.interval=1"]
    lines = [line for _, line in stream_lines(words, NEVER if save else UNSEEN)]
    unseen = next((found for line in lines if (found := re.search(UNSEEN, line))), None)
    if unseen is None:
        raise SystemExit(f"{name} did not finish:\n{''.join(lines[-30:])}")
    (scalars,) = work.glob("*/vis_data/scalars.json")
    losses = [r["loss"] for r in map(json.loads, scalars.read_text().splitlines()) if "loss" in r]
    return Curve(losses, float(unseen[1]))


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
