"""Packs, labels and orders are bit-equal to the reference loader's."""

import json
import pickle
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.paths import REFERENCE, reference

from xtuner.core.errors import DataError, XTunerError
from xtuner.data import InternRepoSampler, build_packed_dataset, load_intern_repo_tokenized_dataset
from xtuner.data.format import text_reader
from xtuner.data.format.bin_file import BinFile
from xtuner.data.format.text_reader import LongLine, LongLines, SpanReader
from xtuner.data.format.writer import write_bin
from xtuner.data.loading.loader import PackLoader
from xtuner.data.loading.sampler import Position, iterate_numbers, packs_per_epoch
from xtuner.data.packing.pack import PackedDataset

CASES = sorted(p.name for p in (REFERENCE / "packing").iterdir() if p.is_dir())


def open_case(case: Path, expected: dict[str, Any]) -> PackedDataset:
    args = expected["args"]
    return build_packed_dataset(
        dataset_cfg=dict(
            type=load_intern_repo_tokenized_dataset,
            folder=case / "input",
            min_length=args["min_length"],
            data_order_path=args["data_order"] and case / args["data_order"],
            file_type=args["file_type"],
        ),
        packed_length=args["packed_length"],
        seed=args["seed"],
    )


def test_there_are_24_cases() -> None:
    assert len(CASES) == 24


@pytest.mark.parametrize("name", CASES)
def test_equal_to_the_reference_loader(name: str) -> None:
    case = reference("packing", name)
    expected = json.loads((case / "expected.json").read_text())
    if expected["raises"]:
        with pytest.raises(DataError):
            open_case(case, expected)
        return
    dataset = open_case(case, expected)
    assert [f.name for f in dataset.documents] == expected["files"]
    assert [f.num_documents for f in dataset.documents] == expected["docs_per_file"]
    assert [f.num_tokens for f in dataset.documents] == expected["tokens_per_file"]
    assert dataset.packs_per_file == expected["packs_per_file"]
    assert len(dataset) == expected["num_packs"]
    for i, order in enumerate(expected["shuffled_indices"]):
        assert dataset.file_packs(i).order.tolist() == order
    for i, pack in enumerate(expected["packs"]):
        if "raises" in pack:
            with pytest.raises(DataError, match="not JSON") as error:
                dataset[i]
            assert "a.bin:50" in str(error.value)
            continue
        got = dataset[i]
        for key in ("input_ids", "labels", "position_ids", "cumulative_len"):
            assert got[key].tolist() == pack[key], (i, key)
            assert got[key].dtype == (torch.int32 if key == "cumulative_len" else torch.int64)
    for s in expected["samplers"]:
        for rank, packs in enumerate(s["ranks"]):
            sampler = InternRepoSampler(dataset, shuffle=s["shuffle"], seed=1024, rank=rank, world_size=s["world_size"])
            sampler.set_epoch(s["epoch"])
            assert list(sampler) == packs
            assert len(sampler) == len(packs)


def whole_line(dataset: PackedDataset, file_number: int) -> list[tuple[int, int, bool]]:
    """(document, signed token, is last of its document) along a file's token line, by the definition."""
    line = []
    table = dataset.file_packs(file_number)
    for document in table.order:
        tokens = table.file.read_document(int(document)).tolist()
        line += [(int(document), t, i == len(tokens) - 1) for i, t in enumerate(tokens)]
    return line


@pytest.mark.parametrize("name", [c for c in CASES if c[:3] not in {"g22", "g23", "g24"}])
def test_targets(name: str) -> None:
    """Each target is the next token of the same document, also across a pack's end; never of the next document."""
    case = reference("packing", name)
    dataset = open_case(case, json.loads((case / "expected.json").read_text()))
    plain = PackedDataset(dataset.documents, dataset.packed_length, dataset.seed, "xtuner")
    for i in range(len(dataset)):
        file_number, start = dataset.locate(i)
        line = whole_line(dataset, file_number)
        for t, target in enumerate(dataset[i]["targets"].tolist()):
            _, _, last = line[start + t]
            following = None if last else line[start + t + 1][1]
            assert target == (following if following is not None and following > 0 else -100)
        assert plain[i]["targets"].tolist() == [*dataset[i]["labels"].tolist()[1:], -100]


def test_a_document_of_many_packs_is_gone_through_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then each pack reads what it needs; and the text is opened once a pack, however many documents it has."""
    monkeypatch.setattr(text_reader, "LONG", 9)
    monkeypatch.setattr(text_reader, "BLOCK", 32)
    documents = [list(range(1, 100)), [1, 2], [3], [4, 5, 6], [7] * 25]
    write_bin(tmp_path / "a.bin", documents)
    folder = load_intern_repo_tokenized_dataset(tmp_path)
    opened, noted, cut = [], [], []
    true_open, true_note, true_list = BinFile.open, SpanReader._index_line, text_reader.parse_list
    monkeypatch.setattr(BinFile, "open", lambda self: opened.append(self) or true_open(self))  # type: ignore[func-returns-value]
    monkeypatch.setattr(SpanReader, "_index_line", lambda *a: noted.append(a) or true_note(*a))  # type: ignore[func-returns-value]
    monkeypatch.setattr(text_reader, "parse_list", lambda text: cut.append(len(text)) or true_list(text))  # type: ignore[func-returns-value]
    dataset = PackedDataset(folder, 10)
    packs = [dataset[i] for i in (*range(13), *range(13))]
    assert len(packs) == 26 == len(opened)
    line = [token for d in dataset.file_packs(0).order for token in documents[d]]
    assert torch.cat([p["input_ids"] for p in packs[:13]]).tolist() == line[:130]
    assert len(noted) == 2  # the two long ones
    assert max(cut) <= 4 * 11  # a pack and the token after it
    dataset.vocab_size = 50
    with pytest.raises(DataError, match="outside the vocabulary"):  # what is kept was not checked against it
        [dataset[i] for i in range(13)]
    assert len(pickle.loads(pickle.dumps(dataset))) == 13


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.processes)])
def test_packs_of_a_million_tokens(workers: int, tmp_path: Path) -> None:
    """Documents longer than a pack, as long as one, and short ones; also as batches of the loader."""
    million, draw = 2**20, np.random.RandomState(0)
    documents = [draw.randint(-500, 500, n) for n in (1_100_000, 5, 400_000, million, 1, 800_000)]
    for document in documents:
        document[document == 0] = 1
    text = "".join(f'{{"tokens": {document.tolist()}}}\n' for document in documents)
    (tmp_path / "a.bin").write_text(text)
    offsets = np.cumsum([0, *(len(line) + 1 for line in text.splitlines())])[:-1]
    with open(tmp_path / "a.bin.meta", "wb") as f:
        np.save(f, np.stack((offsets, [len(d) for d in documents]), 1))
    dataset = PackedDataset(load_intern_repo_tokenized_dataset(tmp_path), million)
    order = dataset.file_packs(0).order
    line = np.concatenate([documents[d] for d in order])
    ends = np.cumsum([len(documents[d]) for d in order])
    assert len(dataset) == 3
    assert dataset.longest_document() == max(len(d) for d in documents)
    loader = PackLoader(dataset, InternRepoSampler(dataset, shuffle=False), workers)
    stream = loader.iterate_from(Position())
    for pack, batch in zip(range(3), stream, strict=False):
        start, stop = pack * million, (pack + 1) * million
        inside = ends[(ends > start) & (ends < stop)] - start
        assert batch.cu_seqlens.tolist() == [0, *inside, million]
        assert batch.max_seqlen == dataset.longest_fragment(pack) == np.diff([0, *inside, million]).max()
        assert batch.attention_pairs == dataset.costs(np.array([pack]))[0] > 2**31
        assert np.array_equal(batch.input_ids, np.abs(line[start:stop]))
        targets = np.where(line[start + 1 : stop + 1] > 0, line[start + 1 : stop + 1], -100)
        targets[ends[(ends > start) & (ends <= stop)] - start - 1] = -100
        assert np.array_equal(batch.targets, targets)
        begins = np.repeat([0, *inside], np.diff([0, *inside, million]))
        assert np.array_equal(batch.position_ids, np.arange(million) - begins)
    stream.close()  # type: ignore[attr-defined]


def test_what_is_known_of_long_documents_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    long = LongLines()
    monkeypatch.setattr(LongLines, "MAX_LINES", 16)
    for i in range(40):
        long.add(i, LongLine(tokens=np.arange(8)))
    assert list(long.held) == list(range(39, 23, -1))
    monkeypatch.setattr(LongLines, "MAX_BYTES", 3 * (64 + 64))
    long.add(40, LongLine(commas=[0], tokens=np.arange(8)))
    assert list(long.held) == [40, 39, 38, 37, 36]
    long.add(41, LongLine(tokens=np.arange(100)))
    assert list(long.held) == [41]
    assert long.find(40) is None


def test_rank_shares_follow_the_position() -> None:
    """From any offset, the ranks' shares interleave to the rest of the permutation, whatever their number."""
    for num_packs in (1, 7, 24):
        for size in (1, 2, 3, 5):
            samplers = [InternRepoSampler(range(num_packs), rank=r, world_size=size) for r in range(size)]
            for offset in range(0, num_packs, size):
                shares = [s.share(offset) for s in samplers]
                rest = samplers[0].permutation()[offset:]
                assert np.array_equal(np.stack(shares, 1).reshape(-1), rest[: len(rest) // size * size])


def test_position_walks_through_epochs() -> None:
    for num_packs, begun_on, step in ((7, 1, 3), (7, 2, 4), (8, 2, 6), (5, 5, 5), (24, 3, 9), (5, 1, 23)):
        position, per_epoch = Position(), packs_per_epoch(num_packs, begun_on)
        assert per_epoch == num_packs // begun_on * begun_on
        for done in range(step, 3 * per_epoch + 1, step):
            position = position.advance(step, per_epoch)
            assert (position.epoch, position.offset) == divmod(done, per_epoch)
    # Older versions cut an epoch by the ranks of the day: theirs may be beyond ours.
    assert Position(1, 102).advance(3, 100) == Position(2, 3)


def test_one_stream_whatever_the_ranks() -> None:
    """Begun on b ranks, any n continue anywhere: their shares interleave to the same stream; equal n: the reference."""
    for num_packs, begun_on in ((7, 1), (11, 2), (5, 4), (24, 3), (1, 1)):
        per_epoch = packs_per_epoch(num_packs, begun_on)
        draws = [np.random.RandomState(1024 + e).permutation(num_packs)[:per_epoch] for e in range(9)]
        expected = np.concatenate(draws)
        for size in (1, 2, 3, 4, 8):
            samplers = [InternRepoSampler(range(num_packs), rank=r, world_size=size) for r in range(size)]
            for done in range(2 * per_epoch + 1):
                position = Position().advance(done, per_epoch)
                streams = [chain.from_iterable(map(iterate_numbers, s.stream(position, per_epoch))) for s in samplers]
                taken = [next(s) for _ in range(3 * per_epoch // size) for s in streams]
                assert taken == expected[done : done + len(taken)].tolist(), (num_packs, begun_on, size, done)
        for rank in range(begun_on):  # the reference: an epoch's permutation, cut, every n-th
            sampler = InternRepoSampler(range(num_packs), rank=rank, world_size=begun_on)
            for epoch, share in zip(range(3), sampler.stream(Position(), per_epoch), strict=False):
                assert share.tolist() == draws[epoch][rank::begun_on].tolist() == list(sampler)
        kept = next(InternRepoSampler(range(num_packs), False, rank=0, world_size=2).stream(Position(), per_epoch))
        assert kept.tolist() == list(range(0, per_epoch, 2))


def test_meta_that_lies_is_refused(tmp_path: Path) -> None:
    lines = [b'{"tokens": [1, 2, 3]}\n', b'{"tokens": [4, 5]}\n']
    offsets = [0, len(lines[0])]

    def write(
        lengths: list[int], offs: list[int] = offsets, dtype: Any = np.int64, text: bytes = b"".join(lines)
    ) -> None:
        (tmp_path / "a.bin").write_bytes(text)
        with open(tmp_path / "a.bin.meta", "wb") as f:
            np.save(f, np.array(list(zip(offs, lengths, strict=True)), dtype=dtype))

    def read_all() -> None:
        dataset = PackedDataset(load_intern_repo_tokenized_dataset(tmp_path), 5)
        for i in range(len(dataset)):
            dataset[i]

    write([3, 2])
    read_all()
    for bad, message in (
        (dict(lengths=[2, 3]), "its meta says"),
        (dict(lengths=[3, 2], offs=[0, 99]), "begins at byte 99"),
        (dict(lengths=[3, -2]), "negative length"),
        (dict(lengths=[3, 2], offs=[0, -5], dtype=np.int32), "overflowed 32 bits"),
        (dict(lengths=[3, 2], dtype=np.float32), "not integers"),
        (dict(lengths=[3, 2], text=b'{"tokens": [1, 2, true]}\n{"tokens": [4, 5]}', offs=[0, 25]), "True, not an int"),
        (dict(lengths=[3, 2], text=b'{"tokens": [1, 2, 3.0]}\n{"tokens": [4, 5]}', offs=[0, 24]), "3.0, not an int"),
        (dict(lengths=[3, 2], text=b'{"tokens": [1, 2, NaN]}\n{"tokens": [4, 5]}', offs=[0, 24]), "nan, not an int"),
        (dict(lengths=[3, 2], text=b'{"tokens": [1,, 2]}\n{"tokens": [4, 5]}', offs=[0, 20]), "not JSON"),
        (dict(lengths=[3, 2], text=b'{"tokens": [1, 2,]}\n{"tokens": [4, 5]}', offs=[0, 20]), "not JSON"),
        (dict(lengths=[3, 2], text=b'{"tokens": [1, 2 3]}\n{"tokens": [4, 5]}', offs=[0, 21]), "not JSON"),
        (dict(lengths=[3, 2], text=b'{"tokens": [1, 2, 9876543210]}\n{"tokens": [4, 5]}', offs=[0, 31]), "beyond 2"),
        (dict(lengths=[3, 2], text=b'{"tokens": [1, 2, %d]}\n{"tokens": [4, 5]}' % 10**25, offs=[0, 47]), "beyond 2"),
    ):
        write(**bad)  # type: ignore[arg-type]
        with pytest.raises(XTunerError, match=message):
            read_all()


def test_fingerprint_is_of_contents(tmp_path: Path) -> None:
    import shutil

    case = reference("packing", "g02_three_files_pl37")
    shutil.copytree(case / "input", tmp_path / "moved")
    here = PackedDataset(load_intern_repo_tokenized_dataset(case / "input"), 37)
    moved = PackedDataset(load_intern_repo_tokenized_dataset(tmp_path / "moved"), 37)
    assert here.fingerprint() == moved.fingerprint()
    assert here.fingerprint() != PackedDataset(moved.documents, 36).fingerprint()
    assert here.fingerprint() != PackedDataset(moved.documents, 37, seed=1).fingerprint()
    assert (
        here.fingerprint() != PackedDataset(load_intern_repo_tokenized_dataset(tmp_path / "moved", 3), 37).fingerprint()
    )
