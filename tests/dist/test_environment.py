"""Where a process stands, from what launchers leave in the environment; what is missing or contradicts is refused."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.processes import listening_socket

from xtuner.core import log
from xtuner.core.errors import ConfigError
from xtuner.dist import heartbeat, workers
from xtuner.dist.shipped_launchers import (
    PORTS,
    NodeLayout,
    RankInfo,
    environment_of_workers,
    first_node,
    read_nodes,
    read_rank,
)

SLURM = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "77"}
SLURM |= {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "gpu[07-08]"}
OMPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
TORCH = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}
DLC = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}  # nodes, as no LOCAL_RANK is set
PET = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_NPROC_PER_NODE": "4", "PET_MASTER_ADDR": "b"}


def test_each_launcher_is_understood() -> None:
    assert read_rank("none", {}) == RankInfo()
    assert read_rank("pytorch", TORCH) == read_rank("none", TORCH) == RankInfo(3, 4, 1, "a", 29500)
    found = read_rank("slurm", SLURM)
    assert found == RankInfo(5, 8, 1, "gpu07", found.port)
    assert found.port in PORTS
    assert read_rank("slurm", {**SLURM, "SLURM_JOB_ID": "78"}).port != found.port  # two jobs of a node do not meet
    assert read_rank("slurm", {**SLURM, "MASTER_PORT": "1234", "MASTER_ADDR": "x"}) == RankInfo(5, 8, 1, "x", 1234)
    assert read_rank("slurm", {**SLURM, "SLURM_STEP_NUM_NODES": "1"}).address == "127.0.0.1"
    found = read_rank("mpi", OMPI)
    assert (found.rank, found.size, found.address) == (1, 2, "127.0.0.1")
    intel = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0"}
    assert (read_rank("mpi", intel).rank, read_rank("mpi", intel).local_rank) == (1, 0)
    for listed, first in (
        ("n1", "n1"),
        ("n[07-09,12],m", "n07"),
        ("a-b-3,c", "a-b-3"),
        ("n[1,5]", "n1"),
        ("x[10]", "x10"),
    ):
        assert first_node(listed) == first


def test_who_starts_workers() -> None:
    assert read_nodes({}, 8) is None
    assert read_nodes({**DLC, "LOCAL_RANK": "0", "NPROC_PER_NODE": "8"}, 8) is None  # torchrun has done it
    assert read_nodes(DLC, 8) == NodeLayout(8, 2, 1, "a", 29500)
    assert read_nodes({"NPROC_PER_NODE": "2"}, 0) == NodeLayout(2)
    assert read_nodes({"NPROC_PER_NODE": "gpu"}, 4) == NodeLayout(4)
    own = {"NPROC_PER_NODE": "2", "NNODES": "3", "NODE_RANK": "2", "ADDR": "own", "PORT": "1"}
    assert read_nodes({**DLC, **PET, **own}, 8) == NodeLayout(2, 3, 2, "own", 1)  # ours win, then torchrun's
    assert read_nodes({**DLC, **PET}, 8) == NodeLayout(4, 2, 1, "b", 29500)
    env = environment_of_workers({**DLC, **PET, **own, "KEPT": "1"}, NodeLayout(2, 3, 2, "own", 1), 1, 1)
    expected = {"RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "own"}
    assert expected.items() <= env.items()
    assert env["KEPT"] == "1"
    assert not {"NPROC_PER_NODE", "NNODES", "PET_NNODES"} & env.keys()  # a worker must not start workers
    assert read_nodes(env, 8) is None


def without(environ: dict[str, str], *names: str) -> dict[str, str]:
    return {k: v for k, v in environ.items() if k not in names}


@pytest.mark.parametrize(
    ("launcher", "environ", "message"),
    [
        ("pytorch", without(TORCH, "MASTER_PORT", "RANK"), "needs RANK, MASTER_PORT in the environment"),
        ("pytorch", {**TORCH, "RANK": "4"}, r"rank 4 \(local rank 1\) of 4"),
        ("pytorch", {**TORCH, "LOCAL_RANK": "5"}, r"rank 3 \(local rank 5\) of 4"),
        ("pytorch", {**TORCH, "RANK": "x"}, "RANK = 'x' is not a number"),
        ("pytorch", {**TORCH, "MASTER_PORT": "99999"}, "MASTER_PORT = 99999 is not a port"),
        ("slurm", {}, "needs SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID"),
        ("slurm", without(SLURM, "SLURM_STEP_ID"), "the Slurm job has 8 tasks, and this process is the job script"),
        ("slurm", without(SLURM, "SLURM_STEP_NODELIST"), "do not name the nodes"),
        ("mpi", {}, "needs OMPI_COMM_WORLD_RANK"),
        ("mpi", {**OMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "needs MASTER_ADDR, MASTER_PORT"),
        ("none", {"SLURM_STEP_NUM_TASKS": "4"}, "srun has started 4 processes, and --launcher is none"),
        ("none", OMPI, "mpirun has started 2 processes, and --launcher is none"),
        ("nodes", without(DLC, "MASTER_PORT"), "2 nodes, but PORT not set"),
        ("nodes", without(DLC, "MASTER_ADDR", "RANK"), "2 nodes, but NODE_RANK and ADDR not set"),
        ("nodes", {**DLC, "RANK": "2"}, "node 2 of 2"),
        ("nodes", {**DLC, "NPROC_PER_NODE": "0"}, "2 nodes with 0 processes each"),
        ("nodes", {**DLC, "PORT": "0"}, "PORT = 0 is not a port"),
        ("nodes", {**DLC, "NNODES": "two"}, "NNODES = 'two' is not a number"),
    ],
)
def test_what_is_missing_or_contradicts(launcher: str, environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        read_nodes(environ, 1) if launcher == "nodes" else read_rank(launcher, environ)
    assert error.value.where


def test_a_shell_inside_a_step_is_one_process() -> None:
    assert read_rank("none", {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PTY_PORT": "1"}) == RankInfo()


# ---------------------------------------------------------------------------------------------------- meeting


@pytest.mark.parametrize("how", ["nobody", "no such host", "somebody else"])
def test_rank_0_cannot_be_reached(
    how: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said within XTUNER_MEET_SECONDS, by default in less than a minute; also where another program listens."""
    assert heartbeat.MEET + heartbeat.MIN_REPLY < 60
    for name, seconds in (("MEET", 0.6), ("MIN_REPLY", 0.3), ("WARN_AFTER", 0.1)):
        monkeypatch.setattr(heartbeat, name, seconds)
    log.setup()
    server = listening_socket()
    port = server.getsockname()[1]
    if how != "somebody else":
        server.close()
    with pytest.raises(ConfigError, match=r"rank 1 on .* cannot reach rank 0: ") as error:
        heartbeat.connect_store(
            RankInfo(1, 2, 1, "no-such-host.invalid" if how == "no such host" else "127.0.0.1", port)
        )
    server.close()
    assert str(port) in error.value.where
    assert "XTUNER_MEET_SECONDS" in error.value.do
    assert ("rank 1 waits for rank 0 at" in capsys.readouterr().err) == (how != "somebody else")


def test_the_port_is_taken() -> None:
    server = listening_socket()
    with pytest.raises(ConfigError, match=f"port {server.getsockname()[1]} is taken") as error:
        heartbeat.connect_store(RankInfo(0, 2, 0, "127.0.0.1", server.getsockname()[1]))
    server.close()
    assert "MASTER_PORT" in error.value.do


@pytest.mark.parametrize("text", ["soon", "0", "-5", "nan"])
def test_times_that_are_none(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XTUNER_MEET_SECONDS", text)
    with pytest.raises(ConfigError, match=f"XTUNER_MEET_SECONDS = '{text}' is not a number of seconds above 0"):
        heartbeat.read_seconds("MEET", 50.0)
    monkeypatch.setenv("XTUNER_MEET_SECONDS", "7.5")
    assert heartbeat.read_seconds("MEET", 50.0) == 7.5


# ---------------------------------------------------------------------------------------------------- workers

WORKER = """
import os, signal, sys, time
rank, (folder, act) = os.environ["RANK"], sys.argv[1:]
def note(number, frame):
    os.replace(folder + "/begun" + rank, folder + "/got" + rank)
    if act != "deaf":
        os._exit(75)
signal.signal(signal.SIGTERM, note)
open(folder + "/begun" + rank, "w").close()
if rank == "1" and act != "wait":
    signal.raise_signal(signal.SIGKILL) if act in ("killed", "deaf") else sys.exit(int(act))
while act in ("wait", "deaf") or (act not in ("0", "75") and rank == "0"):
    signal.pause()
sys.exit(0)
"""


@pytest.mark.processes
@pytest.mark.parametrize(
    ("act", "code"), [("0", 0), ("75", 75), ("65", 65), ("74", 74), ("killed", 137), ("deaf", 137), ("wait", 75)]
)
def test_the_first_failure_is_the_exit_code(
    act: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are told to end, and killed if they are deaf; signals are passed on."""
    for name in ("GRACE", "KILL_AFTER"):
        monkeypatch.setattr(workers, name, 0.3)
    if act == "wait":
        monkeypatch.setattr(workers.time, "sleep", stop_when_begun(tmp_path))
    assert workers.run_workers(NodeLayout(2), [sys.executable, "-c", WORKER, str(tmp_path), act]) == code
    if act in ("65", "74", "killed", "deaf"):
        assert (tmp_path / "got0").exists()  # SIGTERM


def stop_when_begun(folder: Path) -> Callable[[float], None]:
    """In place of the wait between two looks: SIGTERM to ourselves when both have begun."""
    real = time.sleep

    def sleep(seconds: float) -> None:
        if all((folder / f"begun{r}").exists() for r in range(2)):
            signal.raise_signal(signal.SIGTERM)
        real(seconds)

    return sleep


@pytest.mark.processes
def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    """However that ends: SIGKILL to it, and the kernel ends them."""
    worker = "from xtuner.dist.workers import end_with_parent as e; e(); print('up\\n', end='', flush=True); input()"
    parent = f"""
import sys
from xtuner.dist import workers
from xtuner.dist.shipped_launchers import NodeLayout
workers.run_workers(NodeLayout(2), [sys.executable, "-c", {worker!r}])
"""
    read = subprocess.Popen(
        [sys.executable, "-c", parent], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, bufsize=1
    )
    assert read.stdout is not None
    assert [read.stdout.readline() for _ in range(2)] == ["up\n", "up\n"]
    read.kill()
    assert read.stdout.read() == ""  # the end of the pipe: nobody holds it any more
    read.wait()


# ------------------------------------------------------------------------------------------- a launcher of one's own

CLUSTER = '''
"""Tasks of a cluster that knows TASK=2/4@HOST, or is a machine of which all cores are ours."""
from xtuner.dist.launchers import Launcher, NodeLayout, RankInfo

class Cluster(Launcher):
    def read_rank(self, environ):
        if "LOCAL_RANK" in environ:  # a worker of ours
            return RankInfo(*(int(environ[n]) for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK")), "127.0.0.1",
                         int(environ["MASTER_PORT"]))
        task, _, host = environ["TASK"].partition("@")
        rank, tasks = map(int, task.split("/"))
        return RankInfo(rank, tasks, rank % 2, host, 29500)

    def read_nodes(self, environ, gpus):
        return NodeLayout(int(environ["CORES"])) if "CORES" in environ and "LOCAL_RANK" not in environ else None

class Half:
    def read_rank(self, environ):
        return (0, 1)

class Odd(Half):
    read_nodes = Launcher.read_nodes
'''


@pytest.mark.processes
def test_a_launcher_of_ones_own(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, xtuner: Callable[..., int]
) -> None:
    """One file outside the package: says where a process stands, and starts the two workers of a run."""
    (tmp_path / "my_cluster.py").write_text(CLUSTER)
    monkeypatch.syspath_prepend(tmp_path)
    assert read_rank("my_cluster.Cluster", {"TASK": "3/4@first"}) == RankInfo(3, 4, 1, "first", 29500)
    for name, environ, message in (
        ("my_cluster.Cluster", {}, "TASK is not in the environment\n  where: --launcher my_cluster.Cluster"),
        ("my_cluster.Cluster", {"TASK": "one"}, "invalid literal|not enough values"),
        ("my_cluster.Cluster", {"TASK": "4/4@a"}, r"rank 4 \(local rank 0\) of 4"),
        ("my_cluster.Half", {}, "Half is not a launcher: it has no read_nodes"),
        ("my_cluster.Odd", {}, r"`read_rank` returns \(0, 1\), not a xtuner.dist.launchers.RankInfo"),
        ("my_cluster.Clustre", {}, "cannot be imported: .*Clustre"),
        ("your_cluster.Cluster", {}, "No module named 'your_cluster'(.|\n)*PYTHONPATH"),
        ("my_cluster.RankInfo.host", {}, "No module named 'my_cluster.RankInfo'"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_rank(name, environ)
    with pytest.raises(SystemExit) as refused:  # argparse says which there are
        xtuner("train", tiny, "--launcher", "slrum")
    assert refused.value.code == 2
    monkeypatch.setenv("CORES", "2")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{Path(__file__).resolve().parents[2]}")
    words = ["train", tiny, "--work-dir", tmp_path / "w", "--launcher", "my_cluster.Cluster", "--cfg-options"]
    assert xtuner(*words, "custom_hooks=[]", "accumulative_counts=4") == 0
    report = "".join(log.read_text() for log in (tmp_path / "w").glob("*/2*.log"))
    assert "on each of 2 ranks" in report
    assert "done: 3 iterations, 24 packs" in report
