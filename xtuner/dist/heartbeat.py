"""Each process of a run beats; when one falls silent, or none gets on, all end and say who, where and in what.

A dead rank leaves the others waiting: gloo notices closed connections, NCCL waits for ever, and a stopped process
closes nothing. So every rank tells a store of its own, once a second, how far it is; rank 0 looks at all, the others
at rank 0. The store lives in rank 0's process: if that stands still, asking it never returns, so a second thread looks
at the clock.
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

from xtuner.dist import collectives
from xtuner.core.errors import EXIT_BUG, EXIT_INTERRUPTED, ConfigError, InterruptedRunError, LostRankError
from xtuner.core import progress
from xtuner.core.log import logger
from xtuner.dist.launchers import RankInfo


def seconds(what: str, usual: float) -> float:
    """XTUNER_`what`_SECONDS, if that is set. Raises: ConfigError if it is no time."""
    name = f"XTUNER_{what}_SECONDS"
    try:
        found = float(os.environ.get(name) or usual)
    except ValueError:
        found = 0.0
    if not found > 0:
        raise ConfigError(f"{name} = {os.environ[name]!r} is no number of seconds", where=f"environment: {name}")
    return found


BEAT = 1.0  # s
SILENT = seconds("SILENT", 60.0)  # a rank that does not beat for so long is lost
STUCK = seconds("STUCK", 900.0)  # nor may all of them stand in one iteration for longer
MEET = seconds("MEET", 50.0)  # to wait for rank 0, and rank 0 for the others
ASLEEP = 10 * BEAT  # who was not run for so long (a suspended job) cannot say that the others were silent
BYE = "bye"
SAY = 20.0  # s after which it is said whom one waits for
ANSWER = 5.0  # s that who listens there has at least to answer
LEAVE = 10 * BEAT  # when a rank has failed, the others notice by themselves within that time, or are in a hang
LAST_LINES = 5


def connect_store(info: RankInfo) -> Any:
    """Where ranks meet. Raises: ConfigError if that is not possible within MEET seconds."""
    deadline = time.monotonic() + MEET
    reason = _unreachable(info, deadline) if info.rank else ""
    made: list[Any] = []

    def make() -> None:
        wait = timedelta(seconds=MEET)
        try:
            args = (info.address, info.port, None, info.rank == 0, wait)
            made.append(torch_dist.TCPStore(*args, wait_for_workers=False))
        except (torch_dist.DistError, RuntimeError, ValueError) as e:
            made.append(e)

    if not reason:
        asking = threading.Thread(target=make, daemon=True)  # what listens there may be something else, and say nothing
        asking.start()
        asking.join(max(deadline - time.monotonic(), ANSWER))
        if made and not isinstance(made[0], Exception):
            return made[0]
        reason = str(made[0]).splitlines()[0] if made else "what listens there is no rank 0"
    taken = "EADDRINUSE" in reason or "address already in use" in reason
    who = f"rank {info.rank} on {info.host} cannot " + ("reach rank 0" if info.rank else "listen")
    raise ConfigError(
        f"port {info.port} is taken" if taken else f"{who}: {reason}",
        where=f"{info.address}:{info.port}",
        why="all processes of a run meet there",
        do="another run, or the rest of one, may hold it: end it, or give another port (PORT, MASTER_PORT)"
        if taken
        else "check that rank 0 has started, and that this address and port can be reached from here; "
        "if it starts much later, give more time: export XTUNER_MEET_SECONDS=600",
    )


def _unreachable(info: RankInfo, deadline: float) -> str:
    """Wait until something listens at rank 0's address. Returns why nothing does, or nothing."""
    where, begun, told = f"{info.address}:{info.port}", time.monotonic(), False
    while True:
        try:
            socket.create_connection((info.address, info.port), timeout=5.0).close()
            return ""
        except OSError as e:
            now, reason = time.monotonic(), e.strerror or str(e)
        if now > deadline:
            return f"{reason} for {MEET:.0f} s"
        if not told and now - begun > SAY:
            logger.warning(f"rank {info.rank} waits for rank 0 at {where}, {MEET:.0f} s at most: {reason}")
            told = True
        time.sleep(0.2)


class Heartbeat:
    """Beats from its making until `close`.

    Args:
        meeting: the store that ranks share.
    """

    def __init__(self, info: RankInfo, meeting: Any) -> None:
        self.info = info
        self.iteration: int | None = None  # before the first
        self.log: Path | None = None
        self.interrupted: Callable[[], bool] = lambda: False  # whether a Ctrl-C has reached this process
        self._told_of_interrupt = False
        self._seen: dict[int, tuple[str, float]] = {}  # rank → its last beat ("" for none yet), and when that was new
        self._begun = self._looked = self._moved = time.monotonic()
        self._progress: Any = None
        self._failed_since = 0.0
        self._missed = False
        self._closed = threading.Event()
        self._mine = torch_dist.TCPStore(
            info.address, meeting.port, None, False, timedelta(seconds=SILENT), wait_for_workers=False
        )
        self._beats = 0
        for body in (self._run, self._guard):
            threading.Thread(target=body, name="xtuner-watch", daemon=True).start()

    def _run(self) -> None:
        while not self._closed.wait(BEAT):
            before, self._looked = self._looked, time.monotonic()
            if self._looked - before > ASLEEP:
                self._seen = {rank: (text, self._looked) for rank, (text, _) in self._seen.items()}
                self._moved = self._looked
            try:
                self._beat()
                trouble = self._look()
            except (torch_dist.DistError, RuntimeError):
                trouble = None if self._closed.is_set() else "rank 0, where all meet, is gone or does not answer"
            if trouble:
                self._end(trouble)

    def _guard(self) -> None:
        """End this process if the store does not answer: `_run` then stands still in a call that never returns."""
        woken = now = time.monotonic()
        while not self._closed.wait(BEAT):
            before, now = now, time.monotonic()
            if now - before > ASLEEP:
                woken = now
            if now - max(self._looked, woken) > SILENT:
                self._end(f"rank 0, where all meet, does not answer for {SILENT:.0f} s")

    def _beat(self) -> None:
        self._beats += 1
        facts = {"n": self._beats, "host": self.info.host, "pid": os.getpid(), "iteration": self.iteration}
        facts |= {"doing": progress.current_activity, "talks": progress.num_activities, "log": str(self.log or "")}
        self._mine.set(f"beat/{self.info.rank}", json.dumps(facts))

    def _look(self) -> str | None:
        """What has gone wrong, if anything. Rank 0 looks at all; the others at its verdict and at its beat."""
        if self._mine.check(["failed"]):
            self._failed_since = self._failed_since or time.monotonic()
            if time.monotonic() - self._failed_since > LEAVE:
                if self._mine.check(["interrupted"]):
                    self._told_of_interrupt = True
                    return self._mine.get("interrupted").decode()
                return self._mine.get("failed").decode()
        if self.info.rank:
            if self._mine.check(["verdict"]):
                return self._mine.get("verdict").decode()
            silent = self._silent([0], SILENT, self._looked)
        else:
            silent = self._silent(range(self.info.size), SILENT, self._looked)
            self._miss()
        if silent:
            trouble = f"silent for {SILENT:.0f} s:\n" + self._told(silent)
        elif not self.info.rank and self.iteration is not None and self._stuck():
            order = sorted(self._seen, key=lambda rank: self._facts(rank).get("talks", 0))
            trouble = f"no rank has got on for {STUCK:.0f} s; first those that are behind:\n" + self._told(order)
        else:
            return None
        self._mine.set("verdict", trouble)
        return trouble

    def _silent(self, ranks: Sequence[int], limit: float, now: float) -> list[int]:
        """Those of `ranks` whose last beat is older than `limit` seconds by this process's clock.

        Args:
            now: not the present if this process may have stood still since it was asked to look.
        """
        for rank in ranks:
            text = self._mine.get(f"beat/{rank}").decode() if self._mine.check([f"beat/{rank}"]) else ""
            if rank not in self._seen or self._seen[rank][0] != text:
                self._seen[rank] = text, now
        waited = {rank: now - since for rank, (text, since) in self._seen.items() if text != BYE}
        return [r for r in ranks if waited.get(r, 0) > (limit if self._seen[r][0] else max(limit, MEET))]

    def _facts(self, rank: int) -> dict[str, Any]:
        """Of a rank's last beat; empty if there was none."""
        text = self._seen[rank][0]
        return json.loads(text) if text not in ("", BYE) else {}

    def _miss(self) -> None:
        """Say who has not come, once, before it is too late."""
        if not self._missed and time.monotonic() - self._begun > SAY:
            self._missed = True
            if missing := [str(rank) for rank, (text, _) in self._seen.items() if not text]:
                logger.warning(f"waiting for {len(missing)} ranks to begin: {', '.join(missing[:20])}")

    def _stuck(self) -> bool:
        steps = [(f.get("iteration"), f.get("talks")) for f in map(self._facts, self._seen)]
        if steps != self._progress:
            self._progress, self._moved = steps, self._looked
        return self._looked - self._moved > STUCK

    def _told(self, ranks: Sequence[int]) -> str:
        """Rank, host, iteration, last collective and the end of the log of each."""
        lines = []
        for rank in ranks[:10]:
            facts = self._facts(rank)
            if not facts:
                lines.append(f"rank {rank} has not begun")
                continue
            at = "starting" if facts["iteration"] is None else f"in iteration {facts['iteration'] + 1}"
            lines.append(
                f"rank {rank} on {facts['host']} (process {facts['pid']}) was {at}, "
                f"last: {facts['doing'] or 'nothing with others'}"
            )
            lines += [f"    {line}" for line in _last_lines(facts["log"])]
        if ranks[10:]:
            lines.append(f"and {len(ranks) - 10} more ranks")
        return "\n".join(lines)

    def _end(self, trouble: str) -> None:
        """For a process that may hang where no exception reaches."""
        time.sleep(2 * BEAT)  # the others read the verdict from rank 0
        if self._closed.is_set():
            return
        if self._told_of_interrupt or self._leaves_it_to_main():
            (logger.warning if self.info.rank else logger.error)(trouble)
            os._exit(EXIT_INTERRUPTED)
        tell = logger.error if self.info.rank in (0, 1) else logger.warning  # 1000 ranks need not all say it
        tell(f"this run cannot go on: {trouble}\nwhere this rank stood: {self.log or 'below'}")
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(open(self.log, "a", encoding="utf-8")) if self.log else sys.stderr
            except OSError:  # a full disk, a folder that has gone: this process must end all the same
                file = sys.stderr
            faulthandler.dump_traceback(file, all_threads=True)
        os._exit(EXIT_BUG)

    def _leaves_it_to_main(self) -> bool:
        """Whether a loss is most likely a second Ctrl-C, which ends ranks one by one: rank 0 reports that."""
        return self.info.rank > 0 and self.interrupted()

    def explain(self, error: BaseException) -> LostRankError | InterruptedRunError | None:
        """Who is gone, if `error` (a broken connection, perhaps) comes of that; None if nobody is."""
        deadline = time.monotonic() + 8 * BEAT
        everyone = [r for r in range(self.info.size) if r != self.info.rank]
        try:
            while time.monotonic() < deadline:
                if self._mine.check(["interrupted"]):
                    return self._interrupted(self._mine.get("interrupted").decode())
                for rank in everyone:
                    if self._mine.check([f"failure/{rank}"]):
                        told = self._mine.get(f"failure/{rank}").decode()
                        return self._lost(f"rank {rank} has failed: {told}", first=not self.info.rank)
                if gone := self._silent(everyone, 4 * BEAT, time.monotonic()):
                    first = min(r for r in range(self.info.size) if r not in gone)
                    return self._lost("lost:\n" + self._told(gone), first == self.info.rank)
                time.sleep(BEAT / 4)
        except (torch_dist.DistError, RuntimeError):
            return self._lost("rank 0, where all meet, is gone", self.info.rank == 1)
        return None

    def _interrupted(self, told: str) -> InterruptedRunError:
        error = InterruptedRunError(told)
        error.reported_elsewhere = self.info.rank > 0
        return error

    def _lost(self, told: str, first: bool) -> LostRankError | InterruptedRunError:
        if self._leaves_it_to_main():
            logger.warning(told)  # into this rank's log
            return self._interrupted(told)
        error = LostRankError(
            told,
            where=f"seen by rank {self.info.rank} on {self.info.host}, iteration {(self.iteration or 0) + 1}",
            why="the ranks compute one step together; without one of them there is none",
            do="see that rank's log and its machine (dmesg, the scheduler); then run again with --resume auto",
        )
        error.reported_elsewhere = not first
        return error

    def failed(self, error: BaseException) -> None:
        """Tell the others why this rank ends."""
        text = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        with contextlib.suppress(torch_dist.DistError, RuntimeError):
            if isinstance(error, InterruptedRunError):
                self._mine.set("interrupted", str(error))
            self._mine.set(f"failure/{self.info.rank}", text)
            self._mine.set("failed", f"rank {self.info.rank} on {self.info.host} has failed: {text}")

    def close(self) -> None:
        """No longer expected to beat."""
        self._closed.set()
        with contextlib.suppress(torch_dist.DistError, RuntimeError):
            self._mine.set(f"beat/{self.info.rank}", BYE)


def _last_lines(log: str) -> list[str]:
    try:
        return Path(log).read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:] if log else []
    except OSError:
        return []
