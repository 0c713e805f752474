"""The writer of whole files and directories: what a dead process leaves is never taken for whole."""

import json
import logging
import multiprocessing
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from xtuner.core import files
from xtuner.core.errors import CheckpointError
from xtuner.dist.collectives import attempt


def make(target: Path, text: str) -> None:
    with files.atomic_folder(target) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "a").write_text(text)


def make_wrongly(target: Path) -> None:
    with files.atomic_folder(target) as folder:
        (folder / "b").write_text("half")
        folder.write_text("no")


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "x"
    make(target, "one")
    make(target, "two")
    assert (target / "inner" / "a").read_text() == "two"
    files.verify(target)
    with pytest.raises(IsADirectoryError):
        make_wrongly(target)
    files.verify(target)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_damage_is_named(tmp_path: Path) -> None:
    target = tmp_path / "x"
    for damage, message in (
        (lambda p: p.write_text("onf"), "altered"),
        (lambda p: p.write_text("on"), "2 bytes instead of 3"),
        (lambda p: p.unlink(), "missing"),
    ):
        make(target, "one")
        damage(target / "inner" / "a")
        with pytest.raises(CheckpointError, match=message):
            files.verify(target)
    files.write_manifest(target, {"../outside": {"bytes": 1, "sha256": ""}})
    with pytest.raises(CheckpointError, match="outside its directory"):
        files.verify(target)


def test_recover(tmp_path: Path) -> None:
    """A process died between moving the old directory aside and naming the new one, or after it, or while writing."""
    make(tmp_path / "x.pth", "old")
    os.rename(tmp_path / "x.pth", tmp_path / ".x.pth.old-7")
    make(tmp_path / "y.pth", "new")
    make(tmp_path / "z.pth", "old")
    os.rename(tmp_path / "z.pth", tmp_path / ".y.pth.old-7")
    (tmp_path / ".w.pth.tmp-abc").mkdir()
    (tmp_path / ".last.pth.tmp-abc").write_text("")
    (tmp_path / ".venv.old-2024").mkdir()  # somebody's own
    files.recover(tmp_path, "*.pth")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".venv.old-2024", "x.pth", "y.pth"]
    assert (tmp_path / "x.pth" / "inner" / "a").read_text() == "old"
    assert (tmp_path / "y.pth" / "inner" / "a").read_text() == "new"


@pytest.mark.processes
def test_what_the_dead_have_left_is_removed_and_the_living_are_left_alone(tmp_path: Path, caplog: Any) -> None:
    """A process that writes the same folder is killed: the next writer removes its part, not a living one's."""
    target, other = tmp_path / "x", tmp_path / "xx"
    make(target, "one")
    fork = multiprocessing.get_context("fork")

    def stand_still(go: Any, name: Path) -> None:
        with files.atomic_folder(name) as folder:
            (folder / "big").write_text("half")
            go.send(str(folder))
            go.recv()

    children, folders = [], []
    for name in (target, target, other):
        here, there = fork.Pipe()
        children.append(fork.Process(target=stand_still, args=(there, name)))
        children[-1].start()
        folders.append(Path(here.recv()))
    for child in (children[0], children[2]):
        child.kill()
        child.join()
    foreign = tmp_path / ".x.tmp-0123456789ab-1-1-01234567"  # of another machine
    foreign.mkdir()
    os.rename(target, files.temporary_sibling(target, "old"))  # ours, and we live
    caplog.set_level(logging.INFO, "xtuner")
    make(target, "two")
    assert not folders[0].exists()
    assert (folders[1] / "big").read_text() == (folders[2] / "big").read_text() == "half"
    assert foreign.is_dir()
    assert f"{foreign} was left by a process of another machine" in caplog.text
    assert folders[1].name not in caplog.text
    assert len(list(tmp_path.glob(".x.old-*"))) == 1
    children[1].kill()
    children[1].join()
    make(target, "three")
    assert not folders[1].exists()
    make(other, "other")
    assert not folders[2].exists()
    assert (target / "inner" / "a").read_text() == "three"


@pytest.mark.processes
def test_a_replaced_folder_comes_back(tmp_path: Path) -> None:
    """Killed between taking the old one away and giving the new one its name."""
    target = tmp_path / "x"
    make(target, "old")
    child = multiprocessing.get_context("fork").Process(
        target=lambda: (os.rename(target, files.temporary_sibling(target, "old")), os._exit(0))
    )
    child.start()
    child.join()
    assert not target.exists()
    files.remove_leftovers(target)
    assert (target / "inner" / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_no_bit_of_a_manifest_can_change(tmp_path: Path) -> None:
    """With its own sha256 no bit at all; one of an older version, none but those of a value."""
    make(tmp_path / "x", "one")
    file = tmp_path / "x" / files.MANIFEST
    entries = files.read_manifest(tmp_path / "x")["files"]
    files.write_manifest(tmp_path / "x", entries, kind="checkpoint", iteration=15)
    whole = file.read_bytes()
    assert files.verify(tmp_path / "x")["iteration"] == 15
    lines = json.loads(whole)
    assert lines.pop("sha256")
    older = json.dumps(lines, indent=2).encode() + b"\n"
    noticed = {}
    for text in (whole, older):
        file.write_bytes(text)
        files.verify(tmp_path / "x")
        flips = [(i, bit) for i in range(len(text)) for bit in range(8) if text is whole or bit == i % 8]
        harmed = [text[:i] + bytes((text[i] ^ 1 << bit,)) + text[i + 1 :] for i, bit in flips]
        harmed += [text[:-1], text + b"\n", text.replace(b"  ", b" ", 1), b"", b"{}\n", b"[]\n"]
        passed = []
        for other in harmed:
            file.write_bytes(other)
            if attempt(partial(files.verify, tmp_path / "x"))[1] is None:
                passed.append(json.loads(other))
        noticed[text] = passed
    assert noticed[whole] == []
    assert 0 < len(noticed[older]) < 100
    assert all(found["files"] == entries for found in noticed[older])  # kind, iteration: `checkpoint.verify` compares


def test_crafted_manifests(tmp_path: Path) -> None:
    entry = {"bytes": 1, "sha256": "0" * 64}
    digits = "9" * 5000
    for name, text in {
        "deep": '{"files": ' + "[" * 100_000,
        "deep and whole": '{"files": ' + "[" * 100_000 + "]" * 100_000 + "}",
        "digits": f'{{"files": {{}}, "iteration": {digits}}}',
        "no dict": "[1]",
        "null": '{"files": null}',
        "entry": json.dumps({"files": {"a": 1}}),
        "bool": json.dumps({"files": {"a": {**entry, "bytes": True}}}),
        "float": json.dumps({"files": {"a": {**entry, "bytes": 1e300}}}),
        "negative": json.dumps({"files": {"a": {**entry, "bytes": -1}}}),
        "hash": json.dumps({"files": {"a": {"bytes": 1, "sha256": [1]}}}),
        "unknown": json.dumps({"files": {}, "x": 1}),
        "not utf-8": "\udcff",
    }.items():
        (tmp_path / files.MANIFEST).write_text(text, errors="surrogateescape")
        with pytest.raises(CheckpointError):
            files.verify(tmp_path)
        assert name
    for name in ("x" * 5000, "a/" * 3000, "a\0b", "", "/etc/passwd", "a/../../b", "weights"):
        (tmp_path / "weights").mkdir(exist_ok=True)
        files.write_manifest(tmp_path, {name: entry})
        with pytest.raises(CheckpointError, match=r"missing|outside"):
            files.verify(tmp_path)
    (tmp_path / files.MANIFEST).unlink()
    os.mkfifo(tmp_path / files.MANIFEST)  # would wait for a writer
    with pytest.raises(CheckpointError, match="not a file"):
        files.verify(tmp_path)


def test_ranks_divide_the_reading(tmp_path: Path) -> None:
    """Of three ranks exactly one reads a file's contents; sizes are compared by all."""
    target = tmp_path / "x"
    with files.atomic_folder(target) as folder:
        for i in range(7):
            (folder / str(i)).write_text("x" * i)
    for i in range(1, 7):
        (target / str(i)).write_text("y" * i)
        told = [attempt(partial(files.verify, target, rank, 3))[1] for rank in range(3)]
        what = f"{i} is altered: its sha256 differs from the manifest's"
        assert [failure["what"] for failure in told if failure] == [what]
        (target / str(i)).write_text("x" * i)
    os.truncate(target / "6", 5)
    for rank in range(3):
        with pytest.raises(CheckpointError, match="5 bytes instead of 6"):
            files.verify(target, rank, 3)
