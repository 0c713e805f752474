"""One job to a work dir.

`work_dir/.lock` names its owner and is touched every few seconds. A lock is dead if its process is gone (judged on the
machine and in the process namespace where it was made), or else if nothing has touched it for a while.
"""

import contextlib
import json
import os
import platform
import threading
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
    """Held from making until `release`. Raises: BusyError if another live job holds it."""

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
        raise BusyError("the work dir's lock changes hands again and again", where=str(self.path), do="try again")

    def _remove_if_dead(self, now: float) -> None:
        if (dead := require_dead(self.path, now)) is None:
            return  # just released
        text, owner, age = dead
        # Only one of several that judge so at once moves this very lock away; the others find it gone, or a new one.
        aside = temporary_sibling(self.path, "old")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return
        if _read(aside) != text:  # a living one, made since we looked: back with it
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
                logger.error(f"{self.path} is no longer this job's: another one may write here, too")
                return

    def release(self) -> None:
        self._released.set()
        if self._mine():
            with contextlib.suppress(OSError):  # read-only by now: its process is gone, so the next start takes it over
                self.path.unlink(missing_ok=True)


def require_dead(lock: Path, now: float) -> tuple[str, dict[str, Any], float] | None:
    """A dead job's lock: its text, its owner, seconds without a touch; None if there is no lock.

    Raises: BusyError if the job lives.
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
            do=f"stop it, or give another --work-dir; a dead job's lock is taken over after {DEAD_AFTER:.0f} s",
        )
    return text, owner, age


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
    """True if the very process that wrote the lock runs, False if it is gone, None if that cannot be seen from here."""
    if not owner.get("where") or owner["where"] != namespace():
        return None
    return start_time(owner.get("pid", 0)) == owner.get("born")
