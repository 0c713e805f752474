"""xtuner doctor on this machine, and on one where something is wrong; what a run keeps about its machine."""

import json
import os
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.processes import shell

from xtuner.core.system import disk, sysinfo


@pytest.mark.processes
def test_this_machine(tmp_path: Path) -> None:
    work_dir = tmp_path / "not" / "yet"
    env = {"HF_ENDPOINT": "https://me:in-the-address@mirror", "HF_TOKEN": "in-a-variable", "OMP_NUM_THREADS": "1"}
    done = shell("doctor", "--work-dir", work_dir, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split(None, 2) for line in done.stdout.splitlines() if not line.startswith(" ")]
    by_name = {row[1]: (row[0], row[2]) for row in rows[:-2]}
    assert by_name["torch"] == ("ok", metadata.version("torch"))  # torch.__version__ may name a CUDA version, too
    assert {"python", "numpy", "deepspeed", "gpu", "cuda", "nccl", "memory", "locks", "variables"} <= by_name.keys()
    assert "HF_ENDPOINT=https://me:***@mirror" in done.stdout
    assert "training will work here: problems: 0" in done.stdout
    for absent in ("in-the-address", "in-a-variable", "\033", "cannot be checked"):
        assert absent not in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.processes
def test_wrong_machines(tmp_path: Path) -> None:
    """Versions below the floors, a torch that cannot be imported, no disk: exit code 2, and what to do."""
    for name, version in (("torch", "2.9.1"), ("numpy", "1.20"), ("deepspeed", "0.99")):
        folder = tmp_path / "site" / f"{name}-{version}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    path = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    done = shell("doctor", "--json", "--work-dir", "/proc/here", PYTHONPATH=path)
    assert done.returncode == 2, done.stderr
    report = json.loads(done.stdout)
    wrong = {row["name"]: row for row in report["checks"] if row["state"] == "problem"}
    assert set(wrong) == {"torch", "numpy", "work dir"}
    assert "CVE-2025-32434" in wrong["torch"]["found"]
    assert wrong["numpy"]["do"] == "pip install 'numpy>=1.26'"
    assert (report["ok"], report["problems"]) == (False, 4)  # no room, and no right to write
    assert report["machine"]["packages"]["deepspeed"] == "0.99"
    (tmp_path / "site" / "torch.py").write_text("raise OSError('libcudart is gone')")
    done = shell("doctor", "--work-dir", tmp_path, PYTHONPATH=path)
    assert done.returncode == 2
    assert "problem  torch" in done.stdout
    assert "test cpu" not in done.stdout
    assert "Traceback" not in done.stderr


def test_versions() -> None:
    assert sysinfo.release("2.13.0+cpu") > sysinfo.release("2.9") == sysinfo.release("2.9rc1")
    assert sysinfo.requirements()["torch"] == "2.11"
    assert "pytest" not in sysinfo.requirements()
    assert sysinfo.installed("no-such-package") is None


def test_the_disk(tmp_path: Path) -> None:
    assert list(disk.find_broken_guarantees(tmp_path)) == []
    seen: list[int] = []
    (tmp_path / "x").mkdir()
    write, read = disk.measure_speed(tmp_path / "x", 40 * 2**20, seen.append)
    assert min(write, read) > 0
    assert seen == sorted(seen)
    assert list((tmp_path / "x").iterdir()) == []
    assert disk.nearest_existing(tmp_path / "a" / "b") == tmp_path


@pytest.mark.processes
def test_git_state(tmp_path: Path, monkeypatch: Any) -> None:
    def git(*words: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    assert sysinfo.git_state(tmp_path) is None
    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    assert sysinfo.git_state(tmp_path) is None  # no commit yet
    git("commit", "-m", "x")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "log").write_text("what a run writes is no change of the code")
    commit = git("rev-parse", "HEAD")
    assert sysinfo.git_state(tmp_path / "inner") == {"commit": commit, "dirty": False}
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    (tmp_path / "a").write_text("2")
    assert sysinfo.git_state(tmp_path) == {"commit": commit, "dirty": True}
    slow = tmp_path / "bin" / "git"
    slow.parent.mkdir()
    slow.write_text("#!/bin/sh\nexec tail -f /dev/null\n")
    slow.chmod(0o755)
    monkeypatch.setattr(sysinfo, "GIT_SECONDS", 0.1)
    monkeypatch.setenv("PATH", f"{slow.parent}:{os.environ['PATH']}")
    assert sysinfo.git_state(tmp_path) is None
    monkeypatch.setenv("PATH", "/nowhere")
    assert sysinfo.git_state(tmp_path) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu() -> None:
    facts = sysinfo.facts()
    assert facts["driver"]
    assert facts["nccl"]
    assert facts["gpu_count"] == torch.cuda.device_count()
    assert sysinfo.driver_cuda() is not None
    report = json.loads(shell("doctor", "--json").stdout)
    tests = {row["name"]: row["state"] for row in report["checks"] if row["name"] in ("gpu 0", "test cuda:0")}
    assert tests == {"gpu 0": "ok", "test cuda:0": "ok"}
