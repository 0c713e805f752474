"""The launchers of xtuner (see dist/launchers.py): each reads environment variables.

`none` (a single process, or one that starts workers, see workers.py), `pytorch` (torchrun, or any program that sets its
variables), `slurm` (srun), `mpi` (mpirun).
"""

import contextlib
import os
import re
import zlib
from collections.abc import Iterator, Mapping

from xtuner.core.errors import ConfigError, InterruptedRunError
from xtuner.core.system.sysinfo import usable_cpus
from xtuner.dist.launchers import LOOPBACK, Launcher, NodeLayout, RankInfo, read_rank

PORTS = range(20000, 32000)  # below Linux's ephemeral ports
_NODES = ("NPROC_PER_NODE", "NNODES", "NODE_RANK", "ADDR", "PORT")


@contextlib.contextmanager
def report_interrupt_once(launcher: str) -> Iterator[None]:
    """Let only rank 0 report a Ctrl-C, which all ranks receive."""
    try:
        yield
    except KeyboardInterrupt:
        try:
            rank = read_rank(launcher, os.environ).rank
        except ConfigError:
            rank = 0
        if not rank:
            raise
        error = InterruptedRunError("interrupted")
        error.reported_elsewhere = True
        raise error from None


def read_nodes(environ: Mapping[str, str], gpus: int) -> NodeLayout | None:
    """The workers that this process has to start; None if it is itself a process of the run.

    `NPROC_PER_NODE`, `NNODES`, `NODE_RANK`, `ADDR` and `PORT` have precedence, then torchrun's `PET_…`, which
    Kubernetes' PyTorchJob sets. Without LOCAL_RANK, `RANK` and `WORLD_SIZE` count nodes (Aliyun DLC, PyTorchJob).
    """
    if "LOCAL_RANK" in environ:
        return None
    names = {
        "NPROC_PER_NODE": ("NPROC_PER_NODE", "PET_NPROC_PER_NODE"),
        "NNODES": ("NNODES", "PET_NNODES", "WORLD_SIZE"),
        "NODE_RANK": ("NODE_RANK", "PET_NODE_RANK", "RANK"),
        "ADDR": ("ADDR", "PET_MASTER_ADDR", "MASTER_ADDR"),
        "PORT": ("PORT", "PET_MASTER_PORT", "MASTER_PORT"),
    }
    given = {key: next(((n, environ[n]) for n in tries if environ.get(n)), None) for key, tries in names.items()}
    if not given["NPROC_PER_NODE"] and not given["NNODES"]:
        return None
    number = {k: _number(*v) for k, v in given.items() if v and k != "ADDR" and v[1] not in ("auto", "gpu")}
    found = NodeLayout(
        number.get("NPROC_PER_NODE", max(gpus, 1)),
        number.get("NNODES", 1),
        number.get("NODE_RANK", 0),
        given["ADDR"][1] if given["ADDR"] else LOOPBACK,
        number.get("PORT", 0),
    )
    if found.workers < 1 or found.num_nodes < 1:
        raise ConfigError(f"{found.num_nodes} nodes with {found.workers} processes each", where=_shown(environ, names))
    if not 0 <= found.node_rank < found.num_nodes:
        raise ConfigError(
            f"node {found.node_rank} of {found.num_nodes}",
            where=_shown(environ, names),
            why="nodes are counted from 0",
            do="set a different NODE_RANK on every node, and the same NNODES",
        )
    missing = [k for k in ("NODE_RANK", "ADDR", "PORT") if found.num_nodes > 1 and not given[k]]
    if missing:
        raise ConfigError(
            f"{found.num_nodes} nodes, but {' and '.join(missing)} not set",
            where=_shown(environ, names) or "environment",
            why="processes of several nodes need their rank and a common address",
            do="on every node: export NNODES=… NODE_RANK=… ADDR=<host of node 0> PORT=<free port there, e.g. 29500>",
        )
    return found


class SingleProcess(Launcher):
    """`none`: a single process. Raises: ConfigError if srun or mpirun started several, which would train separately."""

    def read_rank(self, environ: Mapping[str, str]) -> RankInfo:
        if "LOCAL_RANK" in environ:
            return read_torchrun(environ)
        started = {"slurm": ("SLURM_STEP_NUM_TASKS", "srun"), "mpi": ("OMPI_COMM_WORLD_SIZE", "mpirun")}
        for launcher, (name, program) in started.items():
            if environ.get(name, "1") != "1" and "SLURM_PTY_PORT" not in environ:  # except in a shell of srun --pty
                raise ConfigError(
                    f"{program} has started {environ[name]} processes, and --launcher is none",
                    where=f"environment: {name}",
                    why="each would train independently, in the same work dir",
                    do=f"add --launcher {launcher}, or start one process",
                )
        return RankInfo()

    def read_nodes(self, environ: Mapping[str, str], gpus: int) -> NodeLayout | None:
        return read_nodes(environ, gpus)


class Torchrun(Launcher):
    def read_rank(self, environ: Mapping[str, str]) -> RankInfo:
        return read_torchrun(environ)

    def read_nodes(self, environ: Mapping[str, str], gpus: int) -> NodeLayout | None:
        return read_nodes(environ, gpus)


def read_torchrun(environ: Mapping[str, str]) -> RankInfo:
    needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    _require(
        environ, needed, "pytorch", "start with torchrun --nproc-per-node N -m xtuner train …, or NPROC_PER_NODE=N"
    )
    rank, size, local, port = (_number(n, environ[n]) for n in needed if n != "MASTER_ADDR")
    return RankInfo(rank, size, local, environ["MASTER_ADDR"], port)


class Slurm(Launcher):
    def read_rank(self, environ: Mapping[str, str]) -> RankInfo:
        _require(environ, ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"), "slurm", "start with srun xtuner train …")
        rank, size, local = (_number(n, environ[n]) for n in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))
        if size > 1 and "SLURM_STEP_ID" not in environ:
            raise ConfigError(
                f"the Slurm job has {size} tasks, and this process is the job script, not one of them",
                where="--launcher slurm",
                why="srun starts the tasks; without it this process would wait for them forever",
                do="start with srun xtuner train …",
            )
        listed = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
        address = environ.get("MASTER_ADDR") or (first_node(listed) if _number_of_nodes(environ) > 1 else LOOPBACK)
        job = f"{environ.get('SLURM_JOB_ID', '')}.{environ.get('SLURM_STEP_ID', '')}"
        return RankInfo(rank, size, local, address, _port(environ, job))


class Mpi(Launcher):
    def read_rank(self, environ: Mapping[str, str]) -> RankInfo:
        kinds = (
            ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
            ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
        )
        names = next((names for names in kinds if names[0] in environ), kinds[0])
        _require(environ, names, "mpi", "start with mpirun -n N xtuner train …")
        rank, size, local = (_number(n, environ[n]) for n in names)
        here = environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", environ.get("MPI_LOCALNRANKS"))
        if here and int(here) < size:
            fix = "mpirun -x MASTER_ADDR=<host of rank 0> -x MASTER_PORT=29500 …"
            _require(environ, ("MASTER_ADDR", "MASTER_PORT"), "mpi", fix)
        port = _port(environ, environ.get("PMIX_NAMESPACE", ""))
        return RankInfo(rank, size, local, environ.get("MASTER_ADDR", LOOPBACK), port)


def first_node(listed: str) -> str:
    """`node[07-09,12],other` → `node07`."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", listed)
    if not match:
        raise ConfigError(
            "the variables of Slurm do not name the nodes of the job",
            where="SLURM_JOB_NODELIST",
            do="export MASTER_ADDR=<host of the first node>",
        )
    return match[1] + (match[2] or "")


def _number_of_nodes(environ: Mapping[str, str]) -> int:
    name = "SLURM_STEP_NUM_NODES" if "SLURM_STEP_NUM_NODES" in environ else "SLURM_JOB_NUM_NODES"
    return _number(name, environ.get(name, "1"))


def _port(environ: Mapping[str, str], job: str) -> int:
    """MASTER_PORT, else a port derived from the job id, so that two jobs on a node use different ones."""
    if environ.get("MASTER_PORT"):
        return _number("MASTER_PORT", environ["MASTER_PORT"])
    return PORTS[zlib.crc32(job.encode()) % len(PORTS)]


def _require(environ: Mapping[str, str], names: tuple[str, ...], launcher: str, do: str) -> None:
    missing = [n for n in names if not environ.get(n)]
    if missing:
        raise ConfigError(
            f"--launcher {launcher} needs {', '.join(missing)} in the environment",
            where=f"--launcher {launcher}",
            why="a process finds its rank in them; without them it would train alone",
            do=do,
        )


def _number(name: str, text: str) -> int:
    where = f"environment: {name}"
    try:
        number = int(text)
    except ValueError:
        raise ConfigError(f"{name} = {text!r} is not a number", where=where) from None
    if name.endswith("PORT") and not 0 < number < 2**16:
        raise ConfigError(f"{name} = {text} is not a port", where=where, do="choose a free one from 1024 to 65535")
    return number


def _shown(environ: Mapping[str, str], names: Mapping[str, tuple[str, ...]]) -> str:
    return " ".join(f"{n}={environ[n]}" for tries in names.values() for n in tries if n in environ)


def environment_of_workers(
    environ: Mapping[str, str], layout: NodeLayout, local_rank: int, port: int
) -> dict[str, str]:
    """The variables of torchrun for one worker, without those that would make it start workers itself."""
    kept = {k: v for k, v in environ.items() if k not in _NODES and not k.startswith("PET_")}
    return kept | {
        "RANK": str(layout.node_rank * layout.workers + local_rank),
        "WORLD_SIZE": str(layout.num_nodes * layout.workers),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(layout.workers),
        "MASTER_ADDR": layout.address,
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": environ.get("OMP_NUM_THREADS", str(max(1, usable_cpus() // layout.workers))),
    }
