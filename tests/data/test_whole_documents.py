"""packing="whole": no document is cut, little padding, the same packs from memory, from an index and on any rank."""

import json
import os
import pickle
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.runs import contents, records
from hypothesis import given, settings
from hypothesis import strategies as st

from xtuner.core.errors import ConfigError
from xtuner.data import InternRepoSampler, load_intern_repo_tokenized_dataset, mixture
from xtuner.data.format import cache_dirs
from xtuner.data.format.file_order import CACHE_FOLDER
from xtuner.data.loading.batch import Batch
from xtuner.data.loading.loader import PackLoader
from xtuner.data.loading.sampler import Position
from xtuner.data.packing import document_order, whole_index
from xtuner.data.packing.pack import PackedDataset
from xtuner.data.packing.raw_pack import IGNORE
from xtuner.data.packing.whole_documents import fill_packs


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_document_is_in_one_pack(data: Any) -> None:
    size = data.draw(st.integers(1, 40))
    lengths = np.array(data.draw(st.lists(st.integers(0, 3 * size), max_size=60)), np.int64)
    long, window = data.draw(st.sampled_from(["cut", "drop", "own"])), data.draw(st.integers(1, 9))
    order, borders = fill_packs(lengths, size, long, window)
    used = [i for i, n in enumerate(lengths) if n and (long != "drop" or n <= size)]
    assert sorted(order.tolist()) == used
    ends = np.cumsum(lengths[order])
    assert borders[0] == 0
    assert borders[-1] == lengths[used].sum()
    filled = np.diff(borders)
    assert ((filled > 0) & (filled <= size)).all()
    begins = dict(zip(order.tolist(), (ends - lengths[order]).tolist(), strict=True))
    for i, begin in begins.items():
        inside = borders[(borders > begin) & (borders < begin + lengths[i])] - begin
        if lengths[i] <= size:
            assert not len(inside), "a document that fits is not cut"
            continue
        assert begin in borders, "a longer one begins a pack"
        assert inside.tolist() == list(range(size, lengths[i], size))
        assert long == "cut" or begin + lengths[i] in borders
    if long != "own":  # a pack ends because the first document that is left does not fit
        assert (filled[:-1] + filled[1:] > size).all()
    again = fill_packs(lengths, size, long, window)
    assert (order.tolist(), borders.tolist()) == (again[0].tolist(), again[1].tolist())


@pytest.mark.parametrize(("median", "size"), [(700, 4096), (700, 32768), (300, 131072)])
def test_padding_of_lognormal_lengths(median: int, size: int) -> None:
    lengths = np.random.RandomState(0).lognormal(np.log(median), 1.0, 60_000).astype(np.int64) + 1
    for long in ("cut", "drop"):
        order, borders = fill_packs(lengths, size, long)
        packs = len(borders) - 1
        assert 1 - lengths[order].sum() / (packs * size) < 0.01
        if size == 32768:
            assert (order[:15] == np.arange(15)).all(), "documents keep their shuffled order where they fit"


def opened(folder: Path, long: Any = "cut", size: int = 64, **more: Any) -> PackedDataset:
    return PackedDataset(load_intern_repo_tokenized_dataset(folder, **more), size, packing="whole", long=long)


def all_packs(data: PackedDataset) -> list[Any]:
    return [[part.tolist() if hasattr(part, "tolist") else part for part in data.raw(i)] for i in range(len(data))]


@pytest.mark.parametrize("long", ["cut", "drop", "own"])
def test_packs_contain_the_documents(long: str, corpus: Path) -> None:
    """Tokens, targets and costs, from the file's own lines; the rest is padding without targets."""
    data = opened(corpus, long, 24)
    lines = [json.loads(line)["tokens"] for p in sorted(corpus.rglob("*.bin")) for line in p.read_text().splitlines()]
    expected = Counter(tuple(line) for line in lines if line and (long != "drop" or len(line) <= 24))
    found: Counter[tuple[int, ...]] = Counter()
    begun: list[int] = []
    padding = 0
    for number in range(len(data)):
        raw, item = data.raw(number), data[number]
        batch = Batch.from_item(item)
        assert len(raw.signed) == 24
        assert data.costs(np.array([number])).tolist() == [batch.attention_pairs]
        file, start, stop = data.find_tokens(number)
        padding += 24 - (stop - start)
        assert (item["targets"][stop - start :] == IGNORE).all()
        assert (item["input_ids"][stop - start :] == 0).all()
        spans = data.file_packs(file).spans(start, stop)
        assert data.longest_fragment(number) == max(span.stop - span.start for span in spans)
        for span, begin, end in zip(spans, raw.borders, raw.borders[1:], strict=False):
            tokens = raw.signed[begin:end].tolist()
            begun = begun + tokens if span.start else tokens
            if span.stop == span.length:
                found[tuple(begun)] += 1
    assert found == expected
    dropped = data.dropped()
    assert (dropped.padding, dropped.dropped) == (padding, sum(map(len, lines)) - sum(map(len, found.elements())))
    assert f"{padding:,} tokens are padding" in dropped.describe()
    assert ("of longer documents are dropped" in dropped.describe()) == (long == "drop")
    assert data.longest_document() == max(map(len, found))


def test_the_index_holds_what_is_packed_in_memory(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = all_packs(opened(corpus, cache_dir=tmp_path))
    assert not list(tmp_path.rglob("whole-*")), "few documents are packed in memory"
    monkeypatch.setattr(document_order, "SMALL", 0)
    fingerprints = set()
    for long in ("cut", "own", "drop"):
        data = opened(corpus, long, cache_dir=tmp_path)
        fingerprints.add(data.fingerprint())
        assert isinstance(data._whole._parts[0], whole_index._Mapped)  # type: ignore[union-attr]
    assert len(fingerprints | {PackedDataset(data.documents, 64).fingerprint()}) == 4
    assert all_packs(opened(corpus, cache_dir=tmp_path)) == expected
    assert all_packs(pickle.loads(pickle.dumps(opened(corpus, cache_dir=tmp_path)))) == expected, "for spawned workers"
    fill = whole_index.FileTable.fill
    monkeypatch.setattr(whole_index.FileTable, "fill", None)  # a warm start packs nothing
    assert all_packs(opened(corpus, cache_dir=tmp_path)) == expected
    assert opened(corpus, cache_dir=tmp_path, opening=cache_dirs.Opening(read_only=True)).packs_per_file
    monkeypatch.setattr(whole_index.FileTable, "fill", fill)
    for harm in (lambda f: os.truncate(f, 5000), lambda f: overwrite(f, 4100), lambda f: overwrite(f, -8), truncate):
        cache_dirs._logged.clear()
        caplog.clear()
        assert len(list(tmp_path.rglob("whole-*"))) == 3
        for file in tmp_path.rglob("whole-*"):
            harm(file)
        assert all_packs(opened(corpus, cache_dir=tmp_path)) == expected
        assert "is damaged" in caplog.text or "cannot be used" in caplog.text
        for long in ("cut", "own", "drop"):
            opened(corpus, long, cache_dir=tmp_path)
    monkeypatch.setattr(whole_index, "PARALLEL_FROM", 0)
    monkeypatch.setattr(whole_index, "map_ordered", lambda work, jobs, workers: map(work, jobs))
    for file in tmp_path.rglob("whole-*"):
        file.unlink()
    assert all_packs(opened(corpus, cache_dir=tmp_path)) == expected
    assert CACHE_FOLDER not in os.listdir(corpus)


def overwrite(file: Path, at: int) -> None:
    with open(file, "r+b") as f:
        f.seek(at, 2 if at < 0 else 0)
        f.write(b"?")


def truncate(file: Path) -> None:
    file.write_bytes(b"")


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_any_rank_continues_a_mixture_of_whole_documents(corpus: Path, data: Any) -> None:
    names = ("code", "en")
    weights = data.draw(st.lists(st.sampled_from([1.0, 0.3, 2.0]), min_size=2, max_size=2))
    sources = [dict(type=load_intern_repo_tokenized_dataset, folder=corpus / name, weight=w)
               for name, w in zip(names, weights, strict=True)]  # fmt: skip
    size, long = data.draw(st.integers(20, 90)), data.draw(st.sampled_from(["cut", "own", "drop"]))
    packed = PackedDataset(mixture(sources), size, packing="whole", long=long)
    for number, name in enumerate(names):
        alone = opened(corpus / name, long, size)
        first = packed.mixture.first_pack[number]  # type: ignore[union-attr]
        assert [packed.raw(first + i).signed.tolist() for i in range(len(alone))] == [
            alone.raw(i).signed.tolist() for i in range(len(alone))
        ]
    stream: list[int] = []
    for rank, ranks in ((0, 1), (0, 3), (1, 3), (2, 3)):
        sampler = InternRepoSampler(packed, rank=rank, world_size=ranks)
        loader = PackLoader(packed, sampler, reshuffle=True, begun_on=1, accumulative_counts=1)
        if ranks == 1:
            stream = list(islice(loader.numbers_from(Position()), 2 * loader.packs_per_epoch))
        done = data.draw(st.integers(0, len(stream)))
        position = Position().advance(done, loader.packs_per_epoch)
        expected = stream[done:][rank::ranks]
        assert list(islice(loader.numbers_from(position), len(expected))) == expected


def test_bad_packing(corpus: Path) -> None:
    documents = load_intern_repo_tokenized_dataset(corpus)
    for arguments, message in (
        (dict(packing="half"), "packing = 'half'"),
        (dict(packing="whole", long="keep"), "long = 'keep'"),
        (dict(long="drop"), 'long = "drop" has no effect with packing = "cut"'),
    ):
        with pytest.raises(ConfigError, match=message):
            PackedDataset(documents, 64, **arguments)  # type: ignore[arg-type]
    wasteful = PackedDataset(documents, 100_000, packing="whole").dropped()
    assert "of the tokens in packs are padding" in wasteful.warning()
    assert 'long = "drop"' in PackedDataset(documents, 8, packing="whole", long="drop").dropped().warning()


@pytest.mark.processes
def test_a_run_trains_and_resumes(
    tiny: Path, tmp_path: Path, xtuner: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Bit for bit after a resume; another rule for long documents is another run."""
    options = ["--cfg-options", "train_dataset.packing=whole", "train_dataset.long=own", "max_epochs=1",
               "save_steps=3", "save_total_limit=-1", "evaluation_inputs=[]"]  # fmt: skip
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert xtuner("train", tiny, "--work-dir", straight, *options) == 0
    (log,) = straight.glob("*/2*.log")
    assert "documents are not cut: " in log.read_text()
    again = ["train", tiny, "--work-dir", resumed, "--resume", straight / "iter_3.pth", *options]
    assert xtuner(*again, "train_dataloader.num_workers=1") == 0
    last = max(records(straight))
    assert records(resumed) == {n: line for n, line in records(straight).items() if n > 3}
    assert contents(resumed / f"iter_{last}.pth") == contents(straight / f"iter_{last}.pth")
    with pytest.raises(Exception, match="long: 'own' → 'cut'"):
        xtuner(*again, "train_dataset.long=cut")
    plain = ["train", tiny, "--work-dir", tmp_path / "plain", "--cfg-options", "max_epochs=1", "evaluation_inputs=[]"]
    assert xtuner(*plain) == 0
    assert xtuner(*plain, "train_dataset.packing=cut", "train_dataset.long=cut", "resume=True") == 0, "the defaults"
    capsys.readouterr()
    assert xtuner("log-dataset", tiny, "--show", "input_ids", *options[:3]) == 0
    assert "── document " in capsys.readouterr().out
