"""Launchers: how a process finds its rank. `--launcher NAME`, or `--launcher package.module.Class` for your own.

A launcher reads environment variables that the cluster has set. It is selected on the command line, not in a config, so
that one config runs on any cluster. Every process of a run, and every process that starts others, is `xtuner train`
with the same arguments. To add a launcher, write a class in an importable file (and a line in `LAUNCHERS` for a short
name):

    class Cluster(Launcher):
        def read_rank(self, environ):                  # which rank this process is
            return RankInfo(int(environ["TASK"]), int(environ["TASKS"]), int(environ["TASK_ON_HOST"]),
                         environ["FIRST_HOST"], 29500)
"""

import importlib
import inspect
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

from xtuner.core.errors import ConfigError, did_you_mean

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class RankInfo:
    """The rank of this process, and where it meets the others."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    address: str = LOOPBACK  # of the machine of rank 0
    port: int = 0

    @property
    def host(self) -> str:
        """The name of this machine, Slurm's if there is one."""
        return os.environ.get("SLURMD_NODENAME") or platform.node()


@dataclass(frozen=True)
class NodeLayout:
    """The machines of a run, where `xtuner train` itself starts the processes of each machine."""

    workers: int  # processes on each node
    num_nodes: int = 1
    node_rank: int = 0
    address: str = LOOPBACK
    port: int = 0  # 0 for a free one


class Launcher(Protocol):
    def read_rank(self, environ: Mapping[str, str]) -> RankInfo:
        """The rank of this process. Raises: ConfigError, KeyError or ValueError for missing or invalid variables."""

    def read_nodes(self, environ: Mapping[str, str], gpus: int) -> NodeLayout | None:
        """The workers that this process has to start and to wait for; None if it is itself a process of the run.

        A worker is the same command with torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE,
        MASTER_ADDR, MASTER_PORT): there `read_nodes` returns None, and `read_rank` reads those.

        Args:
            gpus: of this machine.
        """
        return None


LAUNCHERS = {
    "none": "xtuner.dist.shipped_launchers.SingleProcess",
    "pytorch": "xtuner.dist.shipped_launchers.Torchrun",
    "slurm": "xtuner.dist.shipped_launchers.Slurm",
    "mpi": "xtuner.dist.shipped_launchers.Mpi",
}


class LauncherNames(tuple[str, ...]):
    """Choices for argparse: lists the names in `LAUNCHERS`, and also accepts dotted names."""

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or "." in str(name)


def find_launcher(name: str) -> Launcher:
    """Raises: ConfigError."""
    where, own = f"--launcher {name}", name not in LAUNCHERS
    module, _, attribute = LAUNCHERS.get(name, name).rpartition(".")
    if not module:
        near = did_you_mean(name, list(LAUNCHERS))
        do = f"choose one of {', '.join(LAUNCHERS)}, or give package.module.Class for your own"
        raise ConfigError(f"there is no launcher {name!r}.{near}", where=where, do=do)
    try:
        found: Any = getattr(importlib.import_module(module), attribute)
    except Exception as e:  # e.g. raised by a module of the user
        do = "install its package, or add the folder of its file to PYTHONPATH" if own else ""
        raise ConfigError(f"the launcher cannot be imported: {e}", where=where, do=do) from None
    missing = [method for method in ("read_rank", "read_nodes") if not callable(getattr(found, method, None))]
    if missing or not inspect.isclass(found):
        raise ConfigError(
            f"{attribute} is not a launcher" + (f": it has no {' and no '.join(missing)}" if missing else ""),
            where=where,
            do=f"derive a class from {__name__}.Launcher",
        )
    return cast(Launcher, found())


def read_rank(name: str, environ: Mapping[str, str]) -> RankInfo:
    """The rank of this process. Raises: ConfigError for variables that are missing or contradict each other."""
    launcher = find_launcher(name)
    try:
        found = launcher.read_rank(environ)
    except (KeyError, ValueError) as e:
        what = f"{e.args[0]} is not in the environment" if isinstance(e, KeyError) else str(e)
        why = "a process finds its rank in this variable"
        raise ConfigError(what, where=f"--launcher {name}", why=why) from None
    if not isinstance(found, RankInfo):
        raise ConfigError(f"`read_rank` returns {found!r}, not a {__name__}.RankInfo", where=f"--launcher {name}")
    if not (0 <= found.rank < found.size and 0 <= found.local_rank <= found.rank):
        raise ConfigError(
            f"rank {found.rank} (local rank {found.local_rank}) of {found.size}",
            where=f"--launcher {name}",
            why="the environment variables contradict each other",
            do="start all processes with one launcher, and unset the variables of any other",
        )
    return found
