"""The writer of whole files and directories: what a dead process leaves is never taken for whole."""

import os
from functools import partial
from pathlib import Path

import pytest

from xtuner.core import files
from xtuner.core.dist import attempt
from xtuner.core.errors import CheckpointError


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


def test_ranks_divide_the_reading(tmp_path: Path) -> None:
    """Of three ranks exactly one reads a file's contents; sizes are compared by all."""
    target = tmp_path / "x"
    with files.atomic_folder(target) as folder:
        for i in range(7):
            (folder / str(i)).write_text("x" * i)
    for i in range(1, 7):
        (target / str(i)).write_text("y" * i)
        told = [attempt(partial(files.verify, target, rank, 3))[1] for rank in range(3)]
        assert [failure["what"] for failure in told if failure] == [f"{i} is altered: its sha256 is not the manifest's"]
        (target / str(i)).write_text("x" * i)
    os.truncate(target / "6", 5)
    for rank in range(3):
        with pytest.raises(CheckpointError, match="5 bytes instead of 6"):
            files.verify(target, rank, 3)
