"""Id 0 has no sign: what `learn_zero` learns, in packs, in validation, and in what the data tools count."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from xtuner.data import build_packed_dataset, load_intern_repo_tokenized_dataset
from xtuner.data.format.bin_file import read_meta
from xtuner.data.format.writer import write_bin
from xtuner.data.loading.batch import Batch
from xtuner.data.packing.pack import PackedDataset
from xtuner.data.packing.raw_pack import IGNORE, RawPack

PACK = 16


def reference(fragment: list[int]) -> list[bool]:
    """The rule, one token at a time."""
    found = []
    for i, token in enumerate(fragment):
        near = [t for t in reversed(fragment[:i]) if t] or [t for t in fragment[i:] if t] or [1]
        found.append((token or near[0]) > 0)
    return found


@pytest.fixture
def documents(tmp_path: Path) -> list[list[int]]:
    draw = np.random.RandomState(0)
    found = [[int(t) for t in draw.choice([0, 0, 3, 5, -4, -6], n)] for n in draw.randint(1, 40, 30)]
    found += [[0], [0, 0, -7, 0], [-3, 0, 0, 9, 0]]
    (tmp_path / "en").mkdir()
    write_bin(tmp_path / "en" / "a.bin", found)
    return found


def learned_pairs(pack: RawPack, rule: Any = "internevo") -> list[tuple[int, int]]:
    """(position, target) of a pack."""
    targets = np.empty(len(pack.signed), np.int64)
    assert pack.targets(rule, targets) == np.count_nonzero(targets != IGNORE)
    return [(int(i), int(targets[i])) for i in np.flatnonzero(targets != IGNORE)]


@pytest.mark.parametrize("cached", [False, True])
def test_targets(documents: list[list[int]], tmp_path: Path, cached: bool, xtuner: Callable[..., int]) -> None:
    """Those of the reference, token by token, in every form that a pack has; without the option nothing changes."""
    if cached:
        assert xtuner("data", "cache", tmp_path, "--workers", 1) == 0
    plain = PackedDataset(load_intern_repo_tokenized_dataset(tmp_path), PACK)
    data = build_packed_dataset(
        dict(type=load_intern_repo_tokenized_dataset, folder=tmp_path, learn_zero=True), PACK, plain.seed
    )
    zeros = 0
    for number in range(len(plain)):
        old, new = plain.raw(number), data.raw(number)
        tokens, following = old.signed.tolist(), old.following
        file = plain.file_packs(0)
        last = file.spans(number * PACK, (number + 1) * PACK)[-1]
        more = [int(documents[last.row][last.stop])] if last.stop < last.length else []
        assert more in ([], [following])
        wanted = []
        for begin, end in zip(old.borders.tolist(), old.borders.tolist()[1:], strict=False):
            fragment = tokens[begin:end] + (more if end == PACK else [])
            marks = reference(fragment)
            wanted += [(begin + i, abs(fragment[i + 1])) for i in range(len(fragment) - 1) if marks[i + 1]]
        assert learned_pairs(new) == wanted
        zeros += sum(target == 0 for _, target in wanted)
        assert [p for p in wanted if p in learned_pairs(old)] == learned_pairs(old)
        item, batch = data[number], Batch.from_raw(RawPack.from_buffer(new.buffer()), "internevo")
        assert item["input_ids"].tolist() == [abs(t) for t in tokens]
        assert torch.equal(item["targets"], batch.targets)
        assert torch.equal(item["input_ids"], batch.input_ids)
        labels = item["labels"].tolist()
        assert [t for t in labels if t > 0] == [t for t in tokens if t > 0]
        assert 0 not in plain[number]["labels"].tolist() + plain[number]["targets"].tolist()
    assert zeros > 20
    assert data.fingerprint() != plain.fingerprint()
    assert data.show_command(3).endswith("--learn-zero")
    for i, tokens in enumerate(documents):  # what validation reads
        ids, learned = data.documents.file(0).read(i)
        assert (ids.tolist(), learned.tolist()) == ([abs(t) for t in tokens], reference(tokens))


def test_what_the_tools_count(
    documents: list[list[int]], tmp_path: Path, xtuner: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    lost = sum(sum(reference(tokens)) - sum(t > 0 for t in tokens) for tokens in documents)
    assert len(read_meta(tmp_path / "en" / "a.bin")[0]) == len(documents)
    for cached in (False, True):
        if cached:
            assert xtuner("data", "cache", tmp_path, "--workers", 1) == 0
        capsys.readouterr()
        assert xtuner("data", "stats", tmp_path, "--max-length", PACK, "--workers", 1, "--json") == 0
        report = json.loads(capsys.readouterr().out)
        assert report["zeros"] == report["files"][0]["zeros"] == report["types"][0]["zeros"] == lost
    for verb in (("stats", "--max-length", PACK), ("check",)):
        assert xtuner("data", verb[0], tmp_path, *verb[1:], "--workers", 1) == 0
        assert f"{lost} tokens of id 0 are not learned although their neighbours are" in capsys.readouterr().out
    assert xtuner("data", "check", tmp_path, "--workers", 1, "--json") == 0
    assert json.loads(capsys.readouterr().out)["zeros"] == lost
