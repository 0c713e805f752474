"""The global order of packs, each rank's share of it, and the position from which a run goes on.

Epoch e visits `RandomState(seed + e).permutation(packs)`. Rank r of n takes `permutation[offset:][r::n]`, cut so that
all ranks get equally many. The position (epoch, offset) says nothing of ranks: a run may go on with another number.
"""

import json
import mmap
import os
import zlib
from collections.abc import Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from xtuner.core import dist
from xtuner.core.errors import ConfigError
from xtuner.data.place import Place, tell_once

Numbers = npt.NDArray[np.integer[Any]]
VERSION = 1
HEADER = 4096
SHARED_FROM = 2**20  # packs; the order of fewer takes each rank 4 MB
CHUNK = 4096  # numbers made into Python's at a time


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
        self._place = getattr(getattr(dataset, "documents", None), "place", None)
        self._drawn: tuple[int, Numbers] | None = None

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def permutation(self) -> Numbers:
        """All packs in this epoch's order [num_packs]. Of many packs it is one mapped file for all ranks of a node."""
        if not self.shuffle:
            return np.arange(self.num_packs)
        if self._drawn is None or self._drawn[0] != self.epoch:
            self._drawn = self.epoch, permutation(self.seed + self.epoch, self.num_packs, self._place)
        return self._drawn[1]

    def share(self, offset: int = 0) -> Numbers:
        """This rank's packs from `offset` to the end of the epoch."""
        stop = offset + (self.num_packs - offset) // self.world_size * self.world_size
        if not self.shuffle:
            return np.arange(offset + self.rank, stop, self.world_size)
        return self.permutation()[offset:stop][self.rank :: self.world_size]

    def __iter__(self) -> Iterator[int]:
        return numbers(self.share())

    def __len__(self) -> int:
        return self.num_packs // self.world_size

    def describe(self) -> dict[str, Any]:
        """What the order depends on, for checkpoints."""
        return {"shuffle": self.shuffle, "seed": self.seed}


def numbers(share: Numbers) -> Iterator[int]:
    """As Python integers, a few at a time: as a list they would take ten times the memory."""
    for i in range(0, len(share), CHUNK):
        yield from share[i : i + CHUNK].tolist()


def permutation(seed: int, packs: int, place: Place | None = None) -> Numbers:
    """`RandomState(seed).permutation(packs)`; of many packs a mapped file in `place`, made by who comes first."""
    if place is None or packs < SHARED_FROM:
        return _draw(seed, packs)
    name = f"packs-{seed}-{packs}.order"
    for path in place.candidates(name):
        if (found := _open(path, seed, packs)) is not None:
            return found
    with place.alone():
        for path in place.candidates(name):  # another process was faster
            if (found := _open(path, seed, packs)) is not None:
                return found
        drawn = _draw(seed, packs)
        written = place.write(name, lambda f: _fill(f, drawn, seed), f"the order of {packs:,} packs")
    found = _open(written, seed, packs) if written else None
    return drawn if found is None else found


def _dtype(packs: int) -> np.dtype[Any]:
    return np.dtype(np.uint32 if packs < 2**32 else np.int64)


def _draw(seed: int, packs: int) -> Numbers:
    order: Numbers = np.arange(packs, dtype=_dtype(packs))  # the draws do not depend on the type
    np.random.RandomState(seed).shuffle(order)
    return order


def _fill(f: IO[bytes], order: Numbers, seed: int) -> None:
    facts = {"xtuner order of packs": VERSION, "seed": seed, "packs": len(order)}
    f.write(json.dumps(facts | {"crc32": zlib.crc32(order.data)}).encode().ljust(HEADER - 1) + b"\n")
    f.write(order.data)


def _open(path: Path, seed: int, packs: int) -> Numbers | None:
    """The order in a file; None, told, if it is not whole."""
    try:
        with open(path, "rb") as f:
            facts = json.loads(f.read(HEADER))
            size = os.fstat(f.fileno()).st_size
            dtype = _dtype(packs)
            ours = (facts["xtuner order of packs"], facts["seed"], facts["packs"]) == (VERSION, seed, packs)
            if ours and size == HEADER + packs * dtype.itemsize:
                mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
                if zlib.crc32(memoryview(mapped)[HEADER:]) == facts["crc32"]:
                    found: Numbers = np.frombuffer(mapped, dtype, packs, HEADER)
                    return found
    except (OSError, ValueError, KeyError, TypeError):
        pass
    tell_once(f"the order of packs {path} is torn or of another version: it is made again")
    return None
