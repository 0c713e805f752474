"""The documented ways to start several processes, for real: each trains what one process does, and exports it.

`NPROC_PER_NODE`, the DLC script as two pods on loopback, torchrun, mpirun and a real Slurm of two nodes.
"""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from helpers.configs import FOUR, TWO, full_config, with_hook
from helpers.runs import assert_equals_one_process, contents, records
from helpers.slurm import Slurm

from xtuner.cli.main import main

pytestmark = pytest.mark.processes


def run(words: list[Any], env: dict[str, str]) -> None:
    done = subprocess.run(list(map(str, words)), env={**os.environ, **env}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.slow
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
    path = full_config(tiny, tmp_path, TWO)
    run([*start, path, "--work-dir", tmp_path / "w", *words], path_with_xtuner)
    assert_equals_one_process(path, tmp_path / "w", alone)
    parts = sorted(p.name for p in (tmp_path / "w").glob("iter_9.pth/optimizer/*"))
    assert parts == ["rank_00000.safetensors", "rank_00001.safetensors"]  # hybrid, too: both are of one machine


@pytest.mark.slow
def test_two_pods_of_dlc(tiny: Path, tmp_path: Path, alone: Path, path_with_xtuner: dict[str, str]) -> None:
    """The rendered script, once a pod, with the variables that DLC sets there."""
    path, script = full_config(tiny, tmp_path, TWO), tmp_path / "job.sh"
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
    assert_equals_one_process(path, tmp_path / "w", alone)


# ---------------------------------------------------------------------------------------------- under a real Slurm

SLURM = {"MASTER_ADDR": "127.0.0.1"}  # the names of the two nodes lead nowhere


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["deepspeed_zero1", "deepspeed_zero3"])
def test_srun(
    zero: str, tiny: Path, tmp_path: Path, alone: Path, slurm: Slurm, path_with_xtuner: dict[str, str]
) -> None:
    """As documented: two nodes, four tasks."""
    path = full_config(tiny, tmp_path, FOUR)
    words = ["xtuner", "train", path, "--launcher", "slurm", "--deepspeed", zero]
    done = slurm.srun("-N", 2, "-n", 4, *words, "--work-dir", tmp_path / "w", timeout=300, **path_with_xtuner, **SLURM)
    assert done.returncode == 0, done.stderr[-4000:]
    assert_equals_one_process(path, tmp_path / "w", alone)


# Waits, once told that it may be signalled, for a signal; whatever thread of the process that reaches.
WAITS = """(r := os.pipe()), os.set_blocking(r[1], False), signal.set_wakeup_fd(r[1]), \
open(f"{place}{{it.state.iteration}}.{{os.environ['SLURM_PROCID']}}", "w").close(), \
os.read(r[0], 1), signal.set_wakeup_fd(-1)"""


@pytest.mark.slow
def test_slurm_stops_requeues_and_preempts(
    tiny: Path, tmp_path: Path, alone: Path, slurm: Slurm, path_with_xtuner: dict[str, str]
) -> None:
    """One job, started four times: told to stop by USR1, requeued from outside, preempted by a more urgent job. Its end
    is, bit for bit, that of a job that nobody disturbed, and that of one process within rounding."""
    waiting = full_config(tiny, tmp_path / "often", TWO)
    with_hook(waiting, waiting, "1 or it.state.iteration < 4", WAITS.format(place=str(tmp_path / "at")))
    words = ["launch", "--scheduler", "slurm", "--nodes", "2", "--gpus-per-node", "1", "--fsdp"]
    jobs = {}
    for name, path in (("often", waiting), ("once", full_config(tiny, tmp_path / "once", TWO))):
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
    assert_equals_one_process(waiting, often, alone)
