"""An endless stream of this rank's packs from any position, prefetched during the training step."""

import atexit
import contextlib
import os
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch.utils.data import DataLoader

from xtuner.config.settings import SCHEMA
from xtuner.core.errors import ConfigError, XTunerError
from xtuner.core.system.malloc import keep_freed
from xtuner.data.loading.balance import Costs, Ints, assign_to_iterations, assign_to_ranks, waiting_share, windows
from xtuner.data.loading.batch import Batch
from xtuner.data.loading.prefetch_files import is_remote, prefetch_files
from xtuner.data.loading.sampler import (
    InternRepoSampler,
    Position,
    count_epoch_packs,
    iterate_numbers,
    packs_per_epoch,
)
from xtuner.data.packing.pack import PackedDataset
from xtuner.data.packing.raw_pack import RawPack
from xtuner.data.process_pool import end_with_parent
from xtuner.families.network import ALL_PAIRS, AttentionPairs

READERS = 2  # reading threads; most of the work is in numpy, which releases the GIL
PREFETCH = 4  # packs prepared ahead; one takes 24 bytes a token: 0.8 MB at 32k tokens, 25 MB at a million
MAX_LISTED_FILES = 10_000  # that a checkpoint lists by name: 1 MB
STOP_TIMEOUT = 5.0  # s that closing a stream waits for its thread
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # handled by the trainer; see `_init_worker`


class PackLoader:
    """Packs of `dataset` in the order of `sampler`, epoch after epoch.

    Args:
        num_workers: 0 prepares packs in a thread of this process, n > 0 in n processes.
        balance: 0: rank r of n takes `[r::n]` of the stream. 1: the packs of an iteration are assigned to ranks by
            attention cost; k > 1: the packs of k iterations are also assigned to iterations. See balance.py.
        accumulative_counts: packs per rank and iteration.
        reshuffle: a new order each epoch; otherwise that of epoch 0.
        begun_on: number of ranks on which the run was started; it decides the length of an epoch. None for that of
            the sampler.
        windows_from: pack of the stream from which windows of k iterations are counted.
        pairs: what sliding windows leave of attention's cost.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        sampler: InternRepoSampler,
        num_workers: int = 0,
        balance: int = 1,
        accumulative_counts: int = 1,
        reshuffle: bool = False,
        begun_on: int | None = None,
        windows_from: int = 0,
        pairs: AttentionPairs = ALL_PAIRS,
    ) -> None:
        SCHEMA.require("train_dataloader", num_workers=num_workers, balance=balance)
        self.dataset = dataset
        self.sampler = sampler
        self.num_workers = num_workers
        self.balance_obstacle = find_balance_obstacle(dataset, sampler, balance)
        self.balance = 0 if self.balance_obstacle else balance
        self.accumulative_counts = accumulative_counts
        self.windows_from = windows_from
        self.pairs = pairs
        self.reshuffle = reshuffle
        self.begun_on = sampler.world_size if begun_on is None else begun_on

    @property
    def num_packs(self) -> int:
        return count_epoch_packs(self.dataset)

    @property
    def dp_size(self) -> int:
        return self.sampler.world_size

    @property
    def packs_per_epoch(self) -> int:
        return packs_per_epoch(self.num_packs, self.begun_on)

    def iterate_from(self, position: Position) -> Iterator[Batch]:
        """Yield this rank's batches from `position` on, endlessly. Nothing before it is read."""
        keep_freed()
        gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        if self.num_workers:
            return self._from_processes(position, gpu)
        return prefetch(lambda: self._read(position, gpu), PREFETCH)

    @property
    def is_balanced(self) -> bool:
        """Whether costs decide the assignment. With one rank, or one pack per rank, an iteration has no choice."""
        return self.balance > 1 or (self.balance == 1 and self.dp_size > 1 and self.accumulative_counts > 1)

    def numbers_from(self, position: Position) -> Iterator[int]:
        """Numbers of this rank's packs from `position` on, endlessly."""
        if self.is_balanced:
            return self._balanced_numbers(position)
        shares = self.sampler.stream(position, self.packs_per_epoch, self.reshuffle)
        return chain.from_iterable(map(iterate_numbers, shares))

    def _numbers_to_read(self, position: Position) -> Iterator[int]:
        numbers = self.numbers_from(position)
        return prefetch_files(self.dataset, numbers) if is_remote(self.dataset) else numbers

    def _balanced_numbers(self, position: Position) -> Iterator[int]:
        """`numbers_from` with packs assigned by cost. The costs of a window are computed when it begins."""
        per_epoch, packs = self.packs_per_epoch, self.dp_size * self.accumulative_counts
        begin = position.packs_before(per_epoch)
        for first, iterations, done in windows(begin, self.windows_from, packs, per_epoch, self.balance):
            window = self.sampler.packs(first, first + iterations * packs, per_epoch, self.reshuffle)
            costs = self._costs(window)
            for taken in assign_to_iterations(costs, packs)[done:]:
                mine = assign_to_ranks(costs[taken], self.dp_size)[self.sampler.rank]
                yield from window[taken[mine]].tolist()

    def packs_of_iteration(self, position: Position) -> list[int]:
        """Numbers of all ranks' packs in the iteration that begins at `position`; empty if the sampler does not say."""
        per_epoch, packs = self.packs_per_epoch, self.dp_size * self.accumulative_counts
        begin = position.packs_before(per_epoch)
        if not hasattr(self.sampler, "packs"):  # a user's own
            return []
        if self.balance < 2:
            return list(map(int, self.sampler.packs(begin, begin + packs, per_epoch, self.reshuffle)))
        first, iterations, done = next(windows(begin, self.windows_from, packs, per_epoch, self.balance))
        window = self.sampler.packs(first, first + iterations * packs, per_epoch, self.reshuffle)
        return list(map(int, window[assign_to_iterations(self._costs(window), packs)[done]]))

    def _costs(self, packs: Ints) -> Costs:
        """Attention costs. A user's own dataset counts Σ len² itself."""
        knows_windows = self.pairs.window is not None and isinstance(self.dataset, PackedDataset)
        return self.dataset.costs(packs, self.pairs) if knows_windows else self.dataset.costs(packs)

    def waiting_share(self, time: Callable[[Costs], Costs], balance: int, most: int) -> float | None:
        """Share of an iteration during which ranks wait for the slowest, over the first `most` iterations of epoch 0.

        Args:
            time: Σ len² of the fragments of packs → durations.
        Returns None for documents without an index, whose lengths would take long to read.
        """
        packs = self.dp_size * self.accumulative_counts
        iterations = min(most, self.packs_per_epoch // packs)
        if not iterations or self.balance_obstacle or not getattr(self.dataset, "indexed", True):
            return None
        first = self.sampler.packs(0, iterations * packs, self.packs_per_epoch, self.reshuffle)
        return waiting_share(self._costs(first), time, self.dp_size, self.accumulative_counts, balance)

    def _read(self, position: Position, gpu: int | None) -> Iterator[Batch]:
        def begin() -> None:
            if gpu is not None:  # the setting is per thread; without it all ranks would pin through the first GPU
                torch.cuda.set_device(gpu)

        def read(number: int) -> Batch:
            return self._batch(self.dataset.raw(number), number, gpu is not None)

        waiting: deque[Future[Batch]] = deque()
        with ThreadPoolExecutor(READERS, "xtuner-reader", begin) as pool:
            for number in self._numbers_to_read(position):
                waiting.append(pool.submit(read, number))
                if len(waiting) > READERS:
                    yield waiting.popleft().result()

    def _batch(self, raw: RawPack, number: int, pin: bool) -> Batch:
        plan = getattr(self.dataset, "mixture", None)
        source = plan.source_of(number) if plan else 0
        return Batch.from_raw(raw, self.dataset.label_rule, number, pin, source)

    def _from_processes(self, position: Position, gpu: int | None) -> Iterator[Batch]:
        loader: DataLoader[Any] = DataLoader(
            _PackBuffers(self.dataset),  # type: ignore[arg-type]
            batch_size=None,
            sampler=self._numbers_to_read(position),
            num_workers=self.num_workers,
            prefetch_factor=PREFETCH,
            worker_init_fn=partial(_init_worker, dict(os.environ)),
            # a fork has none of the threads by which the client of object storage works
            multiprocessing_context="forkserver" if is_remote(self.dataset) else None,
        )
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)  # inherited by workers until they ignore it
        try:
            items: Any = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        # Otherwise Python's exit would send SIGTERM to the workers, which ignore it, and wait forever.
        atexit.register(items._shutdown_workers)
        try:
            for item in items:
                if isinstance(item, XTunerError):
                    raise item
                number, buffer = item
                yield self._batch(RawPack.from_buffer(buffer.numpy()), number, gpu is not None)
        finally:
            atexit.unregister(items._shutdown_workers)
            items._shutdown_workers()


def find_balance_obstacle(dataset: PackedDataset, sampler: InternRepoSampler, balance: int) -> str:
    """Why packs cannot be balanced: a method that a user's own dataset or sampler lacks; empty if they can.

    Raises: ConfigError if balance > 1 requires it.
    """
    for part, method, ours in ((dataset, "costs", "PackedDataset"), (sampler, "packs", "InternRepoSampler")):
        if not hasattr(part, method):
            lacks = f"{type(part).__name__} has no method `{method}`"
            if balance > 1:
                raise ConfigError(
                    f"balance = {balance}, but {lacks}",
                    where="train_dataloader.balance",
                    why="packs are balanced by the lengths of their documents",
                    do=f"derive it from {ours}, add that method, or set balance = 0",
                )
            return lacks
    return ""


def identity(dataset: PackedDataset, sampler: InternRepoSampler, reshuffle: bool) -> dict[str, Any]:
    """Everything that the order of packs depends on. A resume compares it."""
    return {
        "data": dataset.fingerprint(),
        "packed_length": dataset.packed_length,
        "label_rule": dataset.label_rule,
        "num_packs": count_epoch_packs(dataset),
        "reshuffle": reshuffle,
        **sampler.describe(),
    }


def list_files(dataset: PackedDataset) -> list[str] | int:
    """`IDENTITY NAME` of the files in order, so that a resume can report which have changed; of very many files, their
    number."""
    documents = dataset.documents
    if len(documents) > MAX_LISTED_FILES:
        return len(documents)
    names = (name.encode(errors="backslashreplace").decode() for name in documents.names)
    return [f"{identity} {name}" for identity, name in zip(documents.identities(), names, strict=True)]


def _init_worker(environ: dict[str, str], worker: int) -> None:
    """Initialise a worker process.

    It ignores stop signals: Slurm, Kubernetes and Ctrl-C signal all processes of a job, and the iteration in progress
    still needs its packs. It ends when the loader stops it or when its parent dies; torch's own check misses a parent
    that died before the worker had started.

    Args:
        environ: the variables of the parent: a forkserver has those of its own start.
    """
    os.environ.update(environ)
    keep_freed()
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()


class _PackBuffers:
    """Packs as worker processes send them: (number, one int32 buffer), a sixth of the size of the tensors.

    An error for users is returned: if it were raised, torch would add this process's traceback to its message.
    """

    def __init__(self, dataset: PackedDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, number: int) -> tuple[int, torch.Tensor] | XTunerError:
        try:
            return number, torch.from_numpy(self.dataset.raw(number).buffer())
        except XTunerError as e:
            return e


def prefetch(make: Callable[[], Iterator[Batch]], ahead: int) -> Iterator[Batch]:
    """Run an iterator in a thread, at most `ahead` items ahead. Its errors are raised in the consumer."""
    ready: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=ahead)
    stopped = threading.Event()

    def fill() -> None:
        try:
            for item in make():
                ready.put(item)
                if stopped.is_set():
                    return
        except BaseException as e:
            ready.put(e)

    thread = threading.Thread(target=fill, name="xtuner-prefetch", daemon=True)

    def stop() -> None:
        """Stop the thread, unless it is blocked by a disk. Freeing tensors in a thread while Python exits would abort
        the process."""
        stopped.set()
        deadline = time.monotonic() + STOP_TIMEOUT
        while thread.is_alive() and time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty):  # it may be blocked by a full queue
                ready.get(timeout=0.01)
        thread.join(0)

    thread.start()
    atexit.register(stop)
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        atexit.unregister(stop)
        stop()
