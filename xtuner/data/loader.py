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
from typing import Any

import torch
from torch.utils.data import DataLoader

from xtuner.core.errors import ConfigError, XTunerError
from xtuner.core.heap import keep_freed
from xtuner.data.batch import Batch
from xtuner.data.order import InternRepoSampler, Position, numbers, packs_per_epoch
from xtuner.data.pack import PackedDataset, RawPack
from xtuner.data.pool import end_with_parent

READERS = 2  # threads that read; most of the work is numpy's, which lets others run
PREFETCH = 4  # packs prepared ahead; one pack of 32k tokens takes about 1 MB
LISTED = 10_000  # files that a checkpoint lists by name: 1 MB
PATIENCE = 5.0  # s that the end of a stream waits for its thread
_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # the trainer's to handle; see `_begin_worker`


class PackLoader:
    """Packs of `dataset` in the order of `sampler`, epoch after epoch.

    Args:
        num_workers: 0 prepares packs in a thread of this process, n > 0 in n processes.
        reshuffle: a new order each epoch (`DistSamplerSeedHook` sets it); otherwise epoch 0's again.
        begun_on: ranks that the run was begun on, which decide what an epoch is (a resume sets it).
    """

    def __init__(self, dataset: PackedDataset, sampler: InternRepoSampler, num_workers: int = 0) -> None:
        if num_workers < 0:
            raise ConfigError(f"num_workers is {num_workers}", where="train_dataloader.num_workers")
        self.dataset = dataset
        self.sampler = sampler
        self.num_workers = num_workers
        self.reshuffle = False
        self.begun_on = sampler.world_size

    @property
    def num_packs(self) -> int:
        return len(self.dataset)

    @property
    def dp_size(self) -> int:
        return self.sampler.world_size

    @property
    def packs_per_epoch(self) -> int:
        return packs_per_epoch(self.num_packs, self.begun_on)

    def fingerprint(self) -> dict[str, Any]:
        """What the order of packs depends on. A resume compares it."""
        return {
            "data": self.dataset.fingerprint(),
            "packed_length": self.dataset.packed_length,
            "label_rule": self.dataset.label_rule,
            "num_packs": self.num_packs,
            "reshuffle": self.reshuffle,
            **self.sampler.describe(),
        }

    def files(self) -> list[str] | int:
        """`IDENTITY NAME` of the files in order, so that a resume can say which are others; of very many, how many."""
        catalog = self.dataset.documents.catalog
        if len(catalog) > LISTED:
            return len(catalog)
        identities = (bytes(row[:8]).hex() for row in catalog.identities)
        names = (name.encode(errors="backslashreplace").decode() for name in catalog.names)
        return [f"{identity} {name}" for identity, name in zip(identities, names, strict=True)]

    def iterate_from(self, position: Position) -> Iterator[Batch]:
        """Yield this rank's batches from `position` on, without end. Nothing before it is read."""
        keep_freed()
        gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        if self.num_workers:
            return self._from_processes(position, gpu)
        return prefetch(lambda: self._read(position, gpu), PREFETCH)

    def _numbers(self, position: Position) -> Iterator[int]:
        for share in self.sampler.stream(position, self.packs_per_epoch, self.reshuffle):
            yield from numbers(share)

    def _read(self, position: Position, gpu: int | None) -> Iterator[Batch]:
        def begin() -> None:
            if gpu is not None:  # a thread's own setting; without it all ranks would pin by the first GPU
                torch.cuda.set_device(gpu)

        def read(number: int) -> Batch:
            return Batch.of_raw(self.dataset.raw(number), self.dataset.label_rule, number, gpu is not None)

        waiting: deque[Future[Batch]] = deque()
        with ThreadPoolExecutor(READERS, "xtuner-reader", begin) as pool:
            for number in self._numbers(position):
                waiting.append(pool.submit(read, number))
                if len(waiting) > READERS:
                    yield waiting.popleft().result()

    def _from_processes(self, position: Position, gpu: int | None) -> Iterator[Batch]:
        loader: DataLoader[Any] = DataLoader(
            _Shipped(self.dataset),  # type: ignore[arg-type]
            batch_size=None,
            sampler=self._numbers(position),
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
                raw = RawPack.of(buffer.numpy())
                yield Batch.of_raw(raw, self.dataset.label_rule, number, gpu is not None)
        finally:
            atexit.unregister(items._shutdown_workers)
            items._shutdown_workers()


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
