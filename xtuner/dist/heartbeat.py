"""Heartbeat between the ranks of a run. If a rank stops responding, or no rank makes progress, all processes exit and
report which rank it was, on which machine, in which iteration and activity.

A lost rank leaves the others waiting: gloo notices closed connections, NCCL waits forever, and a stopped process closes
no connection. So once a second every rank writes its progress to a store. Rank 0 reads the entries of all ranks, the
others that of rank 0. The store lives in the process of rank 0: if that process is stopped, a request never returns, so
a second thread measures the time since the last reply.
"""

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as torch_dist

from xtuner.core import activity
from xtuner.core.errors import EXIT_BUG, EXIT_INTERRUPTED, ConfigError, InterruptedRunError, LostRankError
from xtuner.core.log import logger
from xtuner.dist.launchers import RankInfo


def read_seconds(name: str, default: float) -> float:
    """The environment variable XTUNER_`name`_SECONDS. Raises: ConfigError unless it is a number above 0."""
    variable = f"XTUNER_{name}_SECONDS"
    try:
        found = float(os.environ.get(variable) or default)
    except ValueError:
        found = 0.0
    if not found > 0:
        what = f"{variable} = {os.environ[variable]!r} is not a number of seconds above 0"
        raise ConfigError(what, where=f"environment: {variable}")
    return found


INTERVAL = 1.0  # s between two heartbeats
SILENT = read_seconds("SILENT", 60.0)  # a rank without a heartbeat for this long is lost
STUCK = read_seconds("STUCK", 900.0)  # the run ends if no rank makes progress for this long
MEET = read_seconds("MEET", 50.0)  # how long ranks wait for rank 0, and rank 0 for the others, at the start
SUSPENDED = 10 * INTERVAL  # if this process did not run for this long, the other ranks' silence proves nothing
LEFT = "left"  # the last entry of a rank that ended in order
WARN_AFTER = 20.0  # s of waiting until a warning says for which rank
MIN_REPLY = 5.0  # s that the store has to reply, at least
GRACE = 10 * INTERVAL  # s after a rank has failed; a rank that has not noticed by then hangs, and exits
LAST_LINES = 5  # of a lost rank's log, for the report
_NO_CONTACT = "lost contact with rank 0, which hosts the heartbeat store"


def connect_store(info: RankInfo) -> Any:
    """The store through which the ranks meet. Raises: ConfigError if that takes longer than MEET seconds."""
    deadline = time.monotonic() + MEET
    reason = _wait_for_listener(info, deadline) if info.rank else ""
    made: list[Any] = []

    def make() -> None:
        wait = timedelta(seconds=MEET)
        try:
            args = (info.address, info.port, None, info.rank == 0, wait)
            made.append(torch_dist.TCPStore(*args, wait_for_workers=False))
        except (torch_dist.DistError, RuntimeError, ValueError) as e:
            made.append(e)

    if not reason:
        thread = threading.Thread(target=make, daemon=True)  # another program may listen there, and never reply
        thread.start()
        thread.join(max(deadline - time.monotonic(), MIN_REPLY))
        if made and not isinstance(made[0], Exception):
            return made[0]
        reason = str(made[0]).splitlines()[0] if made else "the program that listens there is not rank 0"
    taken = "EADDRINUSE" in reason or "address already in use" in reason
    rank = f"rank {info.rank} on {info.host} cannot " + ("reach rank 0" if info.rank else "listen")
    raise ConfigError(
        f"port {info.port} is taken" if taken else f"{rank}: {reason}",
        where=f"{info.address}:{info.port}",
        why="all processes of a run meet there",
        do="another run, or a process left by one, may use it: end it, or give another port (PORT, MASTER_PORT)"
        if taken
        else "check that rank 0 has started, and that this address and port can be reached from here; "
        "if rank 0 starts much later, wait longer: export XTUNER_MEET_SECONDS=600",
    )


def _wait_for_listener(info: RankInfo, deadline: float) -> str:
    """Wait until a program listens at rank 0's address. Returns why none does, or an empty string."""
    address, begun, warned = f"{info.address}:{info.port}", time.monotonic(), False
    while True:
        try:
            socket.create_connection((info.address, info.port), timeout=5.0).close()
            return ""
        except OSError as e:
            now, reason = time.monotonic(), e.strerror or str(e)
        if now > deadline:
            return f"{reason} for {MEET:.0f} s"
        if not warned and now - begun > WARN_AFTER:
            logger.warning(f"rank {info.rank} waits for rank 0 at {address}, {MEET:.0f} s at most: {reason}")
            warned = True
        time.sleep(0.2)


class Heartbeat:
    """Sends heartbeats and watches those of other ranks, in two threads, until `close`.

    Args:
        meeting: the store of `connect_store`.
    """

    def __init__(self, info: RankInfo, meeting: Any) -> None:
        self.info = info
        self.iteration: int | None = None  # None before the first
        self.log: Path | None = None  # this rank's log file
        self.interrupted: Callable[[], bool] = lambda: False  # whether this process received a Ctrl-C
        self._interrupt_reported = False
        self._seen: dict[int, tuple[str, float]] = {}  # rank → (last entry, "" for none; when it changed)
        self._begun = self._replied = self._moved = time.monotonic()
        self._progress: Any = None
        self._failed_since = 0.0
        self._warned_of_missing = False
        self._closed = threading.Event()
        self._store = torch_dist.TCPStore(
            info.address, meeting.port, None, False, timedelta(seconds=SILENT), wait_for_workers=False
        )
        self._count = 0
        for body in (self._run, self._guard):
            threading.Thread(target=body, name="xtuner-heartbeat", daemon=True).start()

    def _run(self) -> None:
        while not self._closed.wait(INTERVAL):
            before, self._replied = self._replied, time.monotonic()
            if self._replied - before > SUSPENDED:
                self._seen = {rank: (text, self._replied) for rank, (text, _) in self._seen.items()}
                self._moved = self._replied
            try:
                self._send()
                trouble = self._find_trouble()
            except (torch_dist.DistError, RuntimeError):
                trouble = None if self._closed.is_set() else _NO_CONTACT
            if trouble:
                self._exit(trouble)

    def _guard(self) -> None:
        """End this process if the store does not reply: `_run` is then blocked in a call that never returns."""
        resumed = now = time.monotonic()
        while not self._closed.wait(INTERVAL):
            before, now = now, time.monotonic()
            if now - before > SUSPENDED:
                resumed = now
            if now - max(self._replied, resumed) > SILENT:
                self._exit(f"{_NO_CONTACT}: no reply for {SILENT:.0f} s")

    def _send(self) -> None:
        self._count += 1
        facts = {"count": self._count, "host": self.info.host, "pid": os.getpid(), "iteration": self.iteration}
        facts |= {"activity": activity.current_activity, "num_activities": activity.num_activities}
        self._store.set(f"heartbeat/{self.info.rank}", json.dumps(facts | {"log": str(self.log or "")}))

    def _find_trouble(self) -> str | None:
        """What is wrong with the run, if anything. Rank 0 checks all ranks; the others read what it found, and
        check that it lives."""
        if self._store.check(["failed"]):
            self._failed_since = self._failed_since or time.monotonic()
            if time.monotonic() - self._failed_since > GRACE:
                if self._store.check(["interrupted"]):
                    self._interrupt_reported = True
                    return self._store.get("interrupted").decode()
                return self._store.get("failed").decode()
        if self.info.rank:
            if self._store.check(["verdict"]):
                return self._store.get("verdict").decode()
            silent = self._find_silent([0], SILENT, self._replied)
        else:
            silent = self._find_silent(range(self.info.size), SILENT, self._replied)
            self._warn_of_missing()
        if silent:
            trouble = f"no heartbeat for {SILENT:.0f} s:\n" + self._describe(silent)
        elif not self.info.rank and self.iteration is not None and self._is_stuck():
            order = sorted(self._seen, key=lambda rank: self._facts(rank).get("num_activities", 0))
            trouble = f"no rank made progress for {STUCK:.0f} s; those furthest behind first:\n" + self._describe(order)
        else:
            return None
        self._store.set("verdict", trouble)
        return trouble

    def _find_silent(self, ranks: Sequence[int], limit: float, now: float) -> list[int]:
        """Those of `ranks` whose last heartbeat is older than `limit` seconds by this process's clock.

        Args:
            now: time of the last reply, as this process may have been stopped since.
        """
        for rank in ranks:
            key = f"heartbeat/{rank}"
            text = self._store.get(key).decode() if self._store.check([key]) else ""
            if rank not in self._seen or self._seen[rank][0] != text:
                self._seen[rank] = text, now
        waited = {rank: now - since for rank, (text, since) in self._seen.items() if text != LEFT}
        return [r for r in ranks if waited.get(r, 0) > (limit if self._seen[r][0] else max(limit, MEET))]

    def _facts(self, rank: int) -> dict[str, Any]:
        """The last heartbeat of a rank; empty if there is none."""
        text = self._seen[rank][0]
        return json.loads(text) if text not in ("", LEFT) else {}

    def _warn_of_missing(self) -> None:
        """Warn once, on rank 0, of ranks that have not started."""
        if not self._warned_of_missing and time.monotonic() - self._begun > WARN_AFTER:
            self._warned_of_missing = True
            if missing := [str(rank) for rank, (text, _) in self._seen.items() if not text]:
                logger.warning(f"waiting for {len(missing)} ranks to start: {', '.join(missing[:20])}")

    def _is_stuck(self) -> bool:
        steps = [(f.get("iteration"), f.get("num_activities")) for f in map(self._facts, self._seen)]
        if steps != self._progress:
            self._progress, self._moved = steps, self._replied
        return self._replied - self._moved > STUCK

    def _describe(self, ranks: Sequence[int]) -> str:
        """For each rank: its host, iteration, last activity and the end of its log."""
        lines = []
        for rank in ranks[:10]:
            facts = self._facts(rank)
            if not facts:
                lines.append(f"rank {rank} has not started")
                continue
            at = "starting" if facts["iteration"] is None else f"in iteration {facts['iteration'] + 1}"
            lines.append(
                f"rank {rank} on {facts['host']} (process {facts['pid']}) was {at}, "
                f"last activity: {facts['activity'] or 'none'}"
            )
            lines += [f"    {line}" for line in _last_lines(facts["log"])]
        if ranks[10:]:
            lines.append(f"and {len(ranks) - 10} more ranks")
        return "\n".join(lines)

    def _exit(self, trouble: str) -> None:
        """End this process, which may hang in a call that no exception can reach."""
        time.sleep(2 * INTERVAL)  # the others read the verdict from rank 0
        if self._closed.is_set():
            return
        if self._interrupt_reported or self._is_reported_by_main():
            (logger.warning if self.info.rank else logger.error)(trouble)
            os._exit(EXIT_INTERRUPTED)
        report = logger.error if self.info.rank in (0, 1) else logger.warning  # of 1000 ranks two are enough
        report(f"this run cannot continue: {trouble}\nstack traces of this rank: {self.log or 'below'}")
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(open(self.log, "a", encoding="utf-8")) if self.log else sys.stderr
            except OSError:  # a full disk or a deleted folder must not keep the process alive
                file = sys.stderr
            faulthandler.dump_traceback(file, all_threads=True)
        os._exit(EXIT_BUG)

    def _is_reported_by_main(self) -> bool:
        """Whether a loss is most likely a second Ctrl-C, which ends ranks one by one and is reported by rank 0."""
        return self.info.rank > 0 and self.interrupted()

    def explain(self, error: BaseException) -> LostRankError | InterruptedRunError | None:
        """The error that names the lost rank, if `error` (e.g. a broken connection) is caused by one; else None."""
        deadline = time.monotonic() + 8 * INTERVAL
        others = [r for r in range(self.info.size) if r != self.info.rank]
        try:
            while time.monotonic() < deadline:
                if self._store.check(["interrupted"]):
                    return self._make_interrupted(self._store.get("interrupted").decode())
                for rank in others:
                    if self._store.check([f"failure/{rank}"]):
                        reason = self._store.get(f"failure/{rank}").decode()
                        return self._make_lost(f"rank {rank} has failed: {reason}", not self.info.rank)
                if silent := self._find_silent(others, 4 * INTERVAL, time.monotonic()):
                    first = min(r for r in range(self.info.size) if r not in silent)
                    return self._make_lost("lost:\n" + self._describe(silent), first == self.info.rank)
                time.sleep(INTERVAL / 4)
        except (torch_dist.DistError, RuntimeError):
            return self._make_lost(_NO_CONTACT, self.info.rank == 1)
        return None

    def _make_interrupted(self, what: str) -> InterruptedRunError:
        error = InterruptedRunError(what)
        error.reported_elsewhere = self.info.rank > 0
        return error

    def _make_lost(self, what: str, report: bool) -> LostRankError | InterruptedRunError:
        """`report`: whether this rank is the one that reports the loss."""
        if self._is_reported_by_main():
            logger.warning(what)  # into this rank's log
            return self._make_interrupted(what)
        error = LostRankError(
            what,
            where=f"seen by rank {self.info.rank} on {self.info.host}, iteration {(self.iteration or 0) + 1}",
            why="the ranks compute each step together, and cannot without one of them",
            do="see that rank's log and its machine (dmesg, the scheduler); then run again with --resume auto",
        )
        error.reported_elsewhere = not report
        return error

    def report_failure(self, error: BaseException) -> None:
        """Send the other ranks the reason why this rank ends."""
        text = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        with contextlib.suppress(torch_dist.DistError, RuntimeError):
            if isinstance(error, InterruptedRunError):
                self._store.set("interrupted", str(error))
            self._store.set(f"failure/{self.info.rank}", text)
            self._store.set("failed", f"rank {self.info.rank} on {self.info.host} has failed: {text}")

    def close(self) -> None:
        """Stop the heartbeat; the other ranks no longer expect one."""
        self._closed.set()
        with contextlib.suppress(torch_dist.DistError, RuntimeError):
            self._store.set(f"heartbeat/{self.info.rank}", LEFT)


def _last_lines(log: str) -> list[str]:
    try:
        return Path(log).read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:] if log else []
    except OSError:
        return []
