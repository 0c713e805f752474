"""Every wrong turn with data, work dirs and checkpoints: exit code, and a message that says what, where, what next."""

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.corpus import write_corpus

from xtuner.core.errors import BusyError, ConfigError, DataError, XTunerError
from xtuner.data import load_intern_repo_tokenized_dataset
from xtuner.data.format import meta
from xtuner.data.format.bin_file import BinFile
from xtuner.data.format.writer import write_bin
from xtuner.data.packing.pack import PackedDataset
from xtuner.train.checkpoints.work_dir_lock import DEAD_AFTER, WorkDirLock, _myself

Command = Callable[..., int]
LINES = [b'{"tokens": [1, 2, 3]}\n', b'{"tokens": [4, 5]}\n', b'{"tokens": [6]}\n']


def put(folder: Path, lines: list[bytes], lengths: Any = (3, 2, 1), name: str = "a.bin", dtype: Any = np.int64) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"".join(lines))
    offsets = np.cumsum([0] + [len(line) for line in lines])[: len(lengths)]
    with open(folder / f"{name}.meta", "wb") as f:
        np.save(f, np.array(list(zip(offsets, lengths, strict=True)), dtype=dtype).reshape(-1, 2))
    return folder


def save(folder: Path, meta: Any) -> None:
    with open(folder / "a.bin.meta", "wb") as f:
        np.save(f, meta)


def read_all(folder: Path, vocab_size: int | None = None) -> int:
    data = PackedDataset(load_intern_repo_tokenized_dataset(folder), 6)
    data.vocab_size = vocab_size
    for i in range(len(data)):
        data[i]
    return len(data)


def test_good_forms(tmp_path: Path) -> None:
    """What looks odd and is right: BOM, CRLF, no last newline, other keys, empty files and documents."""
    assert read_all(put(tmp_path / "plain", LINES)) == 1
    assert read_all(put(tmp_path / "bom", [b"\xef\xbb\xbf" + LINES[0], *LINES[1:]])) == 1
    assert read_all(put(tmp_path / "crlf", [x.replace(b"\n", b"\r\n") for x in LINES])) == 1
    assert read_all(put(tmp_path / "end", [*LINES[:2], LINES[2].rstrip()])) == 1
    assert read_all(put(tmp_path / "keys", ['{"text": "é\u2028", "tokens": [1, 2, 3]}\n'.encode(), *LINES[1:]])) == 1
    put(tmp_path / "plain", [], [], "empty.bin")
    put(tmp_path / "plain", [b" \r\n\n"], [], "blank.bin")
    put(tmp_path / "plain", [b'{"tokens": []}\n'], [0], "nothing.bin")
    assert read_all(tmp_path / "plain") == 1


WRONG: list[tuple[str, Callable[[Path], Any], str, str]] = [
    (
        "no_bin",
        lambda f: f.mkdir(),
        "no .bin file in the data folder",
        "give a folder that contains .bin and .bin.meta",
    ),
    ("not_there", lambda f: None, "the data folder does not exist", "give the folder that contains"),
    ("no_meta", lambda f: (put(f, LINES), (f / "a.bin.meta").unlink()), "a.bin has no meta", "a.bin.meta"),
    ("torn_meta", lambda f: (put(f, LINES), (f / "a.bin.meta").write_bytes(b"\x93NUMPY")), "not an npy array", ".meta"),
    ("empty_meta", lambda f: (put(f, LINES), (f / "a.bin.meta").write_bytes(b"")), "not an npy array", ".meta"),
    ("float_meta", lambda f: put(f, LINES, dtype=np.float64), "float64 of shape (3, 2), not integers", ".meta"),
    (
        "flat_meta",
        lambda f: (put(f, LINES), save(f, np.arange(3))),
        "of shape (3,)",
        ".meta",
    ),
    ("pickled_meta", lambda f: (put(f, LINES), save(f, np.array([{}]))), "npy", ".meta"),
    ("overflow", lambda f: _overflow(f), "overflowed 32 bits", "beyond 2 GiB"),
    ("stale_meta", lambda f: put(f, LINES, (3, 2)), "continues after the last document of its meta", "a.bin:41"),
    ("no_rows", lambda f: put(f, LINES, ()), "continues after the last document of its meta", "a.bin:0"),
    ("cut_bin", lambda f: (put(f, LINES), os.truncate(f / "a.bin", 30)), "the .bin has 30 bytes", "cut short"),
    ("cut_line", lambda f: (put(f, LINES), os.truncate(f / "a.bin", 50)), "last line is not complete", "a.bin:41"),
    ("zero_bin", lambda f: (put(f, LINES), os.truncate(f / "a.bin", 0)), "the .bin has 0 bytes", ".meta"),
    ("count", lambda f: put(f, LINES, (2, 3, 1)), "has 3 tokens, its meta says 2", "a.bin:0 (document 0)"),
    ("large_id", lambda f: put(f, [b'{"tokens": [1, 2, 99]}\n', *LINES[1:]]), "token id 99 is outside", "document 0"),
    (
        "negative_id",
        lambda f: put(f, [b'{"tokens": [1, 2, -99]}\n', *LINES[1:]]),
        "token id 99 is outside",
        "tokenizer",
    ),
    ("json", lambda f: put(f, [b'{"tokens": [1, 2, 3}\n', *LINES[1:]]), "a line is not JSON", "a.bin:0"),
    ("nan", lambda f: put(f, [b'{"tokens": [1, NaN, 3]}\n', *LINES[1:]]), "a token is nan, not an integer", "a.bin:0"),
    ("float", lambda f: put(f, [b'{"tokens": [1, 2.0, 3]}\n', *LINES[1:]]), "a token is 2.0, not an", "a.bin:0"),
    ("bool", lambda f: put(f, [b'{"tokens": [1, true, 3]}\n', *LINES[1:]]), "a token is True, not an", "a.bin:0"),
    ("null", lambda f: put(f, [b'{"tokens": [1, null, 3]}\n', *LINES[1:]]), "a token is None, not an", "a.bin:0"),
    ("text", lambda f: put(f, [b'{"tokens": [1, "2", 3]}\n', *LINES[1:]]), "a token is '2', not an", "a.bin:0"),
    (
        "key",
        lambda f: put(f, [b'{"token": [1, 2, 3]}\n', *LINES[1:]]),
        'not an object with the key "tokens"',
        "a.bin:0",
    ),
    (
        "utf8",
        lambda f: put(f, [b'{"text": "\xff\xfe", "tokens": [1]}\n', *LINES[1:]], (1, 2, 3)),
        "not JSON",
        "a.bin:0",
    ),
    ("dangling", lambda f: (put(f, LINES), os.symlink("nowhere", f / "b.bin")), "b.bin cannot be opened", "b.bin"),
]


def _overflow(folder: Path) -> None:
    put(folder, LINES)
    save(folder, np.array([[0, 3], [2**31 - 5, 2], [-(2**31) + 7, 1]], dtype=np.int32))


@pytest.mark.parametrize(("name", "make", "what", "more"), WRONG, ids=[w[0] for w in WRONG])
def test_wrong_data(tmp_path: Path, name: str, make: Callable[[Path], Any], what: str, more: str) -> None:
    make(tmp_path / "data")
    with pytest.raises((DataError, ConfigError)) as error:
        read_all(tmp_path / "data", vocab_size=50)
    assert what in str(error.value)
    assert more in str(error.value)
    assert error.value.exit_code == (2 if name == "not_there" else 65)
    assert error.value.where or error.value.do


def test_a_meta_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "d", LINES)
    loads, true_load = [], meta._load
    monkeypatch.setattr(meta, "_load", lambda *a: loads.append(a) or true_load(*a))  # type: ignore[func-returns-value]
    folder = load_intern_repo_tokenized_dataset(tmp_path / "d", min_length=2)
    assert (folder.num_documents, folder.num_tokens, len(loads)) == (2, 5, 1)


def test_identity_is_read_once_and_says_what_it_cannot_read(tmp_path: Path) -> None:
    known = load_intern_repo_tokenized_dataset(put(tmp_path / "d", LINES))[0]
    unknown = BinFile(known.path, known.name)
    identity = known.identity()
    assert BinFile(known.path, known.name).identity() == identity
    (tmp_path / "d" / "a.bin.meta").unlink()
    assert known.identity() == identity
    with pytest.raises(DataError, match=r"a\.bin or its meta cannot be read: No such file"):
        unknown.identity()


def test_a_long_last_line(tmp_path: Path) -> None:
    """Checked in time linear in its length, also where the meta says that it is short."""
    line = b'{"tokens": [1, 2, 3], "text": "' + b"x" * 2**25 + b'"}\n'
    began = time.monotonic()
    assert read_all(put(tmp_path / "good", [line, line], (3, 3))) == 1
    with pytest.raises(DataError, match="continues after"):
        read_all(put(tmp_path / "bad", [line, line], (3,)))
    assert time.monotonic() - began < 20


def test_all_faulty_files_in_one_message(tmp_path: Path) -> None:
    for i in range(30):
        put(tmp_path / "d", LINES, name=f"{i:02d}.bin")
        (tmp_path / "d" / f"{i:02d}.bin.meta").unlink()
    put(tmp_path / "d", LINES, name="good.bin")
    with pytest.raises(DataError) as error:
        read_all(tmp_path / "d")
    assert "30 of 31 data files are faulty" in str(error.value)
    assert str(error.value).count("has no meta") == 20
    assert "and 10 more" in str(error.value)


@pytest.mark.processes
def test_one_job_to_a_work_dir(tiny: Path, tmp_path: Path, xtuner: Command) -> None:
    work_dir = tmp_path / "w"
    work_dir.mkdir()
    lock = WorkDirLock(work_dir)
    train = ("train", tiny, "--work-dir", work_dir, "--cfg-options", "custom_hooks=[]")
    with pytest.raises(BusyError, match=f"process {os.getpid()} on {platform.node()}") as error:
        xtuner(*train)
    assert error.value.exit_code == 73
    lock.release()
    assert xtuner(*train) == 0
    assert not lock.path.exists()
    for owner, age, free in (
        ({**_myself(), "pid": 2**22 + 1}, 0.0, True),  # gone from this host
        ({**_myself(), "born": "1"}, 0.0, True),  # its number belongs to another process now
        ({"host": "elsewhere", "pid": 1}, 0.0, False),
        ({"host": "elsewhere", "pid": 1}, DEAD_AFTER + 1, True),  # silent for too long
    ):
        lock.path.write_text(json.dumps(owner))
        os.utime(lock.path, (time.time() - age,) * 2)
        if free:
            WorkDirLock(work_dir).release()
        else:
            with pytest.raises(BusyError, match="process 1 on elsewhere"):
                WorkDirLock(work_dir)
            lock.path.unlink()


def test_wrong_places(tiny: Path, corpus: Path, tmp_path: Path, xtuner: Command) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "half").mkdir()
    write_bin(tmp_path / "short" / "a.bin", [[1, 2, 3]])
    cases: list[tuple[type[XTunerError], tuple[Any, ...], str]] = [
        (ConfigError, ("train", tiny, "--work-dir", tmp_path / "file" / "w"), "work dir cannot be written"),
        (ConfigError, ("train", tiny, "--work-dir", tmp_path / "w", "--resume", "iter_7.pth"), "no such folder"),
        (
            ConfigError,
            ("train", tiny, "--work-dir", tmp_path / "w", "--resume", tmp_path / "half"),
            "no checkpoint there",
        ),
        (DataError, ("data", "show", tmp_path / "short", "--max-length", "5"), "there are no packs"),
        (ConfigError, ("data", "show", corpus, "--max-length", "32", "--pack", "999"), "there is no pack 999"),
        (ConfigError, ("data", "show", corpus, "--show", "text"), "text needs a tokenizer"),
        (ConfigError, ("data", "show", corpus, "--show", "txt"), "Did you mean 'text'"),
        (ConfigError, ("eval", "loss", tmp_path, corpus), "neither a model nor a checkpoint"),
        (ConfigError, ("chat", tmp_path, "--prompt", "x"), "neither a model nor a checkpoint"),
        (ConfigError, ("plot-loss", tmp_path), "no metrics of a run"),
        (ConfigError, ("convert", "pth_to_hf", tiny, tmp_path / "half", tmp_path / "hf"), "that can be recognised"),
    ]
    for kind, words, message in cases:
        with pytest.raises(kind, match=message):
            xtuner(*words)


def test_the_corpus_writer_is_whole(tmp_path: Path) -> None:
    """A writer that dies leaves what was there before, and nothing new."""

    def documents() -> Any:
        yield [1, 2, 3]
        raise KeyboardInterrupt

    write_corpus(tmp_path, 2, types=("en",))
    before = {p.name: p.read_bytes() for p in (tmp_path / "en").iterdir()}
    for name in ("a.bin", "c.bin"):
        with pytest.raises(KeyboardInterrupt):
            write_bin(tmp_path / "en" / name, documents())
        assert {p.name: p.read_bytes() for p in (tmp_path / "en").iterdir()} == before
    write_bin(tmp_path / "en" / "a.bin", [[1, 2]])
    assert len(load_intern_repo_tokenized_dataset(tmp_path)[0].lengths) == 1
