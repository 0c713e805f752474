"""Text, token cache and reference definition give the same packs, whatever the documents are; bad texts are errors."""

import json
import os
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.corpus import write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st

from xtuner.core.errors import DataError
from xtuner.data import InternRepoSampler, load_intern_repo_tokenized_dataset
from xtuner.data.format import cache_dirs, text_reader, token_cache
from xtuner.data.format.file_order import CACHE_FOLDER
from xtuner.data.format.meta import MetaView, read_meta
from xtuner.data.format.parse_tokens import parse_line, parse_list
from xtuner.data.format.text_reader import SpanReader
from xtuner.data.format.token_cache import TokenCache
from xtuner.data.format.writer import write_bin
from xtuner.data.inspect import scan
from xtuner.data.inspect.build_caches import build_caches
from xtuner.data.loading.loader import PackLoader
from xtuner.data.loading.sampler import Position
from xtuner.data.packing import document_order
from xtuner.data.packing.pack import PackedDataset
from xtuner.data.packing.raw_pack import RawPack

MANY = settings(max_examples=120, deadline=None, derandomize=True, database=None)
DOCUMENT = st.lists(
    st.one_of(st.integers(-120, 120), st.sampled_from([0, 99999999, -(2**31) + 1, 2**31 - 1])), max_size=14
)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_dirs, "_logged", set())


def definition(documents: list[list[int]], seed: int, min_length: int, length: int) -> list[dict[str, Any]]:
    """Packs by the words of the reference's README, in plain Python."""
    kept = [d for d in documents if len(d) >= min_length]
    order = np.arange(len(kept))
    np.random.RandomState(seed).shuffle(order)
    line = [(n, i, t) for n, d in enumerate(order) for i, t in enumerate(kept[d])]
    packs = []
    for begin in range(0, len(line) - length + 1, length):
        part = line[begin : begin + length]
        starts = [k for k in range(length) if k == 0 or part[k][0] != part[k - 1][0]]
        positions = [k - max(s for s in starts if s <= k) for k in range(length)]
        after = [line[begin + k + 1] if begin + k + 1 < len(line) else None for k in range(length)]
        targets = [
            a[2] if a is not None and a[0] == p[0] and a[2] > 0 else -100 for p, a in zip(part, after, strict=True)
        ]
        packs.append(
            {
                "input_ids": [abs(t) for _, _, t in part],
                "labels": [t if t > 0 else -100 for _, _, t in part],
                "position_ids": positions,
                "targets": targets,
                "starts": starts,
            }
        )
    return packs


@MANY
@given(
    documents=st.lists(DOCUMENT, min_size=1, max_size=14),
    seed=st.sampled_from([0, 1024, 2**32 - 1]),
    min_length=st.integers(0, 3),
    length=st.integers(1, 23),
    long=st.sampled_from([3, 8, 2**15]),
    block=st.sampled_from([24, 61, 2**18]),
    separator=st.sampled_from([", ", ","]),
)
def test_text_cache_and_definition_agree(
    documents: list[list[int]], seed: int, min_length: int, length: int, long: int, block: int, separator: str
) -> None:
    before = text_reader.LONG, text_reader.BLOCK, document_order.SMALL, scan.BLOCK, scan.RANGE
    text_reader.LONG, text_reader.BLOCK, document_order.SMALL, scan.BLOCK, scan.RANGE = (
        long,
        block,
        0,
        max(block, 40),
        3 * block,
    )
    try:
        with tempfile.TemporaryDirectory() as folder:
            write_bin(Path(folder, "a.bin"), documents)
            if separator == ",":
                tighten(Path(folder, "a.bin"))
            compare(Path(folder), documents, seed, min_length, length)
    finally:
        text_reader.LONG, text_reader.BLOCK, document_order.SMALL, scan.BLOCK, scan.RANGE = before


def tighten(path: Path) -> None:
    """No spaces between numbers, CRLF: another writer's form."""
    lines = [line.replace(b", ", b",") + b"\r\n" for line in path.read_bytes().split(b"\n")[:-1]]
    path.write_bytes(b"".join(lines))
    meta = Path(f"{path}.meta")
    table = np.load(meta)
    table[:, 0] = np.cumsum([0, *map(len, lines)])[:-1]
    np.save(open(meta, "wb"), table)  # noqa: SIM115


def compare(folder: Path, documents: list[list[int]], seed: int, min_length: int, length: int) -> None:
    expected = definition(documents, seed, min_length, length)
    whole = load_intern_repo_tokenized_dataset(folder, min_length)
    if not len(whole):
        assert expected == []
        return
    parsed = PackedDataset(whole, length, seed)
    assert build_caches(whole, seed, workers=1).tokens == 1
    cached = PackedDataset(load_intern_repo_tokenized_dataset(folder, min_length), length, seed)
    assert len(parsed) == len(cached) == len(expected)
    assert isinstance(parsed.file_packs(0).reader, TokenCache | SpanReader)
    parsed._files.clear()
    table = cached.file_packs(0)
    assert isinstance(table.reader, TokenCache)
    text = SpanReader(table.file, text_reader.LongLines())
    for i, pack in enumerate(expected):
        from_cache = table.read(i * length, (i + 1) * length)
        places = table.span_arrays(i * length, (i + 1) * length)
        for _ in range(2):  # with and without what is noted of long lines
            signed, following = text.read(places)
            assert signed.tolist() == from_cache.signed.tolist()
            assert (following or 0) == from_cache.following
        got = cached[i]
        for key in ("input_ids", "labels", "position_ids", "targets"):
            assert got[key].tolist() == pack[key], key
        borders = got["cumulative_len"].tolist()
        assert sorted(set(borders)) == [*pack["starts"], length]
        again = RawPack.from_buffer(from_cache.buffer())
        assert [np.asarray(a).tolist() for a in again] == [np.asarray(a).tolist() for a in from_cache]


@MANY
@given(st.text(alphabet="0123456789-, []}x.e\t", max_size=24), st.booleans())
def test_lists_are_read_as_json_reads_them(text: str, tight: bool) -> None:
    """Whatever stands between the brackets: the same numbers, or refused by both."""
    line = ('{"tokens":[' if tight else '{"tokens": [') + text + "]}\r\n"
    try:
        expected = json.loads(line)["tokens"]
        right = isinstance(expected, list) and all(type(v) is int and abs(v) < 2**31 for v in expected)
    except ValueError:
        right = False
    if right:
        assert parse_line(line.encode()).tolist() == expected
    else:
        with pytest.raises(DataError):
            parse_line(line.encode())


@MANY
@given(st.lists(st.integers(-99999999, 99999999), min_size=1, max_size=40), st.data())
def test_no_wrong_list_is_taken(numbers: list[int], data: Any) -> None:
    """One byte of a right list changed: numpy reads what JSON reads, or leaves it to JSON."""
    text = bytearray(", ".join(map(str, numbers)).encode())
    found = parse_list(bytes(text))
    assert found is not None
    assert found.tolist() == numbers
    text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.sampled_from(b"0159-, x[]\n"))
    found = parse_list(bytes(text))
    if found is not None:
        assert found.tolist() == json.loads(b"[" + text + b"]")


@pytest.mark.parametrize("dtype", ["<i8", ">i4", "<u4"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("columns", [2, 3])
def test_metas_of_every_form(dtype: str, order: Any, columns: int, tmp_path: Path) -> None:
    """As numpy reads them, whole, mapped, and row by row."""
    write_bin(tmp_path / "a.bin", [[1, 2, 3], [-4, 5], [6, 7, 8]])
    file = tmp_path / "a.bin.meta"
    table = np.load(file)
    table = np.insert(table, 1, 7, axis=1) if columns == 3 else table
    np.save(open(file, "wb"), np.array(table, dtype=dtype, order=order))  # noqa: SIM115
    expected = [np.load(file)[:, i].tolist() for i in (0, -1)]
    assert [a.tolist() for a in read_meta(tmp_path / "a.bin")] == expected
    view = MetaView(tmp_path / "a.bin")
    assert [view.offsets.tolist(), view.lengths.tolist()] == expected
    data = PackedDataset(load_intern_repo_tokenized_dataset(tmp_path), 8)
    assert sorted(np.abs(data.raw(0).signed).tolist()) == list(range(1, 9))


def stream(folder: Path, workers: int = 0) -> Iterator[Any]:
    data = PackedDataset(load_intern_repo_tokenized_dataset(folder), 16)
    loader = PackLoader(data, InternRepoSampler(data), workers)
    return loader.iterate_from(Position())


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("how", ["shrinks", "grows", "changes", "goes", "cache"])
def test_files_that_change_under_a_running_job(cached: bool, how: str, tmp_path: Path) -> None:
    """A named error at the next pack, and nothing that was read from the wrong place."""
    folder = write_corpus(tmp_path / "data", 30, types=("en",))
    if cached:
        build_caches(load_intern_repo_tokenized_dataset(folder), 1024, workers=1)
    before = [b.input_ids.tolist() for b in islice(stream(folder), 60)]
    packs = stream(folder)
    seen = [next(packs).input_ids.tolist()]
    for file in folder.glob(f"{CACHE_FOLDER}/tokens/en/*" if how == "cache" else "en/*.bin"):
        if how == "grows":
            file.write_bytes(file.read_bytes() + b'{"tokens": [1]}\n')
        elif how == "changes":
            os.utime(file, ns=(1, 1))
        elif how == "goes":
            file.unlink()
        elif how == "shrinks":
            os.truncate(file, file.stat().st_size // 2)
        else:  # caches are mapped: what is written in their place is another file, as `data cache` does it
            half = file.with_name("half")
            half.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
            half.rename(file)
    if how == "cache" and not cached:
        seen += [b.input_ids.tolist() for b in islice(packs, 59)]
    else:
        words = {"goes": "cannot be (opened|read): No such file", "cache": "token cache of en/. *|token cache"}
        with pytest.raises(DataError, match=words.get(how, "has changed since it was indexed")) as error:
            seen += [b.input_ids.tolist() for b in islice(packs, 59)]
        assert error.value.exit_code == 65
    assert seen == before[: len(seen)]


def test_a_token_cache_that_is_not_fresh_is_told(tmp_path: Path, caplog: Any) -> None:
    folder = write_corpus(tmp_path / "data", 30, types=("en",))
    expected = [b.input_ids.tolist() for b in islice(stream(folder), 60)]
    build_caches(load_intern_repo_tokenized_dataset(folder), 1024, workers=1)
    file = folder / CACHE_FOLDER / token_cache.cache_name("en/a.bin")
    whole = file.read_bytes()
    for harm, words in (
        (lambda: os.truncate(file, len(whole) - 4), "is damaged or of another version"),
        (lambda: file.write_bytes(b""), "is damaged or of another version"),
        (lambda: file.write_bytes(whole.replace(b'tokens": 1', b'tokens": 0', 1)), "is damaged or of another version"),
        (lambda: os.utime(folder / "en" / "a.bin", ns=(1, 1)), "is older than its text"),
    ):
        file.write_bytes(whole)
        harm()
        cache_dirs._logged.clear()
        caplog.clear()
        assert [b.input_ids.tolist() for b in islice(stream(folder), 60)] == expected
        assert caplog.text.count(words) == 1
    caplog.clear()
    made = build_caches(load_intern_repo_tokenized_dataset(folder), 1024, workers=1)
    assert (made.tokens, made.made) == (2, 1)
    data = PackedDataset(load_intern_repo_tokenized_dataset(folder), 16)
    assert all(isinstance(data.file_packs(i).reader, TokenCache) for i in range(2))
    data.vocab_size = 100
    with pytest.raises(DataError, match="outside the vocabulary of 100"):
        [data[i] for i in range(len(data))]


def test_a_line_of_a_gigabyte_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here one of 3 MB, and a limit to match: in the usual form of any length, in another one up to a limit."""
    monkeypatch.setattr(text_reader, "BLOCK", 2**12)
    monkeypatch.setattr(text_reader, "MAX_ODD_LINE", 2**14)
    document = np.random.RandomState(0).randint(-90000, 90000, size=400_000).tolist()
    write_bin(tmp_path / "a.bin", [[1, 2, 3], document, [4, 5]])
    data = PackedDataset(load_intern_repo_tokenized_dataset(tmp_path), 4096)
    most, true = [0], os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, at: most.append(n) or true(fd, n, at))  # type: ignore[func-returns-value]
    signed = np.concatenate([data.raw(i).signed for i in reversed(range(len(data)))][::-1]).tolist()
    line = [t for d in data.file_packs(0).order for t in [[1, 2, 3], document, [4, 5]][d]]
    assert signed == line[: len(signed)]
    assert max(most) < 2**17
    text = (tmp_path / "a.bin").read_bytes()
    (tmp_path / "a.bin").write_bytes(text.replace(b'{"tokens": [', b'{ "tokens": ['))
    table = np.load(tmp_path / "a.bin.meta")
    table[:, 0] += [0, 1, 2]
    np.save(open(tmp_path / "a.bin.meta", "wb"), table)  # noqa: SIM115
    odd = PackedDataset(load_intern_repo_tokenized_dataset(tmp_path), 4096)
    with pytest.raises(DataError, match="a line of more than 16,384 bytes is not in the usual form"):
        [odd[i] for i in range(len(odd))]
