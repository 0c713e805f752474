"""Reports loss spikes, with the documents of the iteration, and plateaus. Each is reported once.

A spike begins with a loss that is above the usual one by SPIKE times the usual deviation, and by LEAST of it; it ends
when the loss is within half of that distance. "Usual" is a mean over earlier iterations with exponential decay, to
which a spike contributes no more than the threshold; a deviation is absolute, as outliers would inflate a variance.

A plateau is a tenth of the run (FEWEST iterations at least) whose mean loss is not below that of the tenth before by
more than twice the standard error of their difference.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any

from xtuner.core.log import logger
from xtuner.data.loading.sampler import Position
from xtuner.train.run import Iteration, Run

DECAY = 0.98  # as of the smoothed loss: an iteration's weight halves every 34 iterations
SPIKE = 10.0  # mean absolute deviations; 8 standard deviations of normal noise
LEAST = 0.05  # of the usual loss
WARM_UP = 50  # iterations after a start until anything is usual
FEWEST = 500  # iterations of a plateau
MOST = 20  # spikes in the log of a start; further ones are in events.json only
SHOWN, STORED = 4, 64  # packs in the log and in events.json


class Spikes:
    """Finds spikes in a sequence of losses."""

    def __init__(self) -> None:
        self._count, self._inside = 0, False
        self._mean = self._deviation = 0.0

    def find(self, loss: float) -> tuple[float, float] | None:
        """Add a loss. At the begin of a spike returns (usual loss, usual deviations above it)."""
        above, limit = loss - self._mean, max(SPIKE * self._deviation, LEAST * abs(self._mean))
        begins = self._count >= WARM_UP and not self._inside and above > limit
        usual = self._mean, above / max(self._deviation, 1e-12)
        if self._count >= WARM_UP:
            self._inside = above > (limit / 2 if self._inside else limit)
            above = min(above, limit)
        self._count += 1
        weight = max(1 - DECAY, 1 / self._count)
        self._deviation += weight * (abs(above) - self._deviation) if self._count > 1 else 0.0
        self._mean += weight * above
        return usual if begins else None


class Plateaus:
    """Finds blocks of losses that are not below those before. `length`: iterations of a block."""

    def __init__(self, length: int) -> None:
        self.length = length
        self._before: tuple[float, float] | None = None  # mean of the block before, and the square of its error
        self._inside = False
        self._sum = self._squares = 0.0
        self._count = 0

    def find(self, loss: float) -> tuple[float, float] | None:
        """Add a loss. At the end of a plateau's first block returns (mean of the block before, of this one)."""
        self._count, self._sum, self._squares = self._count + 1, self._sum + loss, self._squares + loss * loss
        if self._count < self.length:
            return None
        mean = self._sum / self._count
        error = max(self._squares / self._count - mean * mean, 0.0) / self._count
        before, self._before = self._before, (mean, error)
        self._count, self._sum, self._squares = 0, 0.0, 0.0
        flat = before is not None and before[0] - mean <= 2 * math.sqrt(before[1] + error)
        begins, self._inside = flat and not self._inside, flat
        return (before[0], mean) if before and begins else None


@dataclass
class LossWatch:
    """Watches the loss of a run, on rank 0. It sends no messages: the packs of all ranks follow from the position.

    Args:
        begun: position before the next iteration.
    """

    begun: Position
    plateaus: Plateaus
    spikes: Spikes
    reported: int = 0

    @classmethod
    def start(cls, run: Run) -> "LossWatch":
        return cls(run.state.position, Plateaus(max(run.max_iterations // 10, FEWEST)), Spikes())

    def add(self, run: Run, it: Iteration) -> None:
        begun, self.begun = self.begun, it.state.position
        if not it.num_targets or not math.isfinite(it.loss):  # reported as a step that was not applied
            return
        if found := self.spikes.find(it.loss):
            self._report_spike(run, it, begun, *found)
        if flat := self.plateaus.find(it.loss):
            before, mean = flat
            length = self.plateaus.length
            text = f"mean loss {mean:.4f} of the last {length:,} iterations, {before:.4f} of the {length:,} before"
            logger.warning(f"plateau at iteration {it.state.iteration}: {text}")
            run.metrics.event("plateau", it.state.iteration, reason=text)

    def _report_spike(self, run: Run, it: Iteration, begun: Position, usual: float, deviations: float) -> None:
        number, data = it.state.iteration, run.loader.dataset
        packs = run.loader.packs_of_iteration(begun)
        text = f"loss {it.loss:.4f}, {deviations:.1f} usual deviations above the usual {usual:.4f}"
        found = [describe_pack(data, pack) for pack in packs[:STORED]]
        run.metrics.event(
            "spike", number, reason=text, loss=it.loss, usual=usual, grad_norm=it.grad_norm, packs=found,
            num_packs=len(packs),
        )  # fmt: skip
        self.reported += 1
        if self.reported > MOST:
            return
        lines = [f"pack {p['pack']}: documents {_list(p.get('documents', []))} of {p['file']}" for p in found[:SHOWN]]
        if len(packs) > SHOWN:
            lines.append(f"and {len(packs) - SHOWN} more packs, listed in events.json")
        if self.reported == MOST:
            lines.append("further spikes of this start are listed in events.json only")
        show = f"look at a pack: {data.show_command(packs[0], '--tokenizer DIR')}" if packs else ""
        logger.warning("\n        ".join([f"loss spike at iteration {number}: {text}", *lines, show]).rstrip())


def describe_pack(data: Any, pack: int) -> dict[str, Any]:
    """File of a pack and numbers of its documents, without reading tokens; a user's own dataset may know no numbers."""
    file, start = data.locate(pack)
    found: dict[str, Any] = {"pack": pack, "file": data.documents.file(file).name}
    if hasattr(data, "file_packs"):
        rows = data.file_packs(file).span_arrays(start, start + data.packed_length).rows
        found["documents"] = rows.tolist()
    return found


def _list(documents: list[int]) -> str:
    """`[3, 4, 5, 9]` → `3 … 5, 9`."""
    ordered = sorted(set(documents))
    runs = [[n for _, n in group] for _, group in itertools.groupby(enumerate(ordered), lambda pair: pair[1] - pair[0])]
    shown = [f"{run[0]} … {run[-1]}" if run[1:] else str(run[0]) for run in runs]
    return ", ".join(shown[:12]) + (f", … ({len(ordered)} in all)" if shown[12:] else "") if shown else "unknown"
