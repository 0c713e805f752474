"""One job to a work dir.

`work_dir/.lock` names its owner and is touched every few seconds. A lock is dead if its process is gone from this host,
or if nothing has touched it for a while (another host's job that was killed).
"""

import json
import os
import platform
import threading
import time
from pathlib import Path
from typing import Any

from xtuner.core.errors import BusyError
from xtuner.core.log import logger

NAME = ".lock"
BEAT = 10.0  # s between touches
DEAD_AFTER = 90.0  # s without a touch
JOB_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_NAME", "HOSTNAME")


class WorkDirLock:
    """Held from making until `release`. Raises: BusyError if another live job holds it."""

    def __init__(self, work_dir: Path) -> None:
        self.path = work_dir / NAME
        self._take()
        self._released = threading.Event()
        threading.Thread(target=self._beat, name="xtuner-lock", daemon=True).start()

    def _take(self) -> None:
        for _ in range(3):
            try:
                fd = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                self._remove_if_dead()
                continue
            with open(fd, "w", encoding="utf-8") as f:
                json.dump(_myself(), f)
            return
        raise BusyError("the work dir's lock changes hands again and again", where=str(self.path), do="try again")

    def _remove_if_dead(self) -> None:
        try:
            age = time.time() - self.path.stat().st_mtime
            owner: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8") or "{}")
        except FileNotFoundError:
            return  # just released
        except json.JSONDecodeError:
            owner = {}  # being written this moment, or torn
        here = owner.get("host") == platform.node()
        if (here and not _alive(owner)) or age > DEAD_AFTER:
            logger.warning(f"taking over the work dir from a dead job: {_describe(owner)}, silent for {age:.0f} s")
            self.path.unlink(missing_ok=True)
            return
        raise BusyError(
            f"another job uses this work dir: {_describe(owner)}",
            where=str(self.path),
            why="two runs would overwrite each other's checkpoints",
            do=f"stop it, or give another --work-dir; a dead job's lock is taken over after {DEAD_AFTER:.0f} s",
        )

    def _beat(self) -> None:
        while not self._released.wait(BEAT):
            try:
                os.utime(self.path)
            except OSError as e:
                logger.warning(f"the lock of the work dir cannot be touched: {e.strerror}")

    def release(self) -> None:
        self._released.set()
        self.path.unlink(missing_ok=True)


def _myself() -> dict[str, Any]:
    job = next((f"{name}={os.environ[name]}" for name in JOB_VARIABLES if name in os.environ), "")
    return {"host": platform.node(), "pid": os.getpid(), "born": _born(os.getpid()), "job": job}


def _describe(owner: dict[str, Any]) -> str:
    if not owner:
        return "unknown"
    job = f", {owner['job']}" if owner.get("job") else ""
    return f"process {owner.get('pid')} on {owner.get('host')}{job}"


def _alive(owner: dict[str, Any]) -> bool:
    """True if the very process that wrote the lock runs: process numbers are used again, start times are not."""
    return _born(owner.get("pid", 0)) == owner.get("born")


def _born(pid: int) -> str | None:
    """Start time of a process in clock ticks since boot; None if there is none (or no /proc: then locks only age)."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as f:
            fields = f.read().rpartition(")")[2].split()
    except OSError:
        return None if Path("/proc").is_dir() else "unknown"
    return None if fields[0] == "Z" else fields[19]
