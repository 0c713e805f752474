"""Data-order files: written the same everywhere, resolved from folders above, wrong ones refused with line numbers."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.corpus import write_corpus
from helpers.paths import reference

from xtuner.core.errors import ConfigError, DataError
from xtuner.data import load_intern_repo_tokenized_dataset
from xtuner.data.format.file_order import read_order, walk_files
from xtuner.data.inspect.build_caches import build_caches
from xtuner.data.packing.pack import PackedDataset

Command = Callable[..., int]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """`data/chatml/train/{en,code dir}`, `data/chatml/valid/en`, with a link that loops."""
    write_corpus(tmp_path / "data" / "chatml" / "train", 2, types=("en", "code dir"))
    write_corpus(tmp_path / "data" / "chatml" / "valid", 2, types=("en",))
    os.symlink(tmp_path / "data", tmp_path / "data" / "chatml" / "train" / "en" / "loop")
    return tmp_path / "data"


@pytest.mark.parametrize("form", ["{}", "{}/", "{}/.", "."])
def test_written_alike_however_the_folder_is_named(
    data: Path, form: str, tmp_path: Path, xtuner: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data)
    assert xtuner("data", "order", "--data-folder", form.format(data), "--save-folder", tmp_path / "o") == 0
    kinds = ("train/code dir", "train/en", "valid/en")
    expected = [f"chatml/{kind}/{name}.bin" for kind in kinds for name in "ab"]
    assert (tmp_path / "o" / "data_order.txt").read_text().splitlines() == expected


def test_the_order_is_the_loaders(data: Path) -> None:
    files = [f.name for f in load_intern_repo_tokenized_dataset(data / "chatml" / "train")]
    assert (
        files
        == [*walk_files(data / "chatml" / "train")]
        == ["code dir/a.bin", "code dir/b.bin", "en/a.bin", "en/b.bin"]
    )
    case = reference("packing", "g17_nested_chain")
    assert list(walk_files(case / "input")) == [f.name for f in load_intern_repo_tokenized_dataset(case / "input")]


def test_an_order_of_a_folder_above(data: Path, tmp_path: Path, xtuner: Command, caplog: Any) -> None:
    """The documented workflow orders /data and trains on /data/chatml/train."""
    xtuner("data", "order", "--data-folder", data, "--save-folder", tmp_path)
    order = tmp_path / "data_order.txt"
    caplog.set_level("INFO", "xtuner")
    expected = ["code dir/a.bin", "code dir/b.bin", "en/a.bin", "en/b.bin"]
    assert read_order(order, data / "chatml" / "train") == expected
    assert "2 entries of" in caplog.text
    assert read_order(tmp_path, data / "chatml" / "valid") == ["en/a.bin", "en/b.bin"]  # its folder will do
    os.symlink(data / "chatml" / "train", tmp_path / "link")
    assert read_order(order, tmp_path / "link") == expected
    order.write_text("\n".join(reversed(order.read_text().split("\n"))).replace("\n", "\r\n"))
    assert read_order(order, data / "chatml" / "train") == expected[::-1]
    order.write_text("./en//b.bin\n\n en/a.bin \n".replace(" ", ""))
    caplog.clear()
    assert read_order(order, data / "chatml" / "train") == ["en/b.bin", "en/a.bin"]
    assert "2 files of" in caplog.text
    assert "not trained on" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("en/a.bin\nen/c.bin\nen/b.bin\nen/d.bin\n", r"2 files of the data order do not exist.*'en/c\.bin'"),
        ("en/a.bin\nen/c.bin\n", "lines 2 "),
        ("fr/a.bin\n", "no entry of the data order"),
        ("en/a.bin\n../x.bin\n", "leaves its folder"),
        ("/en/a.bin\n", "leaves its folder"),
        ("\n", "empty"),
    ],
)
def test_wrong_orders(data: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "order.txt").write_text(text)
    with pytest.raises(ConfigError, match=rf"(?s){message}"):
        read_order(tmp_path / "order.txt", data / "chatml" / "train")


@pytest.mark.processes
def test_a_file_named_several_times_is_taken_as_often(
    data: Path, tiny: Path, tmp_path: Path, xtuner: Command, capsys: Any
) -> None:
    """Its packs come again where it is named again, as from the reference loader; everything counts it as often."""
    folder, order = data / "chatml" / "train", tmp_path / "order.txt"
    (folder / "en" / "loop").unlink()
    alone = {}
    for name in ("en/a.bin", "en/b.bin", "code dir/a.bin"):
        order.write_text(name)
        alone[name] = PackedDataset(load_intern_repo_tokenized_dataset(folder, data_order_path=order), 8)
    names = ["en/b.bin", "en/a.bin", "en/b.bin", "code dir/a.bin", "en/b.bin", "en/a.bin"]
    order.write_text("en/b.bin\nen/a.bin\n./en/b.bin\ncode dir/a.bin\nen//b.bin\nen/a.bin\n")
    expected = [
        pack["input_ids"].tolist() for name in names for pack in map(alone[name].__getitem__, range(len(alone[name])))
    ]
    fingerprints = set()
    for cached in (False, True):  # without anything on disk, and from the index and the token caches
        whole = load_intern_repo_tokenized_dataset(folder, data_order_path=order)
        assert ([f.name for f in whole], whole.num_repeated) == (names, 2)
        if cached:
            capsys.readouterr()
            made = build_caches(whole, 1024)
            assert (made.tokens, made.made) == (3, 3)
        packs = PackedDataset(whole, 8)
        assert [packs[i]["input_ids"].tolist() for i in range(len(packs))] == expected
        fingerprints.add(packs.fingerprint())
    assert len(fingerprints) == 1
    order.write_text("\n".join(dict.fromkeys(names)))
    assert load_intern_repo_tokenized_dataset(folder, data_order_path=order).fingerprint() not in fingerprints
    order.write_text("\n".join(names))
    capsys.readouterr()
    assert xtuner("data", "stats", folder, "--data-order", order, "--max-length", 8, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["repeated"], told["packs"], [f["name"] for f in told["files"]]) == (2, len(expected), names)
    files = {f.name: f for f in load_intern_repo_tokenized_dataset(folder)}
    assert told["learned"] == sum(
        int((files[name].read_document(i) > 0).sum()) for name in names for i in range(files[name].num_documents)
    )
    options = ["custom_hooks=[]", f"dataset_folder={folder}", f"data_order_path={order}", "max_length=8"]
    assert xtuner("train", tiny, "--work-dir", tmp_path / "w", "--cfg-options", *options) == 0
    report, said = capsys.readouterr()
    named = "each is used as often as named: en/b.bin 3 times, en/a.bin 2"
    assert said.count(f"names 2 of its 3 files more than once; {named}") == 1
    assert "6 files (2 listed more than once)" in report
    assert xtuner("train", tiny, "--work-dir", tmp_path / "w", "--resume", "--cfg-options", *options) == 0
    order.write_text("\n".join(names[:-1]))
    with pytest.raises(DataError, match="data is not what the checkpoint"):
        xtuner("train", tiny, "--work-dir", tmp_path / "w", "--resume", "--cfg-options", *options)


def test_folders_that_do_not_do(tmp_path: Path, xtuner: Command) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        xtuner("data", "order", "--data-folder", tmp_path / "no", "--save-folder", tmp_path)
    with pytest.raises(DataError, match=r"no \.bin file"):
        xtuner("data", "order", "--data-folder", tmp_path, "--save-folder", tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_order(tmp_path / "nowhere.txt", tmp_path)
