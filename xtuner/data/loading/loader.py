"""An endless stream of this rank's packs from any position, prepared ahead of the training step."""

import atexit
import contextlib
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import Any

import torch
from torch.utils.data import DataLoader

from xtuner.config.settings import SCHEMA
from xtuner.core.errors import ConfigError, XTunerError
from xtuner.core.system.malloc import keep_freed
from xtuner.data.loading.balance import Costs, to_iterations, to_ranks, waiting, windows
from xtuner.data.loading.batch import Batch
from xtuner.data.loading.sampler import InternRepoSampler, Position, numbers, packs_per_epoch
from xtuner.data.packing.pack import PackedDataset, RawPack
from xtuner.data.process_pool import end_with_parent

READERS = 2  # threads that read; most of the work is numpy's, which lets others run
PREFETCH = 4  # packs prepared ahead; one pack of 32k tokens takes about 1 MB
LISTED = 10_000  # files that a checkpoint lists by name: 1 MB
PATIENCE = 5.0  # s that the end of a stream waits for its thread
_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # the trainer's to handle; see `_begin_worker`


class PackLoader:
    """Packs of `dataset` in the order of `sampler`, epoch after epoch.

    Args:
        num_workers: 0 prepares packs in a thread of this process, n > 0 in n processes.
        balance: 0: rank r of n takes `[r::n]` of the stream. 1: the packs of an iteration are dealt to ranks by
            attention cost; k > 1: those of k iterations to iterations, too. See balance.py.
        accumulative_counts: packs that each rank takes in an iteration.
        reshuffle: a new order each epoch; otherwise epoch 0's again.
        begun_on: ranks that the run was begun on, which decide what an epoch is; None for those of the sampler.
        windows_from: where in the data k iterations are counted from.
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
    ) -> None:
        SCHEMA.require("train_dataloader", num_workers=num_workers, balance=balance)
        self.dataset = dataset
        self.sampler = sampler
        self.num_workers = num_workers
        self.lacks = missing_for_balance(dataset, sampler, balance)
        self.balance = 0 if self.lacks else balance
        self.accumulative_counts = accumulative_counts
        self.windows_from = windows_from
        self.reshuffle = reshuffle
        self.begun_on = sampler.world_size if begun_on is None else begun_on

    @property
    def num_packs(self) -> int:
        return len(self.dataset)

    @property
    def dp_size(self) -> int:
        return self.sampler.world_size

    @property
    def packs_per_epoch(self) -> int:
        return packs_per_epoch(self.num_packs, self.begun_on)

    def iterate_from(self, position: Position) -> Iterator[Batch]:
        """Yield this rank's batches from `position` on, without end. Nothing before it is read."""
        keep_freed()
        gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        if self.num_workers:
            return self._from_processes(position, gpu)
        return prefetch(lambda: self._read(position, gpu), PREFETCH)

    @property
    def deals(self) -> bool:
        """Whether costs decide anything: with one pack a rank, or one rank, an iteration has nothing to deal."""
        return self.balance > 1 or (self.balance == 1 and self.dp_size > 1 and self.accumulative_counts > 1)

    def numbers_from(self, position: Position) -> Iterator[int]:
        """Numbers of this rank's packs from `position` on, without end."""
        if self.deals:
            return self._dealt(position)
        shares = self.sampler.stream(position, self.packs_per_epoch, self.reshuffle)
        return chain.from_iterable(map(numbers, shares))

    def _dealt(self, position: Position) -> Iterator[int]:
        """The same, of which every iteration's are chosen by cost. Costs of a window are looked up when it begins."""
        per_epoch, packs = self.packs_per_epoch, self.dp_size * self.accumulative_counts
        begin = position.packs_before(per_epoch)
        for first, iterations, done in windows(begin, self.windows_from, packs, per_epoch, self.balance):
            window = self.sampler.packs(first, first + iterations * packs, per_epoch, self.reshuffle)
            costs = self.dataset.costs(window)
            for taken in to_iterations(costs, packs)[done:]:
                mine = to_ranks(costs[taken], self.dp_size)[self.sampler.rank]
                yield from window[taken[mine]].tolist()

    def waiting(self, time: Callable[[Costs], Costs], balance: int, most: int) -> float | None:
        """Part of an iteration that ranks wait for the slowest, in the first `most` iterations of epoch 0.

        Args:
            time: that a pack takes, from Σ len² of its fragments.
        Returns None where documents have no index, and to look at many takes long.
        """
        packs = self.dp_size * self.accumulative_counts
        iterations = min(most, self.packs_per_epoch // packs)
        if not iterations or self.lacks or not getattr(self.dataset, "indexed", True):
            return None
        first = self.sampler.packs(0, iterations * packs, self.packs_per_epoch, self.reshuffle)
        return waiting(self.dataset.costs(first), time, self.dp_size, self.accumulative_counts, balance)

    def _read(self, position: Position, gpu: int | None) -> Iterator[Batch]:
        def begin() -> None:
            if gpu is not None:  # a thread's own setting; without it all ranks would pin by the first GPU
                torch.cuda.set_device(gpu)

        def read(number: int) -> Batch:
            return Batch.from_raw(self.dataset.raw(number), self.dataset.label_rule, number, gpu is not None)

        waiting: deque[Future[Batch]] = deque()
        with ThreadPoolExecutor(READERS, "xtuner-reader", begin) as pool:
            for number in self.numbers_from(position):
                waiting.append(pool.submit(read, number))
                if len(waiting) > READERS:
                    yield waiting.popleft().result()

    def _from_processes(self, position: Position, gpu: int | None) -> Iterator[Batch]:
        loader: DataLoader[Any] = DataLoader(
            _Shipped(self.dataset),  # type: ignore[arg-type]
            batch_size=None,
            sampler=self.numbers_from(position),
            num_workers=self.num_workers,
            prefetch_factor=PREFETCH,
            worker_init_fn=_begin_worker,
        )
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)  # workers inherit it until they ignore them
        try:
            items: Any = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        # Python's own exit would send the workers a SIGTERM, and wait for ever.
        atexit.register(items._shutdown_workers)
        try:
            for item in items:
                if isinstance(item, XTunerError):
                    raise item
                number, buffer = item
                raw = RawPack.from_buffer(buffer.numpy())
                yield Batch.from_raw(raw, self.dataset.label_rule, number, gpu is not None)
        finally:
            atexit.unregister(items._shutdown_workers)
            items._shutdown_workers()


def missing_for_balance(dataset: PackedDataset, sampler: InternRepoSampler, balance: int) -> str:
    """A method that a dataset or sampler of the user's own does not have. Raises: ConfigError if k > 1 needs it."""
    for part, method, ours in ((dataset, "costs", "PackedDataset"), (sampler, "packs", "InternRepoSampler")):
        if not hasattr(part, method):
            lacks = f"{type(part).__name__} has no method `{method}`"
            if balance > 1:
                raise ConfigError(
                    f"balance = {balance}, but {lacks}",
                    where="train_dataloader.balance",
                    why="packs are dealt by the lengths of their documents",
                    do=f"derive it from {ours}, give it that method, or set balance = 0",
                )
            return lacks
    return ""


def identity(dataset: PackedDataset, sampler: InternRepoSampler, reshuffle: bool) -> dict[str, Any]:
    """What the order of packs depends on. A resume compares it."""
    return {
        "data": dataset.fingerprint(),
        "packed_length": dataset.packed_length,
        "label_rule": dataset.label_rule,
        "num_packs": len(dataset),
        "reshuffle": reshuffle,
        **sampler.describe(),
    }


def list_files(dataset: PackedDataset) -> list[str] | int:
    """`IDENTITY NAME` of the files in order, so that a resume can say which are others; of very many, how many."""
    documents = dataset.documents
    if len(documents) > LISTED:
        return len(documents)
    names = (name.encode(errors="backslashreplace").decode() for name in documents.names)
    return [f"{identity} {name}" for identity, name in zip(documents.identities(), names, strict=True)]


def _begin_worker(worker: int) -> None:
    """For a worker process: Slurm, Kubernetes and Ctrl-C signal all processes of a job, and the iteration in progress
    still needs its packs. A worker ends when the loader tells it to, or when its parent is gone: torch looks for that,
    too, but not if it went before the worker had begun."""
    keep_freed()
    for number in _STOPS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()


class _Shipped:
    """A pack as a worker process sends it: its number and one int32 buffer, a sixth of what the tensors would be.

    An error for users is a value: raised here, torch would put this process's traceback into its message.
    """

    def __init__(self, dataset: PackedDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, number: int) -> tuple[int, torch.Tensor] | XTunerError:
        try:
            return number, torch.from_numpy(self.dataset.raw(number).buffer())
        except XTunerError as e:
            return e


def prefetch(make: Callable[[], Iterator[Batch]], ahead: int) -> Iterator[Batch]:
    """Run an iterator in a thread, at most `ahead` items in front. Its errors are raised at the consumer."""
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
        """End the thread, unless a disk holds it. One that frees tensors while Python ends would abort the process."""
        stopped.set()
        deadline = time.monotonic() + PATIENCE
        while thread.is_alive() and time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty):  # it may wait for room
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
