"""What ranks lose by waiting for the slowest, and what dealing packs by their attention cost would give back.

A pack's time is  fixed + a + b · Σ len²  over its documents: matrix products and the like depend on tokens alone, which
are equally many in all packs; attention on documents' lengths. All ranks of an iteration wait for the slowest.

Packs are dealt as training deals them (xtuner/data/loading/balance.py): in windows of iterations
(`train_dataloader.balance`), or within each iteration, which has an effect only with several packs a rank.
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
WAYS = (  # packs a rank, iterations dealt together, in words
    (1, 0, "one pack a rank, not dealt"),
    (1, 4, "in 4 iterations"),
    (1, 16, "in 16 iterations"),
    (1, 64, "in 64 iterations"),
    (4, 0, "4 packs a rank, not dealt"),
    (4, 1, "in each iteration"),
    (4, 16, "in 16 iterations"),
)
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


def waiting(costs: Floats, ranks: int, window: int = 1, each: int = 1, time: Time = lambda costs: costs) -> float:
    """Part of an iteration that the average rank waits for the slowest, over full windows of packs."""
    together = ranks * each * max(window, 1)
    if len(costs) < together:
        raise ValueError(f"{len(costs)} packs are no {window} iterations of {ranks} ranks")
    return balance.waiting_share(costs[: len(costs) // together * together], time, ranks, each, window)


def table(models: dict[str, Any], packs: int = 2**15) -> str:
    """For each model (see predict.py: fixed, a, b in ms) and mix: the wait, and what dealing leaves of it."""
    head = [f"{r} ranks" for r in RANKS]
    lines = [f"| model, documents | Σ len² of a pack, mean ± deviation | dealt | {' | '.join(head)} |"]
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
