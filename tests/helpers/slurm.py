"""A real Slurm of two virtual nodes on this machine, for tests: the fixture `slurm`.

Everything lies in one temporary folder, with ports and a munge key of its own, so that a Slurm of the machine is not
touched. Each node has 4 CPUs and 2 GPUs that are none (/dev/null, /dev/zero), so that scripts for GPUs are accepted as
they are. The nodes' names, n1 and n2, cannot be resolved: a job that needs an address gets MASTER_ADDR=127.0.0.1.
"""

import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

NEEDED = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "scancel")
PATH = f"{os.environ['PATH']}:/usr/sbin"
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE")

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=30
SlurmdParameters=config_overrides
GresTypes=gpu
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 Gres=gpu:2 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 Gres=gpu:2 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=0
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
"""


class Slurm:
    """Started by `start`, which also says how it ends. Waiting is by short polls with a deadline."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._hurried: set[tuple[int, str]] = set()
        self.env = {**os.environ, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *words: object, timeout: float = 60.0, **env: str) -> subprocess.CompletedProcess[str]:
        """Any command, with this Slurm as its own. Raises: subprocess.TimeoutExpired."""
        full = [str(w) for w in words]
        return subprocess.run(full, env={**self.env, **env}, capture_output=True, text=True, timeout=timeout)

    def ask(self, *words: object, **env: str) -> str:
        """The same, but a failure is an error."""
        done = self.run(*words, **env)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def srun(self, *words: object, timeout: float = 60.0, **env: str) -> subprocess.CompletedProcess[str]:
        return self.run("srun", *words, timeout=timeout, **env)

    def sbatch(self, script: Path, *options: object, **env: str) -> int:
        """Submit; returns the job's id. Its output goes to `output(job)`."""
        out = f"--output={self.folder}/%j.out"
        return int(self.ask("sbatch", "--parsable", out, *options, script, **env))

    def output(self, job: int) -> str:
        path = self.folder / f"{job}.out"
        return path.read_text() if path.exists() else ""

    def facts(self, job: int) -> dict[str, str]:
        """What Slurm says of a job: JobState, Restarts, ExitCode ("75:0" is code:signal), Reason, …"""
        return dict(re.findall(r"(\w+)=(\S*)", self.ask("scontrol", "show", "job", "-o", job)))

    def until(self, true: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
        """Raises: AssertionError that names what did not come true in time."""
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, f"not within {seconds:g} s: {what}\n{self.logs()}"
            time.sleep(0.05)

    def hurried(self, job: int) -> dict[str, str]:
        """The facts of a job; a requeued one is made to start in seconds instead of after two minutes."""
        facts = self.facts(job)
        start = job, facts["Restarts"]
        if facts["Reason"] == "BeginTime" and start not in self._hurried:
            # not at once: within the second of its end, nodes take the new start for the old one and refuse it
            done = self.run("scontrol", "update", f"jobid={job}", "StartTime=now+2seconds")
            self._hurried.update([start] if done.returncode == 0 else [])
        return facts

    def wait(self, job: int, seconds: float = 120.0) -> dict[str, str]:
        """Until the job is over. Returns its facts."""
        what = f"the end of job {job}; its output: {self.output(job)[-2000:]}"
        self.until(lambda: self.hurried(job)["JobState"] in OVER, what, seconds)
        return self.facts(job)

    def scancel(self, job: int, signal: str | None = None) -> None:
        """End a job, or send its tasks a signal (USR1)."""
        self.ask("scancel", *([f"--signal={signal}"] if signal else []), job)

    def requeue(self, job: int) -> None:
        self.ask("scontrol", "requeue", job)

    def logs(self) -> str:
        return "\n".join(f"{p.name}: {p.read_text()[-1500:]}" for p in sorted(self.folder.glob("*.log")))


def why_not() -> str:
    """Why there can be no Slurm here; empty if there can be."""
    missing = [name for name in NEEDED if not shutil.which(name, path=PATH)]
    if missing:
        return f"no Slurm on this machine ({', '.join(missing)}): apt-get install slurmctld slurmd slurm-client munge"
    return "" if os.geteuid() == 0 else "Slurm's daemons are started by root only"


def start() -> Iterator[Slurm]:
    """Body of the fixture. Skips the test where there can be no Slurm."""
    if reason := why_not():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: a socket's path has at most 107 characters
    slurm = Slurm(folder)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        host = socket.gethostname().partition(".")[0]
        (folder / "slurm.conf").write_text(CONFIG.format(host=host, folder=folder, ports=_free_ports(3)))
        (folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = {"socket": "munge.socket", "key-file": key.name, "pid-file": "munge.pid", "seed-file": "munge.seed"}
        places = [f"--{option}={folder / name}" for option, name in files.items()]
        _daemon(stack, slurm, "munged", "--foreground", "--force", f"--log-file={folder}/munge.log", *places)
        slurm.until((folder / "munge.socket").exists, "munged")
        _daemon(stack, slurm, "slurmctld", "-D")
        for node in ("n1", "n2"):
            _daemon(stack, slurm, "slurmd", "-D", "-N", node)
        slurm.until(
            lambda: slurm.run("sinfo", "-h", "-N", "-p", "main", "-o", "%T").stdout.split() == ["idle"] * 2,
            "idle nodes",
        )
        stack.callback(_end_jobs, slurm)
        yield slurm


def _daemon(stack: ExitStack, slurm: Slurm, program: str, *words: str) -> None:
    """Start a daemon in the foreground; it is ended when `stack` is."""
    name = "-".join([program, *(w for w in words if w in ("n1", "n2"))])
    log = stack.enter_context((slurm.folder / f"{name}.log").open("w"))
    full = [str(shutil.which(program, path=PATH)), *words]
    process = subprocess.Popen(full, env=slurm.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def end() -> None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    stack.callback(end)


def _end_jobs(slurm: Slurm) -> None:
    """So that no task outlives its daemon."""
    slurm.run("scancel", "--user=root")
    slurm.run("scancel", "--user=root", "--signal=KILL", "--full")
    slurm.until(lambda: not slurm.run("squeue", "-h").stdout.strip(), "the end of all jobs")


def _free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
