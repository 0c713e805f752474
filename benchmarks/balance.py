"""What ranks lose by waiting for the slowest, and what dealing packs by their attention cost would give back.

A pack's time is  fixed + a + b · Σ len²  over its documents: matrix products and the like depend on tokens alone, which
are equally many in all packs; attention on documents' lengths. All ranks of an iteration wait for the slowest.

Dealing: the packs of a window of W iterations are sorted by cost and dealt so that the ranks of an iteration get
neighbours. Every pack is still seen once and the window is seen whole, but which packs meet in an iteration changes
(W = 1: nothing changes). With accumulation an iteration is a window of its own: then no iteration's packs change.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from xtuner.data.stats import pack_costs

Floats = npt.NDArray[np.float64]

RANKS = (2, 4, 8, 64)
WINDOWS = (1, 4, 16, 64)
MIXES = {
    "lognormal, median 700": 0.0,
    "the same, 10 % of tokens in documents of 32k": 0.1,
    "the same, 50 % of tokens in documents of 32k": 0.5,
}


def squares(lengths: npt.NDArray[np.int64], pack: int) -> Floats:
    """Σ len² of each pack, documents laid end to end and cut every `pack` tokens; the tail fills none."""
    return pack_costs(np.cumsum(lengths), pack).astype(float)


def lengths(tokens: int, pack: int, long: float, seed: int = 0) -> npt.NDArray[np.int64]:
    """Documents as synthetic.py draws them, of which so large a part of all tokens lies in documents of `pack`."""
    draw = np.random.RandomState(seed)
    short = int(tokens * (1 - long))
    drawn = draw.lognormal(np.log(700), 1.0, size=short // 800 + 1)
    usual = np.clip(drawn, 2, pack).astype(np.int64)
    usual = usual[: int(np.searchsorted(np.cumsum(usual), short)) + 1]
    every = np.concatenate((usual, np.full(int(tokens * long) // pack, pack)))
    draw.shuffle(every)
    return every


def waiting(times: Floats, ranks: int, window: int = 1) -> float:
    """Part of an iteration that the average rank waits for the slowest, packs dealt in windows of iterations."""
    iterations = len(times) // (ranks * window) * window
    if not iterations:
        raise ValueError(f"{len(times)} packs are no {window} iterations of {ranks} ranks")
    dealt = np.sort(times[: iterations * ranks].reshape(-1, ranks * window), axis=1)
    if window == 1:
        dealt = times[: iterations * ranks]
    each = dealt.reshape(iterations, ranks)
    return float(1 - each.mean() / each.max(axis=1).mean())


def table(models: dict[str, Any], packs: int = 2**15) -> str:
    """For each model (see predict.py: fixed, a, b in ms) and mix: the wait, and what dealing leaves of it."""
    head = [f"{r} ranks" for r in RANKS]
    lines = [f"| model, documents | Σ len² of a pack, mean ± deviation | dealt in windows of | {' | '.join(head)} |"]
    lines.append("|---|---|---|" + "---|" * len(RANKS))
    for mix, long in MIXES.items():
        s = squares(lengths(packs * 32768, 32768, long), 32768)
        for name, model in models.items():
            times = model.fixed + model.a + model.b * s
            for window in WINDOWS:
                cells = " | ".join(f"{waiting(times, ranks, window):.2%}" for ranks in RANKS)
                first = window == WINDOWS[0]
                label = f"{name}, {mix}" if first else ""
                spread = f"({s.mean() / 1e6:.0f} ± {s.std() / 1e6:.0f})·10⁶" if first else ""
                how = f"{window} iterations" if window > 1 else "not dealt"
                lines.append(f"| {label} | {spread} | {how} | {cells} |")
    return "\n".join(lines)
