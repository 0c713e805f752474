"""The time that ranks wait for the slowest one, and how much less it is if packs are balanced by attention cost.

A pack takes  fixed + a + b · Σ len²  over its documents: matrix products depend on the number of tokens, which is the
same for all packs; attention depends on the lengths of documents. All ranks of an iteration wait for the slowest.

Packs are assigned to ranks as in training (xtuner/data/loading/balance.py): over windows of iterations
(`train_dataloader.balance`), or within each iteration, which only matters with several packs per rank.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from xtuner.data.inspect.statistics import pack_costs
from xtuner.data.loading import balance

Floats = npt.NDArray[np.float64]
Time = Callable[[Floats], Floats]  # of packs of these costs, in any unit

RANKS = (2, 4, 8, 64)
WAYS = (  # packs per rank, window of iterations, label
    (1, 0, "one pack per rank, not balanced"),
    (1, 4, "in 4 iterations"),
    (1, 16, "in 16 iterations"),
    (1, 64, "in 64 iterations"),
    (4, 0, "4 packs per rank, not balanced"),
    (4, 1, "in each iteration"),
    (4, 16, "in 16 iterations"),
)
MIXES = {
    "lognormal, median 700": 0.0,
    "the same, 10 % of tokens in documents of 32k": 0.1,
    "the same, 50 % of tokens in documents of 32k": 0.5,
}


def squares(lengths: npt.NDArray[np.int64], pack: int) -> Floats:
    """Σ len² of each pack: documents are concatenated and cut every `pack` tokens; the tail is dropped."""
    return pack_costs(np.cumsum(lengths), pack).astype(float)


def lengths(tokens: int, pack: int, long: float, seed: int = 0) -> npt.NDArray[np.int64]:
    """Document lengths as in workloads.py, with the share `long` of all tokens in documents of `pack` tokens."""
    draw = np.random.RandomState(seed)
    short = int(tokens * (1 - long))
    drawn = draw.lognormal(np.log(700), 1.0, size=short // 800 + 1)
    usual = np.clip(drawn, 2, pack).astype(np.int64)
    usual = usual[: int(np.searchsorted(np.cumsum(usual), short)) + 1]
    every = np.concatenate((usual, np.full(int(tokens * long) // pack, pack)))
    draw.shuffle(every)
    return every


def waiting(costs: Floats, ranks: int, window: int = 1, each: int = 1, time: Time = lambda costs: costs) -> float:
    """Share of an iteration that the average rank waits for the slowest, over full windows of packs."""
    together = ranks * each * max(window, 1)
    if len(costs) < together:
        raise ValueError(f"{len(costs)} packs are fewer than {window} iterations of {ranks} ranks")
    return balance.waiting_share(costs[: len(costs) // together * together], time, ranks, each, window)


def table(models: dict[str, Any], packs: int = 2**15) -> str:
    """For each model (with fixed, a, b in ms) and mix of documents: the wait, unbalanced and balanced."""
    head = [f"{r} ranks" for r in RANKS]
    lines = [f"| model, documents | Σ len² of a pack, mean ± deviation | balanced | {' | '.join(head)} |"]
    lines.append("|---|---|---|" + "---|" * len(RANKS))
    for mix, long in MIXES.items():
        s = squares(lengths(packs * 32768, 32768, long), 32768)
        for name, model in models.items():

            def time(costs: Floats, model: Any = model) -> Floats:
                return model.fixed + model.a + model.b * costs

            for i, (each, window, how) in enumerate(WAYS):
                cells = " | ".join(f"{waiting(s, ranks, window, each, time):.2%}" for ranks in RANKS)
                label = "" if i else f"{name}, {mix}"
                spread = "" if i else f"({s.mean() / 1e6:.0f} ± {s.std() / 1e6:.0f})·10⁶"
                lines.append(f"| {label} | {spread} | {how} | {cells} |")
    return "\n".join(lines)
