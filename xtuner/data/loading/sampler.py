"""The global order of packs, each rank's share of it, and the position from which a run continues.

Epoch e visits `RandomState(seed + e).permutation(packs)`. For training all epochs are one stream, laid end to end:

    permutation_0[:E] | permutation_1[:E] | permutation_2[:E] | …      E: packs, cut to a multiple of the number of
    ─────────────────────────▲ position: rank r of n takes stream[position:][r::n]       ranks the run was begun on

E belongs to the run and the position says nothing of ranks, so another number of ranks sees the same stream. As long
as the number stays, this is the reference's sampler: `permutation[:E][r::n]`, epoch after epoch. Where packs are dealt
by cost (balance.py), another rank of the same iteration may take a pack.
"""

import mmap
import os
import zlib
from collections.abc import Iterator, Sized
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from xtuner.core.errors import ConfigError
from xtuner.data.format.cache_dirs import CacheDirs, log_once
from xtuner.data.format.cache_file import HEADER_BYTES, CacheFormat
from xtuner.dist.mesh import arrange

Numbers = npt.NDArray[np.integer[Any]]
FORMAT = CacheFormat("xtuner order of packs", 1)
SHARED_FROM = 2**20  # packs; the order of fewer takes each rank 4 MB
CHUNK = 4096  # numbers made into Python's at a time


def packs_per_epoch(num_packs: int, begun_on: int) -> int:
    """E: what an epoch of the stream visits; the last `< begun_on` packs of its permutation are not visited."""
    return num_packs // begun_on * begun_on


@dataclass(frozen=True)
class Position:
    """Where in the data a run is: `offset` packs of epoch `epoch` have been trained on, by all ranks together."""

    epoch: int = 0
    offset: int = 0

    def advance(self, packs: int, per_epoch: int) -> "Position":
        """The position after `packs` more packs of a stream that visits `per_epoch` packs an epoch."""
        if self.offset >= per_epoch:  # of older versions, which after a change of ranks visited more
            return Position(self.epoch + 1).advance(packs, per_epoch)
        epochs, offset = divmod(self.offset + packs, per_epoch)
        return Position(self.epoch + epochs, offset)

    def packs_before(self, per_epoch: int) -> int:
        """Packs of the stream, of all epochs, that lie before this position."""
        position = self.advance(0, per_epoch)
        return position.epoch * per_epoch + position.offset

    def __str__(self) -> str:
        return f"epoch {self.epoch + 1}, pack {self.offset:,} of it"


class InternRepoSampler:
    """Pack numbers of one rank for one epoch.

    Args:
        dataset: anything with a length.
        shuffle: a new permutation each epoch, or 0, 1, 2, …
        seed: epoch e is drawn from `RandomState(seed + e)`. InternEvo's and XTuner's samplers use 1024 whatever they
            are told; ours uses what it is told.
        rank, world_size: which share: those of the data-parallel ranks. None where all processes take packs.
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
        mesh = arrange()
        self.rank = mesh.dp_rank if rank is None else rank
        self.world_size = mesh.dp_size if world_size is None else world_size
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(f"rank {self.rank} of {self.world_size}", where="train_dataloader.sampler")
        self.epoch = 0
        self._cache_dirs = getattr(getattr(dataset, "documents", None), "cache_dirs", None)
        self._drawn: tuple[int, Numbers] | None = None

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def permutation(self) -> Numbers:
        """All packs in this epoch's order [num_packs]. Of many packs it is one mapped file for all ranks of a node."""
        if not self.shuffle:
            return np.arange(self.num_packs)
        if self._drawn is None or self._drawn[0] != self.epoch:
            self._drawn = self.epoch, permutation(self.seed + self.epoch, self.num_packs, self._cache_dirs)
        return self._drawn[1]

    def share(self, offset: int = 0) -> Numbers:
        """This rank's packs from `offset` to the end of the epoch, cut so that all ranks get equally many."""
        stop = offset + (self.num_packs - offset) // self.world_size * self.world_size
        return self._every(offset + self.rank, stop, self.world_size)

    def stream(self, position: Position, per_epoch: int, reshuffle: bool = True) -> Iterator[Numbers]:
        """This rank's packs from `position` on, an epoch at a time, without end: `stream[position:][r::n]`.

        Args:
            per_epoch: E, which the number of ranks that the run was begun on decides.
            reshuffle: a new permutation each epoch; otherwise epoch 0's again.
        """
        position = position.advance(0, per_epoch)
        offset, skip = position.offset, self.rank  # packs of the epoch that lie before this rank's next one
        for epoch in count(position.epoch):
            self.set_epoch(epoch if reshuffle else 0)
            yield self._every(offset + skip, per_epoch, self.world_size)
            skip = (skip - (per_epoch - offset)) % self.world_size
            offset = 0

    def packs(self, begin: int, stop: int, per_epoch: int, reshuffle: bool = True) -> Numbers:
        """`stream[begin:stop]`, the packs of all ranks."""
        parts = []
        for epoch in range(begin // per_epoch, (stop - 1) // per_epoch + 1):
            self.set_epoch(epoch if reshuffle else 0)
            before = epoch * per_epoch
            parts.append(self._every(max(begin - before, 0), min(stop - before, per_epoch), 1))
        return np.concatenate(parts)

    def _every(self, begin: int, stop: int, step: int) -> Numbers:
        """The permutation's packs [begin:stop:step]; a view."""
        if not self.shuffle:
            return np.arange(begin, stop, step)
        return self.permutation()[begin:stop:step]

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


def permutation(seed: int, packs: int, cache_dirs: CacheDirs | None = None) -> Numbers:
    """`RandomState(seed).permutation(packs)`; of many packs a mapped file in `cache_dirs`, made by who comes first."""
    if cache_dirs is None or packs < SHARED_FROM:
        return _draw(seed, packs)
    name = f"packs-{seed}-{packs}.order"
    for path in cache_dirs.candidates(name):
        if (found := _open(path, seed, packs)) is not None:
            return found
    with cache_dirs.locked():
        for path in cache_dirs.candidates(name):  # another process was faster
            if (found := _open(path, seed, packs)) is not None:
                return found
        drawn = _draw(seed, packs)
        written = cache_dirs.write(name, lambda f: _fill(f, drawn, seed), f"the order of {packs:,} packs")
    found = _open(written, seed, packs) if written else None
    return drawn if found is None else found


def _dtype(packs: int) -> np.dtype[Any]:
    return np.dtype(np.uint32 if packs < 2**32 else np.int64)


def _draw(seed: int, packs: int) -> Numbers:
    order: Numbers = np.arange(packs, dtype=_dtype(packs))  # the draws do not depend on the type
    np.random.RandomState(seed).shuffle(order)
    return order


def _fill(f: IO[bytes], order: Numbers, seed: int) -> None:
    f.write(FORMAT.header(seed=seed, packs=len(order), crc32=zlib.crc32(order.data)))
    f.write(order.data)


def _open(path: Path, seed: int, packs: int) -> Numbers | None:
    """The order in a file; None, told, if it is not whole."""
    try:
        with open(path, "rb") as f:
            facts = FORMAT.read_header(f.read(HEADER_BYTES))
            size = os.fstat(f.fileno()).st_size
            dtype = _dtype(packs)
            right = (facts.get("seed"), facts.get("packs")) == (seed, packs)
            if right and size == HEADER_BYTES + packs * dtype.itemsize:
                mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
                if zlib.crc32(memoryview(mapped)[HEADER_BYTES:]) == facts.get("crc32"):
                    found: Numbers = np.frombuffer(mapped, dtype, packs, HEADER_BYTES)
                    return found
    except (OSError, ValueError):
        pass
    log_once(f"the order of packs {path} is damaged or of another version: it is made again")
    return None
