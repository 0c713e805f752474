"""The stream of packs: order, resume, epochs, worker processes, errors of the thread."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import pytest
from helpers.paths import reference

from xtuner.core.errors import DataError
from xtuner.data import InternRepoSampler, load_intern_repo_tokenized_dataset
from xtuner.data.loading.loader import PackLoader
from xtuner.data.loading.sampler import Position
from xtuner.data.packing.pack import PackedDataset


def open_loader(case: str = "g02_three_files_pl37", length: int = 37, workers: int = 0, **share: int) -> PackLoader:
    dataset = PackedDataset(load_intern_repo_tokenized_dataset(reference("packing", case) / "input"), length)
    loader = PackLoader(dataset, InternRepoSampler(dataset, **share), workers)  # type: ignore[arg-type]
    loader.reshuffle = True
    return loader


@pytest.mark.processes
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_goes_on_exactly(workers: int) -> None:
    straight = list(islice(open_loader(workers=workers).iterate_from(Position()), 40))
    assert [b.pack for b in straight[:16]] != [b.pack for b in straight[16:32]]
    assert sorted(b.pack for b in straight[:16]) == sorted(b.pack for b in straight[16:32]) == list(range(16))
    for done in (1, 15, 16, 17, 31):
        resumed = islice(open_loader(workers=workers).iterate_from(Position().advance(done, 16)), 40 - done)
        for a, b in zip(straight[done:], resumed, strict=True):
            assert a.pack == b.pack
            assert a.input_ids.equal(b.input_ids)
            assert a.targets.equal(b.targets)
            assert a.num_targets == b.num_targets


def test_without_reshuffle_every_epoch_is_the_first() -> None:
    loader = open_loader()
    loader.reshuffle = False
    packs = [b.pack for b in islice(loader.iterate_from(Position()), 32)]
    assert packs[:16] == packs[16:]


def test_ranks_share_the_packs() -> None:
    ranks = [islice(open_loader(rank=r, world_size=3).iterate_from(Position()), 5) for r in range(3)]
    assert len({b.pack for rank in ranks for b in rank}) == 15


@pytest.mark.processes
@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_the_background_reaches_the_consumer(workers: int) -> None:
    stream = open_loader("g24_bad_json_line", 8, workers).iterate_from(Position())
    with pytest.raises(DataError, match="not JSON"):
        list(islice(stream, 2))


@pytest.mark.processes
def test_an_error_reads_the_same_from_a_worker() -> None:
    errors = []
    for workers in (0, 2):
        with pytest.raises(DataError) as error:
            list(islice(open_loader("g24_bad_json_line", 8, workers).iterate_from(Position()), 2))
        errors.append(error.value)
    here, there = errors
    assert str(here) == str(there)
    assert (here.where, here.do, here.exit_code) == (there.where, there.do, there.exit_code)


# Takes packs with two workers, tells when it has the first, and goes on while the signals come.
SCRIPT = """
import multiprocessing, signal, sys, time
from test_loader import Position, islice, open_loader
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda *_: None)
stream = open_loader(workers=2).iterate_from(Position())
packs = [next(stream).pack]
print(*(p.pid for p in multiprocessing.active_children()), flush=True)
for batch in islice(stream, 79):
    packs.append(batch.pack)
    time.sleep(0.02)
assert len(packs) == 80 and set(packs) == set(range(16))
"""  # `stream` is alive when Python ends: that must not hang


@contextmanager
def job() -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """The script as a process group of its own, and its workers."""
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout
            yield process, [int(word) for word in process.stdout.readline().split()]
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.processes
def test_a_signal_to_the_whole_group_leaves_the_workers_at_work() -> None:
    with job() as (process, workers):
        assert len(workers) == 2
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.killpg(process.pid, number)
            time.sleep(0.1)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors


@pytest.mark.processes
def test_workers_end_when_their_parent_is_killed() -> None:
    with job() as (process, workers):
        assert len(workers) == 2
        process.kill()
        deadline = time.monotonic() + 30
        while any(alive(pid) for pid in workers):
            assert time.monotonic() < deadline
            time.sleep(0.1)


def alive(pid: int) -> bool:
    """Not gone, and no zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
