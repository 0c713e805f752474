"""What somebody may have put into a checkpoint or a disk: bombs, absurd headers, read-only folders, a second job.

The manifest always fits: it is a checkpoint as an attacker, or a broken tool, would leave it.
"""

import json
import os
import pickle
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers.processes import SHORT, assert_resume_is_exact, killed_at

from xtuner.cli.main import main
from xtuner.core import files
from xtuner.core.errors import BusyError, CheckpointError, ConfigError, XTunerError

pytestmark = pytest.mark.processes

Command = Callable[..., int]


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def sealed(folder: Path) -> None:
    """The manifest that says: all is as it was written."""
    facts = json.loads((folder / files.MANIFEST).read_text())
    (folder / files.MANIFEST).unlink()
    files.seal(folder, **{k: v for k, v in facts.items() if k in ("kind", "iteration")})


def header(text: str, length: int | None = None, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text.encode() + data


LONG = '{"output.weight": {"dtype": "F32", "shape": [99999999, 99999999], "data_offsets": [0, 39999999200000004]}}'
ABSURD = {
    "length beyond all": header("{}", 2**63),
    "length beyond the file": header("{}", 10**6),
    "no length": b"\x01",
    "no JSON": header("{" * 50),
    "no object": header("[1]"),
    "deep": header('{"a":' * 30000),
    "a tensor beyond the file": header(LONG),
    "offsets that overlap": header(
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}}',
        data=b"\0" * 6,
    ),
    "negative": header('{"a":{"dtype":"F32","shape":[-1],"data_offsets":[4,0]}}', data=b"\0" * 4),
    "an unknown type": header('{"a":{"dtype":"X9","shape":[1],"data_offsets":[0,4]}}', data=b"\0" * 4),
}


def test_bombs_and_absurd_files_in_a_checkpoint(tiny: Path, tmp_path: Path, straight: Path) -> None:
    """Each file of a checkpoint as a pickle, as torch saves one, and as nonsense: refused with 74, nothing executed."""
    marker = tmp_path / "marker"
    torch.save({"a": Bomb(marker)}, tmp_path / "torch.pt")
    bombs = {"pickle": pickle.dumps(Bomb(marker)), "torch file": (tmp_path / "torch.pt").read_bytes()}
    pickle.loads(bombs["pickle"])  # the control: it is a bomb
    assert marker.exists()
    marker.unlink()
    names = sorted(p.relative_to(straight).as_posix() for p in straight.rglob("*") if p.is_file())
    resume = ["train", str(tiny), "--cfg-options", *SHORT, "--work-dir", str(tmp_path / "w"), "--resume"]
    tried = 0
    for name in names:
        for kind, content in {**bombs, **(ABSURD if name.endswith(".safetensors") else {})}.items():
            evil = tmp_path / "iter_1.pth"
            shutil.copytree(straight, evil)
            (evil / name).write_bytes(content)
            if name != files.MANIFEST:
                sealed(evil)
            with pytest.raises(CheckpointError) as error:
                main([*resume, str(evil)])
            assert error.value.where, (name, kind)
            for export in (["convert", "pth_to_hf", str(tiny), str(evil), str(tmp_path / "hf")],):
                if not name.startswith(("optimizer", "trainer")):
                    with pytest.raises(XTunerError):
                        main(export)
            shutil.rmtree(evil)
            tried += 1
    assert tried == 5 * 2 + 2 * len(ABSURD)
    shutil.copytree(straight, tmp_path / "iter_1.pth")
    (tmp_path / "iter_1.pth" / "weights" / "pytorch_model.bin").write_bytes(bombs["torch file"])
    sealed(tmp_path / "iter_1.pth")
    assert main([*resume, str(tmp_path / "iter_1.pth")]) == 0
    assert not marker.exists()


def test_a_trainer_state_of_another_shape_is_refused(tiny: Path, tmp_path: Path, straight: Path) -> None:
    for text in ("[]", "{}", '{"state": {}}', '{"state": {"position": 3}}', '{"state": {"iteration": 1, "extra": 2}}'):
        evil = tmp_path / "iter_1.pth"
        shutil.copytree(straight, evil)
        (evil / "trainer.json").write_text(text)
        sealed(evil)
        with pytest.raises(CheckpointError, match="does not have the format of this version"):
            main(["train", str(tiny), "--work-dir", str(tmp_path / "w"), "--resume", str(evil)])
        shutil.rmtree(evil)


def test_two_jobs_on_a_work_dir(tiny: Path, tmp_path: Path, straight: Path) -> None:
    """While a real process holds it, a second one is refused; when the first is killed, the next takes over."""
    words = ["train", str(tiny), "--work-dir", str(tmp_path / "w"), "--cfg-options", *SHORT]

    def second() -> None:
        with pytest.raises(BusyError, match=r"another job uses this work dir: process \d+ on ") as error:
            main(words)
        assert error.value.exit_code == 73

    assert killed_at(20, words, meanwhile=second)
    assert_resume_is_exact(tiny, tmp_path / "w", straight)


@pytest.mark.parametrize("point", [9, 13, 17, 21])
def test_a_signal_during_a_save(point: int, tiny: Path, tmp_path: Path, straight: Path) -> None:
    """SIGTERM, twice, at a write point: the save ends whole, the run stops with 75, the resume is exact."""
    work_dir = tmp_path / "w"
    words = ["train", str(tiny), "--work-dir", str(work_dir), "--cfg-options", *SHORT]

    def twice(pid: int) -> None:
        for _ in range(2):
            os.kill(pid, signal.SIGTERM)

    assert killed_at(point, words, signalled=twice) == 75
    for folder in work_dir.glob("iter_*.pth"):
        files.verify(folder)
    assert_resume_is_exact(tiny, work_dir, straight)


@pytest.fixture
def read_only(tmp_path: Path, straight: Path) -> Iterator[Path]:
    """A file system that takes no writes, with a run in it."""
    place = tmp_path / "ro"
    place.mkdir()
    if os.system(f"mount -t tmpfs none {place} 2>/dev/null") != 0:
        pytest.skip("tmpfs cannot be mounted here")
    shutil.copytree(straight.parent, place / "w")
    os.system(f"mount -o remount,ro {place}")
    yield place / "w"
    os.system(f"umount -l {place}")


def test_a_read_only_work_dir(read_only: Path, tiny: Path, tmp_path: Path, straight: Path, xtuner: Command) -> None:
    with pytest.raises(ConfigError, match="work dir cannot be written: Read-only file system") as error:
        xtuner("train", tiny, "--work-dir", read_only, "--resume", "--cfg-options", *SHORT)
    assert "--work-dir" in str(error.value)
    (before,) = (p for p in read_only.glob("iter_*.pth") if p.name != straight.name)
    shutil.copytree(straight.parent, tmp_path / "w", ignore=lambda *_: [straight.name, before.name])
    resume = ("train", tiny, "--work-dir", tmp_path / "w", "--resume", before, "--cfg-options", *SHORT)
    assert xtuner(*resume) == 0  # but it can be read from
    assert (tmp_path / "w" / straight.name / files.MANIFEST).read_text() == (straight / files.MANIFEST).read_text()
