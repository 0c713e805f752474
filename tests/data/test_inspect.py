"""`data check`, `data stats` and `data cache`: everything wrong is found, every number is the packs' own."""

import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.corpus import VOCABULARY, write_corpus

from xtuner.core.errors import CheckpointError, ConfigError, DataError
from xtuner.data import load_intern_repo_tokenized_dataset
from xtuner.data.format import cache_dirs
from xtuner.data.format.file_order import CACHE_FOLDER
from xtuner.data.format.token_cache import TokenCache
from xtuner.data.format.writer import write_bin
from xtuner.data.inspect import scan
from xtuner.data.inspect.check_files import check_folder
from xtuner.data.inspect.scan import Scanner, split_file
from xtuner.data.loading.batch import Batch
from xtuner.data.packing import document_order
from xtuner.data.packing.pack import PackedDataset

Command = Callable[..., int]


@pytest.fixture(autouse=True)
def own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(cache_dirs, "_logged", set())


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "data", 30)


def found(folder: Path, **how: Any) -> list[str]:
    return [f"{r.kind} {r.file}: {r.what}" for r in check_folder(folder, workers=1, **how).rows]


def replace(path: Path, old: bytes, new: bytes) -> None:
    raw = path.read_bytes()
    assert old in raw
    path.write_bytes(raw.replace(old, new, 1))


def line(path: Path, number: int) -> bytes:
    return path.read_bytes().split(b"\n")[number]


def meta_of(path: Path) -> np.ndarray:
    return np.load(f"{path}.meta")


def put_meta(path: Path, table: np.ndarray) -> None:
    with open(f"{path}.meta", "wb") as f:
        np.save(f, table)


def longer(path: Path) -> None:
    table = meta_of(path)
    table[7, 1] += 1
    put_meta(path, table)


def without_row(path: Path) -> None:
    put_meta(path, np.delete(meta_of(path), 7, 0))


def between_lines(path: Path) -> None:
    table = meta_of(path)
    table[7, 0] += 3
    put_meta(path, table)


# what is done to en/a.bin → what is reported of it, and whether a new meta repairs it
WRONG: dict[str, tuple[Callable[[Path], Any], str, bool]] = {
    "no meta": (lambda p: os.unlink(f"{p}.meta"), "a.bin has no meta", True),
    "torn meta": (lambda p: os.truncate(f"{p}.meta", 200), "not an npy array", True),
    "longer": (longer, r"byte \d+: a document of \d+ tokens, \d+ in the meta", True),
    "without row": (without_row, r"byte \d+: a document that is not in the meta", True),
    "between lines": (between_lines, r"byte \d+: a document that is not in the meta", True),
    "more lines": (lambda p: p.write_bytes(p.read_bytes() + b'{"tokens": [5, 6]}\n'), "not in the meta", True),
    "fewer lines": (lambda p: p.write_bytes(p.read_bytes().rpartition(b"{")[0]), "but the .bin has", True),
    "no JSON": (lambda p: replace(p, b"]}", b"]]"), "byte 0: a line is not JSON", False),
    "text": (lambda p: replace(p, b"[", b'["1", '), "a token is '1', not an integer", False),
    "large id": (lambda p: (replace(p, b"[", b"[777, "), put_meta_again(p)), "token id 777 is outside", False),
    "unreadable": (lambda p: (p.unlink(), os.symlink("nowhere", p)), "cannot be opened: No such file", False),
}


def put_meta_again(path: Path) -> None:
    lines = path.read_bytes().split(b"\n")[:-1]
    counts = [len(json.loads(x)["tokens"]) for x in lines]
    put_meta(path, np.stack((np.cumsum([0, *(len(x) + 1 for x in lines)])[:-1], counts), axis=1))


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_found_and_fixed(name: str, data: Path) -> None:
    assert found(data, vocab_size=VOCABULARY) == []
    harm, words, mendable = WRONG[name]
    file = data / "en" / "a.bin"
    harm(file)
    rows = found(data, vocab_size=VOCABULARY)
    assert [r for r in rows if not r.startswith(("problem en/a.bin", "note en/a.bin: is a link"))] == []
    assert re.search(words, "\n".join(rows))
    before = file.read_bytes() if file.exists() else None
    rows = found(data, vocab_size=VOCABULARY, fix_meta=True)
    assert any(r.startswith("fixed en/a.bin: a new meta") for r in rows) == mendable
    assert sorted(p.name for p in (data / "en").iterdir() if p.name.startswith(".")) == []
    if mendable:
        assert file.read_bytes() == before
        assert found(data, vocab_size=VOCABULARY) == []
        mended = meta_of(file)
        put_meta_again(file)
        assert np.array_equal(meta_of(file), mended)
        load_intern_repo_tokenized_dataset(data)
    else:
        assert rows == found(data, vocab_size=VOCABULARY)


def test_odd_but_right(data: Path) -> None:
    """Links, copies, metas alone, CRLF, a BOM, other keys, blank lines, no newline at the end."""
    shutil.copy(data / "en" / "a.bin", data / "code" / "z.bin")
    shutil.copy(data / "en" / "a.bin.meta", data / "code" / "z.bin.meta")
    for ending in (".bin", ".bin.meta"):
        os.link(data / "en" / f"b{ending}", data / f"again{ending}")
    os.symlink(data / "en", data / "link")
    os.symlink(data, data / "en" / "loop")
    (data / "alone.bin.meta").write_bytes(b"")
    lines = [b'\xef\xbb\xbf{"tokens": [1, 2]}\r\n', b"\r\n", b'{"text": "[", "tokens":[3]}\n', b'{"tokens": []}']
    (data / "odd.bin").write_bytes(b"".join(lines))
    put_meta(data / "odd.bin", np.array([[0, 2], [len(lines[0]) + 2, 1], [sum(map(len, lines[:3])), 0]], np.int32))
    report = found(data)
    for words in (
        "problem en/b.bin: is the same file as again.bin",
        "problem en/a.bin: has the same text as code/z.bin",
        "problem link/a.bin: is the same file as en/a.bin",
        "note alone.bin.meta: is a meta without its text",
        f"note link: is a link to the folder {data / 'en'}",
    ):
        assert [row for row in report if row.startswith(words)], words
    assert not [row for row in report if "odd.bin" in row]


def test_parts_and_blocks_change_nothing(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a part or a block is, each line is taken once: also lines longer than both, and broken ones."""
    file = data / "en" / "a.bin"
    document = np.random.RandomState(0).randint(-300, 300, size=500).tolist()
    text = file.read_bytes()
    long = b'{"tokens": [' + ", ".join(map(str, document)).encode()
    lines = [long + b"]}\r\n", long + b', "x"]}\n', b'{"tokens": [1, 2\n', b"\n", long + b"]}"]
    file.write_bytes(b"".join(lines[:2]) + text + b"".join(lines[2:]))

    def scanned() -> tuple[Any, ...]:
        taken: list[int] = []
        parts = [
            Scanner(p, 250, lambda t: taken.extend(t.tolist())).run() for p in split_file(file, file.stat().st_size)
        ]
        rows = np.concatenate([p.table() for p in parts]).tolist()
        problems = [at for p in parts for at, _ in p.problems]
        large = next((p.too_large for p in parts if p.too_large), None)
        return rows, problems, large, taken

    expected = scanned()
    assert len(expected[0]) == 32
    assert len(expected[1]) == 2
    assert expected[3][:500] == document
    for part, block in ((2**25, 64), (100, 64), (777, 333), (64, 2**12), (5000, 5000)):
        monkeypatch.setattr(scan, "RANGE", part)
        monkeypatch.setattr(scan, "BLOCK", block)
        rows, problems, large, taken = scanned()
        assert (rows, problems, large) == expected[:3]
        if block >= 333:  # of a broken long line, what comes before the break has been counted
            assert len(taken) >= len(expected[3])
    monkeypatch.setattr(scan, "BLOCK", 333)
    monkeypatch.setattr(scan, "MAX_ODD_LINE", 400)
    assert "too long for another" in "\n".join(found(data))


@pytest.mark.processes
def test_check_as_a_command(data: Path, xtuner: Command, capsys: Any) -> None:
    assert xtuner("data", "check", data, "--vocab-size", VOCABULARY, "--workers", 2) == 0
    assert "4 files, 120 documents" in capsys.readouterr().out
    longer(data / "en" / "a.bin")
    assert xtuner("data", "check", data) == 65
    report = capsys.readouterr().out
    assert report.startswith("problem  en/a.bin")
    assert "problems: 1" in report
    assert xtuner("data", "check", data, "--fix-meta") == 0
    assert capsys.readouterr().out.startswith("fixed ")
    with pytest.raises(ConfigError, match="does not exist"):
        xtuner("data", "check", data / "no")
    with pytest.raises(DataError, match=r"no \.bin file"):
        xtuner("data", "check", empty(data))
    with pytest.raises(ConfigError, match="has no ids"):
        xtuner("data", "check", data, "--vocab-size", 0)


def empty(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


@pytest.mark.processes
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("min_length", [0, 9])
def test_statistics_are_those_of_the_packs(
    cached: bool, min_length: int, data: Path, xtuner: Command, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cached:
        assert xtuner("data", "cache", data, "--min-length", min_length) == 0
        capsys.readouterr()
    monkeypatch.setattr("xtuner.data.inspect.statistics.BLOCK", 100)  # several blocks of packs and of rows
    words = (
        "data",
        "stats",
        data,
        "--max-length",
        32,
        "--min-length",
        min_length,
        "--ranks",
        "2,3,1000",
        "--workers",
        1,
    )
    assert xtuner(*words, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    whole = load_intern_repo_tokenized_dataset(data, min_length)
    packs = PackedDataset(whole, 32)
    lengths = np.concatenate([f.lengths for f in whole])
    tokens = [t for f in load_intern_repo_tokenized_dataset(data) for i in range(30) for t in f.read_document(i)]
    assert (report["documents"], report["tokens"]) == (len(lengths), lengths.sum())
    assert report["learned"] == sum(t > 0 for t in tokens)
    assert (report["packs"], report["tail"]) == (len(packs), sum(packs.tail_tokens_per_file))
    assert [f["packs"] for f in report["files"]] == packs.packs_per_file
    assert {t["name"]: t["packs"] for t in report["types"]} == {
        "code/": sum(packs.packs_per_file[:2]),
        "en/": sum(packs.packs_per_file[2:]),
    }
    for row in report["lengths"]:
        inside = lengths[(lengths >= row["least"]) & (lengths <= row["most"])]
        assert (row["documents"], row["tokens"]) == (len(inside), inside.sum())
    assert sum(row["documents"] for row in report["lengths"]) == len(lengths)
    long = lengths[lengths > 32]
    assert (report["longest"], report["longer"], report["longer_tokens"]) == (lengths.max(), len(long), long.sum())
    batches = [Batch.from_item(packs[i]) for i in range(len(packs))]
    assert [packs.longest_fragment(i) for i in range(len(packs))] == [b.max_seqlen for b in batches]
    costs = np.array([b.attention_pairs for b in batches], np.float64)
    assert report["cost"]["mean"] == pytest.approx(costs.mean(), rel=1e-6)
    assert (report["cost"]["least"], report["cost"]["most"]) == (costs.min(), costs.max())
    assert sum(n for _, _, n in report["cost_bars"]) == len(packs)
    assert (report["cost_bars"][0][0], report["cost_bars"][-1][1]) == (costs.min(), costs.max())
    order = np.random.RandomState(1024).permutation(len(packs))
    assert [row["ranks"] for row in report["imbalance"]] == [2, 3]
    for row in report["imbalance"]:
        size = row["ranks"]
        steps = costs[order[: len(order) // size * size]].reshape(-1, size)
        assert row["mean"] == pytest.approx((steps.max(1) / steps.mean(1)).mean(), rel=1e-6)
    assert xtuner(*words, "--no-text") == 0
    shown = capsys.readouterr().out
    assert f"packs of 32: {len(packs):,}" in shown
    assert f"documents longer than a pack: {len(long)} with {long.sum()} tokens" in shown
    assert "learned" in shown
    assert "% learned" not in shown


@pytest.mark.processes
def test_the_page(data: Path, tmp_path: Path, xtuner: Command) -> None:
    """Whole without a network; a browser finds nothing wrong with it."""
    (data / "en").rename(data / "<b>&en")
    page = tmp_path / "page.html"
    assert xtuner("data", "stats", data, "--max-length", 32, "--html", page) == 0
    text = page.read_text()
    assert not re.findall(r"https?:|src=|<script|url\(", text)
    assert "&lt;b&gt;&amp;en/a.bin" in text
    assert "prefers-color-scheme: dark" in text
    assert text.count("<svg") == 3
    axes = re.findall(r'text-anchor="end">([^<]*)<', text)
    assert len(axes) == 15
    assert all(re.fullmatch(r"\d+", tick) for tick in axes[5:]), "packs are counted in whole numbers"
    for words in (("--max-length", 0), ("--seed", -1), ("--ranks", "2,x")):
        with pytest.raises(ConfigError):
            xtuner("data", "stats", data, *words)
    with pytest.raises(CheckpointError, match="the page cannot be written"):
        xtuner("data", "stats", data, "--html", tmp_path)
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no browser here")
    words_ = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    words_ += ["--enable-logging=stderr", "--v=0", "--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom", page.as_uri()]
    done = subprocess.run(words_, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("<rect") == text.count("<rect") > 20
    assert "CONSOLE" not in done.stderr


@pytest.mark.processes
def test_a_cache_makes_a_run_start_at_once(data: Path, tmp_path: Path, xtuner: Command, capsys: Any) -> None:
    before = [PackedDataset(load_intern_repo_tokenized_dataset(data), 32).raw(i).signed.tolist() for i in range(40)]
    assert xtuner("data", "cache", data, "--index-only") == 0
    assert not list((data / CACHE_FOLDER).glob("tokens/**/*.int32"))
    assert xtuner("data", "cache", data, "--workers", 2) == 0
    assert "token caches: 4 files (4 new)" in capsys.readouterr().out
    assert xtuner("data", "cache", data) == 0
    assert "token caches: 4 files (0 new)" in capsys.readouterr().out
    cached = PackedDataset(load_intern_repo_tokenized_dataset(data), 32)
    assert cached._orders is not None
    assert isinstance(cached.file_packs(0).reader, TokenCache)
    assert [cached.raw(i).signed.tolist() for i in range(40)] == before
    shutil.rmtree(data / CACHE_FOLDER)
    assert xtuner("data", "cache", data, "--cache-dir", tmp_path / "elsewhere") == 0
    assert not (data / CACHE_FOLDER).exists()
    assert len(list((tmp_path / "elsewhere").glob("data-*/tokens/*/*.int32"))) == 4
    replace(data / "en" / "a.bin", b"]}", b"]]")
    with pytest.raises(DataError, match="the text contradicts its meta") as error:
        xtuner("data", "cache", data)
    assert "byte 0: a line is not JSON" in str(error.value)
    assert len(list((data / CACHE_FOLDER).glob("tokens/*/*.int32"))) == 3  # the others are there all the same
    with pytest.raises(ConfigError, match="seed"):
        xtuner("data", "cache", data, "--seed", -1)


def limited(words: list[str]) -> None:
    from xtuner.cli.main import main

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
    try:
        os._exit(main(words))
    except CheckpointError as e:
        os._exit(e.exit_code if "could not be written" in str(e) else 1)


@pytest.mark.processes
def test_a_disk_that_is_full_while_caching(data: Path) -> None:
    """Exit code 74, nothing half-written; what fits is there, and a run goes on without the rest."""
    assert document_order.SMALL > 120
    child = multiprocessing.get_context("fork").Process(
        target=limited, args=(["data", "cache", str(data), "--workers", "1"],)
    )
    child.start()
    child.join()
    assert child.exitcode == 74
    left = [p.name for p in (data / CACHE_FOLDER).rglob("*") if p.is_file()]
    assert [name for name in left if ".tmp-" in name or name.endswith(".int32")] == []
    data_ = PackedDataset(load_intern_repo_tokenized_dataset(data), 32)
    assert len([data_.raw(i) for i in range(len(data_))]) == len(data_)


def test_write_bin_is_what_these_tools_read(tmp_path: Path) -> None:
    write_bin(tmp_path / "a.bin", [[0, -1, 2], [], [3]])
    report = check_folder(tmp_path, vocab_size=4, workers=1)
    assert (report.documents, report.tokens, report.learned, report.largest, report.rows) == (3, 4, 2, 3, [])
