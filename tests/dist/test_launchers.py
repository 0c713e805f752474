"""The documented ways to start several processes, for real: each trains what one process does, and exports it.

`NPROC_PER_NODE`, the DLC script as two pods on loopback, torchrun, mpirun and a real Slurm of two nodes.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from helpers.slurm import Slurm
from test_trainer import contents, records, with_hook

from xtuner.cli.main import main
from xtuner.core import files

ROOT = Path(__file__).resolve().parents[2]
PACKS = 4  # an iteration, of all ranks
TWO = {"accumulative_counts = 2 ": f"accumulative_counts = {PACKS // 2} "}  # packs of each of two ranks
FOUR = {"accumulative_counts = 2 ": f"accumulative_counts = {PACKS // 4} "}
ONE = {"accumulative_counts = 2 ": f"accumulative_counts = {PACKS} "}


def config(tiny: Path, folder: Path, changes: Mapping[str, str]) -> Path:
    """The tiny config with all of its hooks, samples and held-out data too: 3 epochs of 12 packs, 9 iterations."""
    text = tiny.read_text()
    data = next(line for line in text.splitlines() if line.startswith("dataset_folder")).partition("=")[2].strip()
    more = {"max_epochs = 1": "max_epochs = 3", "max_length = 32": "max_length = 68", "val_folder = None": ""}
    more |= {"warm_up_ratio = 0.3": "warm_up_ratio = 0.12", "start_factor=1 / 40": "start_factor=1.0"}  # one iteration
    for old, new in {**more, **changes}.items():
        assert old in text, old
        text = text.replace(old, new or f"val_folder = {data}")
    folder.mkdir(exist_ok=True)
    path = folder / "run.py"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def alone(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process: its work dir, with an export in it."""
    folder = tmp_path_factory.mktemp("alone")
    path = config(tiny, folder, ONE)
    assert main(["train", str(path), "--work-dir", str(folder / "w")]) == 0
    export(path, folder / "w")
    return folder / "w"


def export(path: Path, work_dir: Path) -> None:
    last = work_dir / (work_dir / "last_checkpoint").read_text().strip()
    assert main(["convert", "pth_to_hf", str(path), str(last), str(work_dir / "hf"), "--fp32"]) == 0


def same(path: Path, work_dir: Path, alone: Path) -> None:
    """Losses, norms, weights and exports are those of one process; every rank's log and checkpoint is whole."""
    ours, expected = records(work_dir), records(alone)
    assert len(expected) == 9
    assert ours.keys() == expected.keys()
    for number, line in expected.items():
        assert abs(ours[number]["loss"] - line["loss"]) < 1e-5
        assert abs(ours[number]["grad_norm"] - line["grad_norm"]) < 1e-5 * line["grad_norm"]
        assert [ours[number][k] for k in ("lr", "targets", "applied")] == [
            line[k] for k in ("lr", "targets", "applied")
        ]
    last = (work_dir / "last_checkpoint").read_text().strip()
    assert last == (alone / "last_checkpoint").read_text().strip()
    files.verify(work_dir / last)
    export(path, work_dir)
    a, b = (load_file(w / "hf" / "model.safetensors") for w in (work_dir, alone))
    assert a.keys() == b.keys()
    for name, value in b.items():
        assert (a[name] - value).abs().max() < 1e-5, name
    log = "".join(f.read_text() for f in work_dir.glob("*/2*.log"))
    assert "validation at iteration 9" in log
    assert log.count("sample at iteration") >= 2


@pytest.fixture(scope="module")
def path_with_xtuner(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment in which `xtuner` and `torchrun` are these."""
    folder = tmp_path_factory.mktemp("bin")
    for name, module in (("xtuner", "xtuner"), ("torchrun", "torch.distributed.run")):
        program = folder / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
        program.chmod(0o755)
    source = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}


def run(words: list[Any], env: dict[str, str]) -> None:
    done = subprocess.run(list(map(str, words)), env={**os.environ, **env}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (["env", "NPROC_PER_NODE=2", "xtuner", "train"], []),  # FSDP, as nothing else is asked
        (["torchrun", "--standalone", "--nproc-per-node=2", "-m", "xtuner", "train"],
         ["--launcher", "pytorch", "--deepspeed", "deepspeed_zero3"]),
        (["mpirun", "-n", "2", "--allow-run-as-root", "--oversubscribe", "xtuner", "train"],
         ["--launcher", "mpi", "--fsdp", "hybrid"]),
    ],
    ids=["workers", "torchrun", "mpirun"],
)  # fmt: skip
def test_two_processes_of_a_machine(
    start: list[str], words: list[str], tiny: Path, tmp_path: Path, alone: Path, path_with_xtuner: dict[str, str]
) -> None:
    if start[0] == "mpirun" and not shutil.which("mpirun"):
        pytest.skip("no MPI on this machine: apt-get install openmpi-bin")
    path = config(tiny, tmp_path, TWO)
    run([*start, path, "--work-dir", tmp_path / "w", *words], path_with_xtuner)
    same(path, tmp_path / "w", alone)
    parts = sorted(p.name for p in (tmp_path / "w").glob("iter_9.pth/optimizer/*"))
    assert parts == ["rank_00000.safetensors", "rank_00001.safetensors"]  # hybrid, too: both are of one machine


def test_two_pods_of_dlc(tiny: Path, tmp_path: Path, alone: Path, path_with_xtuner: dict[str, str]) -> None:
    """The rendered script, once a pod, with the variables that DLC sets there."""
    path, script = config(tiny, tmp_path, TWO), tmp_path / "job.sh"
    words = ["launch", "--scheduler", "dlc", path, "--nodes", 2, "--work-dir", tmp_path / "w", "--output", script]
    assert main(list(map(str, words))) == 0
    port = str(20000 + os.getpid() % 10000)
    dlc = {"KUBERNETES_CONTAINER_RESOURCE_GPU": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    pods = [
        subprocess.Popen(
            ["bash", script], env={**os.environ, **path_with_xtuner, **dlc, "RANK": str(rank)}, stderr=subprocess.PIPE
        )
        for rank in (1, 0)
    ]
    told = [pod.communicate(timeout=300)[1].decode() for pod in pods]
    assert [pod.returncode for pod in pods] == [0, 0], "\n".join(told)
    same(path, tmp_path / "w", alone)


# ---------------------------------------------------------------------------------------------- under a real Slurm

SLURM = {"MASTER_ADDR": "127.0.0.1"}  # the names of the two nodes lead nowhere


@pytest.mark.parametrize("zero", ["deepspeed_zero1", "deepspeed_zero3"])
def test_srun(
    zero: str, tiny: Path, tmp_path: Path, alone: Path, slurm: Slurm, path_with_xtuner: dict[str, str]
) -> None:
    """As documented: two nodes, four tasks."""
    path = config(tiny, tmp_path, FOUR)
    words = ["xtuner", "train", path, "--launcher", "slurm", "--deepspeed", zero]
    done = slurm.srun("-N", 2, "-n", 4, *words, "--work-dir", tmp_path / "w", timeout=300, **path_with_xtuner, **SLURM)
    assert done.returncode == 0, done.stderr[-4000:]
    same(path, tmp_path / "w", alone)


# Waits, once told that it may be signalled, for a signal; whatever thread of the process that reaches.
WAITS = """(r := os.pipe()), os.set_blocking(r[1], False), signal.set_wakeup_fd(r[1]), \
open(f"{place}{{it.state.iteration}}.{{os.environ['SLURM_PROCID']}}", "w").close(), \
os.read(r[0], 1), signal.set_wakeup_fd(-1)"""


def test_slurm_stops_requeues_and_preempts(
    tiny: Path, tmp_path: Path, alone: Path, slurm: Slurm, path_with_xtuner: dict[str, str]
) -> None:
    """One job, started four times: told to stop by USR1, requeued from outside, preempted by a more urgent job. Its end
    is, bit for bit, that of a job that nobody disturbed, and that of one process within rounding."""
    waiting = config(tiny, tmp_path / "often", TWO)
    with_hook(waiting, waiting, "1 or it.state.iteration < 4", WAITS.format(place=str(tmp_path / "at")))
    words = ["launch", "--scheduler", "slurm", "--nodes", "2", "--gpus-per-node", "1", "--fsdp"]
    jobs = {}
    for name, path in (("often", waiting), ("once", config(tiny, tmp_path / "once", TWO))):
        script = tmp_path / f"{name}.sh"
        assert main([*words, str(path), "--work-dir", str(tmp_path / name / "w"), "--output", str(script)]) == 0
        jobs[name] = script

    def submit(name: str) -> int:
        return slurm.sbatch(jobs[name], **path_with_xtuner, **SLURM)

    job = submit("often")

    def reached(at: int) -> None:
        marks = [tmp_path / f"at{at}.{rank}" for rank in range(2)]
        slurm.until(lambda: bool(slurm.hurried(job)) and all(m.exists() for m in marks), f"iteration {at}", 120)

    reached(1)
    slurm.scancel(job, "USR1")
    reached(2)
    slurm.requeue(job)
    reached(3)
    urgent = tmp_path / "urgent.sh"
    urgent.write_text("#!/bin/sh\ntrue\n")
    other = slurm.sbatch(urgent, "--partition=urgent", "--nodes=2", "--exclusive")
    assert slurm.wait(other)["JobState"] == "COMPLETED"
    end = slurm.wait(job, 180)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("COMPLETED", "0:0", "3"), slurm.output(job)
    assert slurm.wait(submit("once"), 180)["JobState"] == "COMPLETED"
    often, once = tmp_path / "often" / "w", tmp_path / "once" / "w"
    last = (once / "last_checkpoint").read_text().strip()
    assert contents(often / last) == contents(once / last)
    assert records(often) == records(once)
    same(waiting, often, alone)
