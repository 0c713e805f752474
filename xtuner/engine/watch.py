"""Each process of a run beats; when one falls silent, or none gets on, all end and say who, where and in what.

A dead rank leaves the others waiting: gloo notices closed connections, NCCL waits for ever, and a stopped process
closes nothing. So every rank tells a store of its own, once a second, how far it is; rank 0 looks at all, the others
at rank 0.
"""

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as torch_dist

from xtuner.core import dist
from xtuner.core.errors import ConfigError, LostRankError
from xtuner.core.log import logger
from xtuner.engine.launch import Place

BEAT = 1.0  # s
SILENT = float(os.environ.get("XTUNER_SILENT_SECONDS", "60"))  # a rank that does not beat for so long is lost
STUCK = float(os.environ.get("XTUNER_STUCK_SECONDS", "900"))  # nor may all of them stand in one iteration for longer
MEET = 50.0  # s to wait for rank 0
LAST_LINES = 5


def store(place: Place) -> Any:
    """Where ranks meet. Raises: ConfigError if that is not possible within a minute."""
    where = f"{place.address}:{place.port}"
    try:
        return torch_dist.TCPStore(
            place.address, place.port, None, place.rank == 0, timedelta(seconds=MEET), wait_for_workers=False
        )
    except (torch_dist.DistError, RuntimeError, ValueError) as e:
        taken = "EADDRINUSE" in str(e) or "address already in use" in str(e)
        raise ConfigError(
            f"port {place.port} is taken" if taken else f"rank {place.rank} on {place.host} cannot reach rank 0",
            where=where,
            why="all processes of a run meet there" + ("" if taken else f"; waited {MEET:.0f} s"),
            do="another run, or the rest of one, may hold it: end it, or give another port (PORT, MASTER_PORT)"
            if taken
            else "check that rank 0 runs, and that the address can be resolved and reached from here",
        ) from None


class Watch:
    """Beats from its making until `close`.

    Args:
        meeting: the store that ranks share.
    """

    def __init__(self, place: Place, meeting: Any) -> None:
        self.place = place
        self.iteration = 0
        self.log: Path | None = None
        self._seen: dict[int, tuple[str, float]] = {}  # rank → its last beat, and when that was new
        self._moved = time.monotonic()
        self._progress: Any = None
        self._closed = threading.Event()
        self._mine = torch_dist.TCPStore(
            place.address, meeting.port, None, False, timedelta(seconds=SILENT), wait_for_workers=False
        )
        self._beats = 0
        threading.Thread(target=self._run, name="xtuner-watch", daemon=True).start()

    def _run(self) -> None:
        while not self._closed.wait(BEAT):
            try:
                self._beat()
                trouble = self._look()
            except (torch_dist.DistError, RuntimeError):
                trouble = None if self._closed.is_set() else "rank 0, where all meet, is gone or does not answer"
            if trouble:
                self._end(trouble)

    def _beat(self) -> None:
        self._beats += 1
        facts = {"n": self._beats, "host": self.place.host, "pid": os.getpid(), "iteration": self.iteration}
        facts |= {"doing": dist.doing, "talks": dist.talks, "log": str(self.log or "")}
        self._mine.set(f"beat/{self.place.rank}", json.dumps(facts))

    def _look(self) -> str | None:
        """What has gone wrong, if anything. Rank 0 looks at all; the others at its verdict and at its beat."""
        if self.place.rank:
            if self._mine.check(["verdict"]):
                return self._mine.get("verdict").decode()
            silent = self._silent([0], SILENT)
        else:
            silent = self._silent(range(1, self.place.size), SILENT)
        if silent:
            trouble = self._told(silent, f"silent for {SILENT:.0f} s")
        elif not self.place.rank and self.iteration and self._stuck():
            trouble = f"no rank has got on for {STUCK:.0f} s\n" + self._told(list(self._seen), "waits")
        else:
            return None
        self._mine.set("verdict", trouble)
        return trouble

    def _silent(self, ranks: Any, limit: float) -> list[int]:
        """Those of `ranks` whose last beat is older than `limit` seconds by this process's clock."""
        now = time.monotonic()
        for rank in ranks:
            text = self._mine.get(f"beat/{rank}").decode() if self._mine.check([f"beat/{rank}"]) else ""
            if rank not in self._seen or self._seen[rank][0] != text:
                self._seen[rank] = text, now
        return [rank for rank in ranks if now - self._seen[rank][1] > limit and "bye" not in self._seen[rank][0]]

    def _stuck(self) -> bool:
        progress = [self.iteration, dist.talks, *(json.loads(t)["talks"] for t, _ in self._seen.values() if t)]
        if progress != self._progress:
            self._progress, self._moved = progress, time.monotonic()
        return time.monotonic() - self._moved > STUCK

    def _told(self, ranks: list[int], how: str) -> str:
        """Rank, host, iteration, last collective and the end of the log of each."""
        lines = []
        for rank in ranks[:10]:
            text = self._seen[rank][0]
            if not text:
                lines.append(f"rank {rank} is {how}; it has not begun")
                continue
            facts = json.loads(text)
            lines.append(
                f"rank {rank} on {facts['host']} (process {facts['pid']}) is {how}; "
                f"it was in iteration {facts['iteration'] + 1}, last: {facts['doing'] or 'nothing with others'}"
            )
            lines += [f"    {line}" for line in _last_lines(facts["log"])]
        return "\n".join(lines)

    def _end(self, trouble: str) -> None:
        """For a process that may hang where no exception reaches."""
        time.sleep(2 * BEAT)  # the others read the verdict from rank 0
        if self._closed.is_set():
            return
        logger.error(f"this run cannot go on: {trouble}\nwhere this rank stood: {self.log or 'below'}")
        with open(self.log, "a") if self.log else contextlib.nullcontext(sys.stderr) as f:
            faulthandler.dump_traceback(f, all_threads=True)
        os._exit(1)

    def explain(self, error: BaseException) -> LostRankError | None:
        """Who is gone, if `error` (a broken connection, perhaps) comes of that; None if nobody is."""
        deadline = time.monotonic() + 8 * BEAT
        everyone = [r for r in range(self.place.size) if r != self.place.rank]
        try:
            while time.monotonic() < deadline:
                for rank in everyone:
                    if self._mine.check([f"failure/{rank}"]):
                        told = self._mine.get(f"failure/{rank}").decode()
                        return self._lost(f"rank {rank} has failed: {told}", first=not self.place.rank)
                if gone := self._silent(everyone, 4 * BEAT):
                    first = min(r for r in range(self.place.size) if r not in gone)
                    return self._lost(self._told(gone, "gone"), first == self.place.rank)
                time.sleep(BEAT / 4)
        except (torch_dist.DistError, RuntimeError):
            return self._lost("rank 0, where all meet, is gone", self.place.rank == 1)
        return None

    def _lost(self, told: str, first: bool) -> LostRankError:
        error = LostRankError(
            told,
            where=f"seen by rank {self.place.rank} on {self.place.host}, iteration {self.iteration + 1}",
            why="the ranks compute one step together; without one of them there is none",
            do="see that rank's log and its machine (dmesg, the scheduler); then run again with --resume auto",
        )
        error.quiet = not first
        return error

    def failed(self, error: BaseException) -> None:
        """Tell the others why this rank ends."""
        text = (str(error).splitlines() or [""])[0]
        with contextlib.suppress(torch_dist.DistError, RuntimeError):
            self._mine.set(f"failure/{self.place.rank}", f"{type(error).__name__}: {text}")

    def close(self) -> None:
        """No longer expected to beat."""
        self._closed.set()
        with contextlib.suppress(torch_dist.DistError, RuntimeError):
            self._mine.set(f"beat/{self.place.rank}", "bye")


def _last_lines(log: str) -> list[str]:
    try:
        return Path(log).read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:] if log else []
    except OSError:
        return []
