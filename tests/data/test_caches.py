"""The index on disk: equal to what it stands for, and made again when it is torn, old or of others; ranks share it."""

import multiprocessing
import os
import platform
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.corpus import write_corpus
from helpers.ranks import on_ranks

from xtuner.core.errors import DataError
from xtuner.data import InternRepoSampler, load_intern_repo_tokenized_dataset, mixture
from xtuner.data.format import cache_dirs
from xtuner.data.format import folder as index
from xtuner.data.format.bin_file import BinFile
from xtuner.data.format.cache_file import HEADER_BYTES
from xtuner.data.format.file_order import CACHE_FOLDER, walk_files
from xtuner.data.format.writer import write_bin
from xtuner.data.loading import sampler as order
from xtuner.data.loading.open_on_ranks import open_on_ranks
from xtuner.data.packing import document_order
from xtuner.data.packing.mixture import list_parts
from xtuner.data.packing.pack import PackedDataset
from xtuner.dist.collectives import Ranks

FILES = ["code/a.bin", "code/b.bin", "en/a.bin", "en/b.bin"]


@pytest.fixture(autouse=True)
def always_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Little data get an index, too; the user's cache folder is the test's."""
    monkeypatch.setattr(document_order, "SMALL", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(cache_dirs, "_logged", set())


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "data", 9)


def opened(folder: Path, min_length: int = 0, seed: int = 1024, **more: Any) -> PackedDataset:
    return PackedDataset(load_intern_repo_tokenized_dataset(folder, min_length, **more), 32, seed)


def contents(data: PackedDataset) -> list[Any]:
    """All of the tables, and all packs."""
    files = [data.file_packs(i) for i in range(len(data.documents))]
    packs = [tuple(a.tolist() if hasattr(a, "tolist") else a for a in data.raw(i)) for i in range(len(data))]
    return [[(f.rows.tolist(), f.order.tolist(), f.ends.tolist()) for f in files], packs, data.fingerprint()]


def in_memory(folder: Path, **how: Any) -> list[Any]:
    data = opened(folder, **how)
    data._orders = None
    return contents(data)


def index_of(folder: Path) -> Path:
    (found,) = (folder / CACHE_FOLDER).glob("order-*.idx")
    return found


@pytest.mark.parametrize(("min_length", "seed"), [(0, 1024), (12, 7)])
def test_the_index_holds_what_is_made_without(data: Path, min_length: int, seed: int, monkeypatch: Any) -> None:
    expected = in_memory(data, min_length=min_length, seed=seed)
    assert index_of(data)
    monkeypatch.setattr(BinFile, "examine", None)  # a warm start reads no meta
    monkeypatch.setattr(document_order, "shuffle_file", None)
    warm = opened(data, min_length, seed)
    assert warm._orders is not None
    assert contents(warm) == expected
    assert [f.name for f in warm.documents] == FILES == list(walk_files(data))


def test_little_data_leave_nothing_behind(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_order, "SMALL", 1000)
    assert opened(data)._orders is None
    assert not (data / CACHE_FOLDER).exists()


DAMAGES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "cut": ("damaged", lambda p: os.truncate(p, p.stat().st_size - 1)),
    "empty": ("damaged", lambda p: os.truncate(p, 0)),
    "head": ("damaged", lambda p: overwrite(p, 3, b"?")),
    "names": ("damaged", lambda p: overwrite(p, HEADER_BYTES + 40, b"?")),
    "version": ("of version 0, not 1", lambda p: swap(p, b'"version": 1', b'"version": 0')),
    "table": ("damaged", lambda p: overwrite(p, p.stat().st_size - 30, b"?")),
}


def overwrite(path: Path, at: int, what: bytes) -> None:
    raw = bytearray(path.read_bytes())
    raw[at : at + len(what)] = what
    path.write_bytes(raw)


def swap(path: Path, old: bytes, new: bytes) -> None:
    raw = path.read_bytes()
    assert old in raw
    path.write_bytes(raw.replace(old, new))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("which", ["order-*.idx", "files-0.cat"])
def test_damaged_caches_are_made_again(damage: str, which: str, data: Path, caplog: Any) -> None:
    words, harm = DAMAGES[damage]
    expected = contents(opened(data))
    (file,) = (data / CACHE_FOLDER).glob(which)
    harm(file)
    again = opened(data)
    assert contents(again) == expected
    assert words in caplog.text
    assert caplog.text.count(str(file)) == 1
    caplog.clear()
    cache_dirs._logged.clear()
    assert contents(opened(data)) == expected  # and it is whole now
    assert contents(opened(data)) == expected
    assert "damaged" not in caplog.text


def test_changed_files_are_seen(data: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only they are examined and ordered anew; an added file takes its place, a lost one is gone."""
    caplog.set_level("INFO", "xtuner")
    opened(data)
    ordered, true = [], document_order.shuffle_file
    monkeypatch.setattr(document_order, "shuffle_file", lambda f, s: ordered.append(f.name) or true(f, s))  # type: ignore[func-returns-value]
    write_bin(data / "en" / "a.bin", [[1, 2, 3] * 30])
    changed = opened(data)
    assert ordered == ["en/a.bin"]
    assert "1 files of" in caplog.text
    assert contents(changed) == in_memory(data)
    write_bin(data / "en" / "0.bin", [[4] * 40])
    ordered.clear()
    added = opened(data)
    assert ordered == ["en/0.bin"]
    assert contents(added) == in_memory(data)
    for ending in (".bin", ".bin.meta"):
        (data / f"code/b{ending}").unlink()
    ordered.clear()
    fewer = opened(data)
    assert ordered == []
    assert contents(fewer) == in_memory(data)
    os.utime(data / "en" / "0.bin", ns=(1, 1))  # the same contents with another time: looked at again, the same tables
    ordered.clear()
    opened(data)
    assert ordered == []


def test_a_moved_folder_with_its_cache(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = contents(opened(data))
    os.rename(data, tmp_path / "moved")
    monkeypatch.setattr(BinFile, "examine", None)
    monkeypatch.setattr(document_order, "shuffle_file", None)
    assert contents(opened(tmp_path / "moved")) == expected


def test_where_caches_are_kept(data: Path, tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the data; in the user's folder if that takes no file (told once); where it is told to; in memory."""
    caplog.set_level("INFO", "xtuner")
    expected = in_memory(data)
    shutil.rmtree(data / CACHE_FOLDER)
    (data / CACHE_FOLDER).write_text("")  # root may write anywhere: a file stands in the way
    assert contents(opened(data)) == expected
    assert opened(data)._orders is not None
    assert list((tmp_path / "home" / "xtuner" / "data").glob("data-*/order-*.idx"))
    assert caplog.text.count("are kept in") == 1
    (tmp_path / "home").rename(tmp_path / "gone")
    (tmp_path / "home").write_text("")
    assert contents(opened(data)) == contents(opened(data)) == expected
    assert opened(data)._orders is None
    assert caplog.text.count("the index of") == 1
    assert "give a writable --cache-dir" in caplog.text
    for how in ("argument", "variable", "option"):
        folder = tmp_path / how
        if how == "variable":
            monkeypatch.setenv(cache_dirs.VARIABLE, str(folder))
        opening = cache_dirs.Opening(str(folder) if how == "option" else None)
        found = opened(data, cache_dir=folder if how == "argument" else None, opening=opening)
        assert found._orders is not None
        assert folder in found._orders.path.parents
        assert contents(found) == expected


def limited(folder: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    os._exit(0 if opened(folder)._orders is None and len(contents(opened(folder))[1]) > 5 else 1)


@pytest.mark.processes
def test_a_full_disk_is_done_without(data: Path, tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    child = fork.Process(target=limited, args=(data,))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert [p.name for p in (data / CACHE_FOLDER).iterdir()] == ["lock"]  # nothing half-written


def builder(folder: Path, expected: list[Any]) -> None:
    os._exit(0 if contents(opened(folder)) == expected and opened(folder)._orders is not None else 1)


@pytest.mark.processes
def test_builders_at_once(data: Path) -> None:
    expected = in_memory(data)
    for locks in (True, False):
        shutil.rmtree(data / CACHE_FOLDER)
        if not locks:
            cache_dirs.fcntl.flock = no_locks
        try:
            fork = multiprocessing.get_context("fork")
            children = [fork.Process(target=builder, args=(data, expected)) for _ in range(6)]
            for child in children:
                child.start()
            for child in children:
                child.join()
        finally:
            cache_dirs.fcntl.flock = FLOCK
        assert [child.exitcode for child in children] == [0] * 6
        assert sorted(p.name for p in (data / CACHE_FOLDER).iterdir()) == ["files-0.cat", "lock", index_of(data).name]


FLOCK = cache_dirs.fcntl.flock


def no_locks(*_: Any) -> None:
    raise OSError(38, "no locks here")


def test_the_order_of_packs_is_shared(data: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    dataset = opened(data)
    monkeypatch.setattr(order, "SHARED_FROM", 5)
    for epoch in (0, 3):
        expected = np.random.RandomState(1024 + epoch).permutation(len(dataset))
        for _ in range(2):
            sampler = InternRepoSampler(dataset)
            sampler.set_epoch(epoch)
            assert np.array_equal(sampler.permutation(), expected)
            assert list(sampler) == expected.tolist()
        (file,) = (data / CACHE_FOLDER).glob(f"packs-{1024 + epoch}-*.order")
        for harm in (lambda f: os.truncate(f, 4097), lambda f: overwrite(f, 4100, b"?"), lambda f: f.write_bytes(b"")):
            harm(file)
            cache_dirs._logged.clear()
            assert np.array_equal(
                order.load_permutation(1024 + epoch, len(dataset), dataset.documents.cache_dirs), expected
            )
            assert f"{file} is damaged" in caplog.text
            assert file.stat().st_size == HEADER_BYTES + 4 * len(dataset)
    walked = InternRepoSampler(range(11), shuffle=False, rank=1, world_size=3)
    assert (walked.share().tolist(), walked.share(4).tolist()) == ([1, 4, 7], [5, 8])


def mixed_folders(opening: cache_dirs.Opening) -> PackedDataset:
    load = load_intern_repo_tokenized_dataset
    return PackedDataset(mixture([dict(type=load, folder=f, opening=opening) for f in ("shared/en", "copied/code")]), 8)


def ranks_open(ranks: Ranks, folder: Path) -> None:
    """Three ranks on two nodes: one index, walked by rank 0 alone; a copy of the data on the other node; other data."""
    os.chdir(folder / ("here" if ranks.rank < 2 else "there"))
    platform.node = lambda: "there" if ranks.rank == 2 else "here"
    walks, true = [], index.walk_files
    index.walk_files = lambda *a: walks.append(a) or true(*a)  # type: ignore[func-returns-value,assignment]

    def build(name: str) -> Any:
        return lambda known: opened(Path(name), opening=cache_dirs.Opening(known=known))

    data = open_on_ranks(build("shared"), ranks)
    assert data._orders is not None
    assert len(walks) == (ranks.rank == 0)
    fingerprints = ranks.gather(data.fingerprint())
    assert len(set(fingerprints)) == 1
    data = open_on_ranks(build("copied"), ranks)
    assert len(walks) == {0: 2, 1: 0, 2: 1}[ranks.rank]
    small = document_order.SMALL
    for document_order.SMALL in (small, 10**6):  # each source with an index of its own, and without
        walks.clear()
        mixed = open_on_ranks(lambda known: mixed_folders(cache_dirs.Opening(known=known)), ranks)
        assert len(walks) == {0: 2, 1: 0, 2: 2}[ranks.rank], "the copy has other times on the other node"
        assert len(set(ranks.gather(mixed.fingerprint()))) == 1
        assert [part.orders is None for part in list_parts(mixed.documents)] == [small < document_order.SMALL] * 2
        ranks.gather(None)
        for part in list_parts(mixed.documents):
            shutil.rmtree(part.folder / CACHE_FOLDER, ignore_errors=True)
        ranks.gather(None)
    document_order.SMALL = small
    for name, words in (
        ("lost", "en/b.bin can be accessed by rank 0, but not on there"),
        ("other", "differ from those of rank 0"),
    ):
        with pytest.raises(DataError, match=words) as error:
            open_on_ranks(build(name), ranks)
        assert error.value.reported_elsewhere == (ranks.rank != 2)
    document_order.SMALL = 10**6  # without an index
    shutil.rmtree(folder / "here" / "lost" / CACHE_FOLDER, ignore_errors=True)
    ranks.gather(None)
    with pytest.raises(DataError, match=r"en/b\.bin can be accessed by rank 0, but not on there"):
        open_on_ranks(build("lost"), ranks)


@pytest.mark.processes
def test_ranks_open_one_folder(tmp_path: Path) -> None:
    for name in ("shared", "copied", "lost", "other"):
        write_corpus(tmp_path / "here" / name, 9)
    (tmp_path / "there").mkdir()
    os.symlink(tmp_path / "here" / "shared", tmp_path / "there" / "shared")
    for name in ("copied", "lost"):
        shutil.copytree(tmp_path / "here" / name, tmp_path / "there" / name, copy_function=shutil.copyfile)
    for ending in (".bin", ".bin.meta"):
        (tmp_path / "there" / "lost" / f"en/b{ending}").unlink()
    write_corpus(tmp_path / "there" / "other", 9, seed=1)
    assert on_ranks(3, ranks_open, tmp_path) == [0, 0, 0]
