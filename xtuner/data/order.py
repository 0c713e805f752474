"""The global order of packs, each rank's share of it, and the position from which a run goes on.

Epoch e visits `RandomState(seed + e).permutation(packs)`. Rank r of n takes `permutation[offset:][r::n]`, cut so that
all ranks get equally many. The position (epoch, offset) says nothing of ranks: a run may go on with another number.
"""

from collections.abc import Iterator, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from xtuner.core import dist
from xtuner.core.errors import ConfigError


@dataclass(frozen=True)
class Position:
    """Where in the data a run is: `offset` packs of epoch `epoch` have been trained on, by all ranks together."""

    epoch: int = 0
    offset: int = 0

    def advance(self, packs: int, num_packs: int, dp_size: int) -> "Position":
        """The position after `packs` more packs (a multiple of `dp_size`), which may lie in a later epoch.

        `num_packs` is the length of an epoch. The last `< dp_size` packs of an epoch are not visited.
        """
        epoch, offset = self.epoch, self.offset
        while packs:
            left = (num_packs - offset) // dp_size * dp_size
            taken = min(packs, left)
            packs -= taken
            offset += taken
            if num_packs - offset < dp_size:
                epoch, offset = epoch + 1, 0
        return Position(epoch, offset)

    def packs_until(self, epochs: int, num_packs: int, dp_size: int) -> int:
        """Packs that all ranks together will still visit until `epochs` epochs are complete."""
        if self.epoch >= epochs:
            return 0
        this = (num_packs - self.offset) // dp_size * dp_size
        return this + (epochs - self.epoch - 1) * (num_packs // dp_size * dp_size)


class InternRepoSampler:
    """Pack numbers of one rank for one epoch.

    Args:
        dataset: anything with a length.
        shuffle: a new permutation each epoch, or 0, 1, 2, …
        seed: epoch e is drawn from `RandomState(seed + e)`. InternEvo's and XTuner's samplers use 1024 whatever they
            are told; ours uses what it is told.
        rank, world_size: which share; None for this process's own.
    """

    def __init__(
        self,
        dataset: Sized,
        shuffle: bool = True,
        seed: int = 1024,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self.num_packs = len(dataset)
        self.shuffle = shuffle
        self.seed = seed
        self.rank = dist.rank() if rank is None else rank
        self.world_size = dist.world_size() if world_size is None else world_size
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(f"rank {self.rank} of {self.world_size}", where="train_dataloader.sampler")
        self.epoch = 0
        self._drawn: tuple[int, npt.NDArray[np.int64]] | None = None

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def permutation(self) -> npt.NDArray[np.int64]:
        """All packs in this epoch's order, int64 [num_packs]."""
        if not self.shuffle:
            return np.arange(self.num_packs)
        if self._drawn is None or self._drawn[0] != self.epoch:
            self._drawn = self.epoch, np.random.RandomState(self.seed + self.epoch).permutation(self.num_packs)
        return self._drawn[1]

    def share(self, offset: int = 0) -> npt.NDArray[np.int64]:
        """This rank's packs from `offset` to the end of the epoch."""
        order = self.permutation()[offset:]
        order = order[: len(order) // self.world_size * self.world_size]
        return order[self.rank :: self.world_size]

    def __iter__(self) -> Iterator[int]:
        return iter(self.share().tolist())

    def __len__(self) -> int:
        return self.num_packs // self.world_size

    def describe(self) -> dict[str, Any]:
        """What the order depends on, for checkpoints."""
        return {"shuffle": self.shuffle, "seed": self.seed}
