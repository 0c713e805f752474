"""The stream of packs: order, resume, epochs, worker processes, errors of the thread."""

from itertools import islice

import pytest
from conftest import reference

from xtuner.core.errors import DataError
from xtuner.data import InternRepoSampler, load_intern_repo_tokenized_dataset
from xtuner.data.loader import PackLoader
from xtuner.data.order import Position
from xtuner.data.pack import PackedDataset


def open_loader(case: str = "g02_three_files_pl37", length: int = 37, workers: int = 0, **share: int) -> PackLoader:
    dataset = PackedDataset(load_intern_repo_tokenized_dataset(reference("packing", case) / "input"), length)
    loader = PackLoader(dataset, InternRepoSampler(dataset, **share), workers)  # type: ignore[arg-type]
    loader.reshuffle = True
    return loader


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_goes_on_exactly(workers: int) -> None:
    straight = list(islice(open_loader(workers=workers).iterate_from(Position()), 40))
    assert [b.pack for b in straight[:16]] != [b.pack for b in straight[16:32]]
    assert sorted(b.pack for b in straight[:16]) == sorted(b.pack for b in straight[16:32]) == list(range(16))
    for done in (1, 15, 16, 17, 31):
        resumed = islice(open_loader(workers=workers).iterate_from(Position().advance(done, 16, 1)), 40 - done)
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


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_the_background_reaches_the_consumer(workers: int) -> None:
    stream = open_loader("g24_bad_json_line", 8, workers).iterate_from(Position())
    with pytest.raises(DataError, match="not JSON"):
        list(islice(stream, 2))
