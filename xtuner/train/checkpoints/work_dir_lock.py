"""One job per work dir.

`work_dir/.lock` names its owner, which touches it every few seconds. A lock is dead if its owner's process is gone;
from another machine or process namespace, where that cannot be seen, if it has not been touched for a while.
"""

import contextlib
import json
import os
import platform
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from xtuner.core.errors import BusyError
from xtuner.core.file_owner import namespace, start_time
from xtuner.core.files import remove_leftovers, temporary_sibling
from xtuner.core.foreign_inputs import read_regular
from xtuner.core.log import logger

NAME = ".lock"
BEAT = 10.0  # s between touches
DEAD_AFTER = 90.0  # s without a touch
JOB_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_NAME", "HOSTNAME")


class WorkDirLock:
    """Held from construction until `release`. Raises: BusyError if another live job holds it."""

    def __init__(self, work_dir: Path) -> None:
        self.path = work_dir / NAME
        self._me = json.dumps(_myself())
        self._take()
        self._released = threading.Event()
        threading.Thread(target=self._beat, name="xtuner-lock", daemon=True).start()

    def _take(self) -> None:
        remove_leftovers(self.path)
        mine = temporary_sibling(self.path, "tmp")
        mine.write_text(self._me, encoding="utf-8")
        try:
            for _ in range(3):
                try:
                    os.link(mine, self.path)  # appears with its contents, or not at all
                    return
                except FileExistsError:
                    self._remove_if_dead(now=mine.stat().st_mtime)  # the file server's clock, not ours
        finally:
            mine.unlink()
        raise BusyError("several jobs compete for the work dir's lock", where=str(self.path), do="try again")

    def _remove_if_dead(self, now: float) -> None:
        if (dead := require_dead(self.path, now)) is None:
            return  # just released
        text, owner, age = dead
        # If several jobs do this at once, only one renames this lock; the others find it gone, or a new one.
        aside = temporary_sibling(self.path, "old")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return
        if _read(aside) != text:  # a live lock, created since the check: put it back
            os.rename(aside, self.path)
            return
        aside.unlink()
        logger.warning(f"taking over the work dir from a dead job: {_describe(owner)}, silent for {age:.0f} s")

    def _mine(self) -> bool:
        try:
            return _read(self.path) == self._me
        except OSError:
            return False

    def _beat(self) -> None:
        while not self._released.wait(BEAT):
            if self._mine():
                with contextlib.suppress(OSError):  # tried again with the next beat
                    os.utime(self.path)
            else:
                logger.error(f"{self.path} no longer belongs to this job: another job may also write here")
                return

    def release(self) -> None:
        self._released.set()
        if self._mine():
            with contextlib.suppress(OSError):  # read-only: the next start sees that the process is gone
                self.path.unlink(missing_ok=True)


def require_dead(lock: Path, now: float) -> tuple[str, dict[str, Any], float] | None:
    """The lock of a dead job: (text, owner, seconds since its last touch); None if there is no lock.

    Raises: BusyError if the job is alive.
    """
    try:
        text = _read(lock)
        age = now - lock.stat().st_mtime
    except FileNotFoundError:
        return None
    try:
        owner = json.loads(text)
    except (ValueError, RecursionError):
        owner = None
    owner = owner if isinstance(owner, dict) else {}
    alive = _alive(owner)
    if alive or (alive is None and age < DEAD_AFTER):
        raise BusyError(
            f"another job uses this work dir: {_describe(owner)}",
            where=str(lock),
            why="two runs would overwrite each other's checkpoints",
            do=f"stop it, or give another --work-dir; the lock of a dead job expires after {DEAD_AFTER:.0f} s",
        )
    return text, owner, age


def find_live_owner(work_dir: Path) -> tuple[str, int | None, float] | None:
    """(host, process, seconds since its last touch) of the job that uses a work dir; None if there is none."""
    lock = work_dir / NAME
    try:
        owner = json.loads(_read(lock))
        age = max(time.time() - lock.stat().st_mtime, 0.0)
    except (OSError, ValueError, RecursionError):
        return None
    alive = _alive(owner) if isinstance(owner, dict) else False
    if alive is False or (alive is None and age >= DEAD_AFTER):
        return None
    return str(owner.get("host", "")), owner.get("pid"), age


def _read(lock: Path) -> str:
    return read_regular(lock).decode(errors="replace")


def _myself() -> dict[str, Any]:
    job = next((f"{name}={os.environ[name]}" for name in JOB_VARIABLES if name in os.environ), "")
    pid = os.getpid()
    token = uuid.uuid4().hex
    return {
        "host": platform.node(),
        "pid": pid,
        "born": start_time(pid),
        "where": namespace(),
        "job": job,
        "token": token,
    }


def _describe(owner: dict[str, Any]) -> str:
    if not owner:
        return "unknown"
    job = f", {owner['job']}" if owner.get("job") else ""
    return f"process {owner.get('pid')} on {owner.get('host')}{job}"


def _alive(owner: dict[str, Any]) -> bool | None:
    """Whether the process that wrote the lock is running; None if this cannot be seen from here."""
    if not owner.get("where") or owner["where"] != namespace():
        return None
    return start_time(owner.get("pid", 0)) == owner.get("born")
