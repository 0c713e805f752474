"""Maps a function over items in several processes, with results in the order of the items."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import BaseContext
from typing import TypeVar

from xtuner.core.errors import CheckpointError, ConfigError
from xtuner.core.system.sysinfo import usable_cpus

T = TypeVar("T")
R = TypeVar("R")


def usable_workers(workers: int | None) -> int:
    """`workers`, or the number of CPUs that this process may use (affinity and container quota, see sysinfo.py).

    Raises: ConfigError for less than 1.
    """
    if workers is None:
        return usable_cpus()
    if workers < 1:
        raise ConfigError(f"{workers} processes do no work", where="--workers", do="1 or more")
    return workers


def map_ordered(work: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """Yield `work(item)` in the order of the items. `work` must be a module-level function.

    At most `2 * workers + 2` items are in flight. Workers are never forked from this process, which may have threads,
    but from a server process that imports once. They end when this process ends, however it ends.

    Raises: what `work` raises; CheckpointError if a worker ends unexpectedly.
    """
    if workers == 1:
        yield from map(work, items)
        return
    pool = ProcessPoolExecutor(workers, _context(work.__module__), initializer=_start_worker)
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 2 * workers + 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise CheckpointError(
            "a worker process ended unexpectedly",
            why="its results are lost; the system may have killed it because memory ran out",
            do="run the same command again, with fewer --workers if it happens again",
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _context(module: str) -> BaseContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    return context


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    end_with_parent()


def end_with_parent() -> None:
    """For a worker process: exit when its parent dies, also by SIGKILL."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
