"""The global order of packs, each rank's share of it, and the position from which a run continues.

Epoch e visits `RandomState(seed + e).permutation(packs)`. For training all epochs are concatenated to one stream:

    permutation_0[:E] | permutation_1[:E] | permutation_2[:E] | …
    ─────────────────────────▲ position: rank r of n takes stream[position:][r::n]

E: the number of packs, rounded down to a multiple of the ranks at the start of the run.

E is fixed for a run and the position is independent of ranks, so that a different number of ranks sees the same stream.
With a constant number of ranks this equals the reference sampler: `permutation[:E][r::n]` in each epoch. Where packs
are balanced by cost (balance.py), a different rank of the same iteration may take a pack.
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
from xtuner.data.loading.mixture_order import MixtureOrder
from xtuner.dist.mesh import make_mesh

PackNumbers = npt.NDArray[np.integer[Any]]
FORMAT = CacheFormat("xtuner order of packs", 1)
SHARED_FROM = 2**20  # packs; for fewer, each rank keeps the order in its own memory (at most 4 MB)
CHUNK = 4096  # numbers converted to Python integers at a time


def packs_per_epoch(num_packs: int, begun_on: int) -> int:
    """E: packs that an epoch of the stream visits. Fewer than `begun_on` packs at the end of its permutation are not
    visited."""
    return num_packs // begun_on * begun_on


def count_epoch_packs(dataset: Any) -> int:
    """Packs of an epoch before they are divided over ranks: of a mixture by its shares, else all."""
    plan = getattr(dataset, "mixture", None)
    return plan.packs if plan else len(dataset)


@dataclass(frozen=True)
class Position:
    """A position in the data: all ranks together have trained on `offset` packs of epoch `epoch`."""

    epoch: int = 0
    offset: int = 0

    def advance(self, packs: int, per_epoch: int) -> "Position":
        """The position after `packs` more packs of a stream that visits `per_epoch` packs an epoch."""
        if self.offset >= per_epoch:  # from an older version, which visited more packs after a change of ranks
            return Position(self.epoch + 1).advance(packs, per_epoch)
        epochs, offset = divmod(self.offset + packs, per_epoch)
        return Position(self.epoch + epochs, offset)

    def packs_before(self, per_epoch: int) -> int:
        """Number of packs of the stream, over all epochs, before this position."""
        position = self.advance(0, per_epoch)
        return position.epoch * per_epoch + position.offset

    def __str__(self) -> str:
        return f"epoch {self.epoch + 1}, pack {self.offset:,} of it"


class InternRepoSampler:
    """Pack numbers of one rank for one epoch.

    Args:
        dataset: anything with a length.
        shuffle: a new permutation each epoch, or 0, 1, 2, …
        seed: epoch e is drawn from `RandomState(seed + e)`. InternEvo's and XTuner's samplers always use 1024 and
            ignore this argument; ours honours it.
        rank, world_size: the data-parallel rank, and the number of these ranks; None for those of this process.
    """

    def __init__(
        self,
        dataset: Sized,
        shuffle: bool = True,
        seed: int = 1024,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self.num_packs = count_epoch_packs(dataset)
        self.shuffle = shuffle
        self.seed = seed
        mesh = make_mesh()
        self.rank = mesh.dp_rank if rank is None else rank
        self.world_size = mesh.dp_size if world_size is None else world_size
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(f"rank {self.rank} of {self.world_size}", where="train_dataloader.sampler")
        self.epoch = 0
        self._cache_dirs = getattr(getattr(dataset, "documents", None), "cache_dirs", None)
        self._drawn: tuple[int, PackNumbers] | None = None
        self.mixture = self._order_of_mixture(dataset)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def _order_of_mixture(self, dataset: Any) -> MixtureOrder | None:
        plan = getattr(dataset, "mixture", None)
        if plan is None:
            return None
        caches = [part.cache_dirs for part in dataset.documents.parts]

        def permutation(source: int, one_pass: int) -> PackNumbers:
            packs = plan.packs_of(source)
            return load_permutation(self.seed + one_pass, packs, caches[source]) if self.shuffle else np.arange(packs)

        return MixtureOrder(plan, permutation)

    def permutation(self) -> PackNumbers:
        """All packs in this epoch's order, [num_packs]. For many packs a mapped file that all ranks of a node share."""
        if self.mixture:
            return self.mixture.numbers(self.epoch, np.arange(self.num_packs), self.num_packs)
        if not self.shuffle:
            return np.arange(self.num_packs)
        if self._drawn is None or self._drawn[0] != self.epoch:
            self._drawn = self.epoch, load_permutation(self.seed + self.epoch, self.num_packs, self._cache_dirs)
        return self._drawn[1]

    def share(self, offset: int = 0) -> PackNumbers:
        """This rank's packs from `offset` to the end of the epoch, cut so that all ranks get the same number."""
        stop = offset + (self.num_packs - offset) // self.world_size * self.world_size
        if self.mixture:
            return self.mixture.numbers(self.epoch, np.arange(offset + self.rank, stop, self.world_size), stop)
        return self._slice(offset + self.rank, stop, self.world_size)

    def stream(self, position: Position, per_epoch: int, reshuffle: bool = True) -> Iterator[PackNumbers]:
        """This rank's packs from `position` on, in arrays, endlessly: `stream[position:][r::n]`.

        Args:
            per_epoch: E, see `packs_per_epoch`.
            reshuffle: a new permutation each epoch; otherwise that of epoch 0.
        """
        position = position.advance(0, per_epoch)
        offset, skip = position.offset, self.rank  # packs of the epoch before this rank's next one
        for epoch in count(position.epoch):
            if self.mixture:
                for begin in range(offset + skip, per_epoch, CHUNK * self.world_size):
                    stop = min(begin + CHUNK * self.world_size, per_epoch)
                    yield self.mixture.numbers(epoch, np.arange(begin, stop, self.world_size), per_epoch, reshuffle)
            else:
                self.set_epoch(epoch if reshuffle else 0)
                yield self._slice(offset + skip, per_epoch, self.world_size)
            skip = (skip - (per_epoch - offset)) % self.world_size
            offset = 0

    def packs(self, begin: int, stop: int, per_epoch: int, reshuffle: bool = True) -> PackNumbers:
        """`stream[begin:stop]`: packs of all ranks."""
        parts: list[PackNumbers] = []
        for epoch in range(begin // per_epoch, (stop - 1) // per_epoch + 1):
            before = epoch * per_epoch
            first, end = max(begin - before, 0), min(stop - before, per_epoch)
            if self.mixture:
                parts.append(self.mixture.numbers(epoch, np.arange(first, end), per_epoch, reshuffle))
                continue
            self.set_epoch(epoch if reshuffle else 0)
            parts.append(self._slice(first, end, 1))
        return np.concatenate(parts)

    def _slice(self, begin: int, stop: int, step: int) -> PackNumbers:
        """The permutation's packs [begin:stop:step]; a view."""
        if not self.shuffle:
            return np.arange(begin, stop, step)
        return self.permutation()[begin:stop:step]

    def __iter__(self) -> Iterator[int]:
        return iterate_numbers(self.share())

    def __len__(self) -> int:
        return self.num_packs // self.world_size

    def describe(self) -> dict[str, Any]:
        """Settings that the order depends on, for checkpoints."""
        return {"shuffle": self.shuffle, "seed": self.seed}


def iterate_numbers(share: PackNumbers) -> Iterator[int]:
    """Yield Python integers, converted in chunks: one list of all would take ten times the memory."""
    for i in range(0, len(share), CHUNK):
        yield from share[i : i + CHUNK].tolist()


def load_permutation(seed: int, packs: int, cache_dirs: CacheDirs | None = None) -> PackNumbers:
    """`RandomState(seed).permutation(packs)`. For many packs a mapped file in `cache_dirs`, written once."""
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


def _draw(seed: int, packs: int) -> PackNumbers:
    order: PackNumbers = np.arange(packs, dtype=_dtype(packs))  # the draws do not depend on the dtype
    np.random.RandomState(seed).shuffle(order)
    return order


def _fill(f: IO[bytes], order: PackNumbers, seed: int) -> None:
    f.write(FORMAT.header(seed=seed, packs=len(order), crc32=zlib.crc32(order.data)))
    f.write(order.data)


def _open(path: Path, seed: int, packs: int) -> PackNumbers | None:
    """The order in a file; None, logged, if the file is not a complete one of these packs."""
    try:
        with open(path, "rb") as f:
            facts = FORMAT.read_header(f.read(HEADER_BYTES))
            size = os.fstat(f.fileno()).st_size
            dtype = _dtype(packs)
            right = (facts.get("seed"), facts.get("packs")) == (seed, packs)
            if right and size == HEADER_BYTES + packs * dtype.itemsize:
                mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
                if zlib.crc32(memoryview(mapped)[HEADER_BYTES:]) == facts.get("crc32"):
                    found: PackNumbers = np.frombuffer(mapped, dtype, packs, HEADER_BYTES)
                    return found
    except (OSError, ValueError):
        pass
    log_once(f"the order of packs {path} is damaged or of another version: it is rebuilt")
    return None
