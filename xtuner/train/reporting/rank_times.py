"""How long each rank works in an iteration, and which rank makes the others wait.

Between two of the messages with which an iteration begins, a rank waits for data and computes; in the message it waits
for the rank that arrives last. Each rank keeps these times; every EVERY iterations the message, which is sent anyway,
also carries the median times of all ranks. GPUs wait for each other within an iteration too, where the host sees no
difference, so a fixed matrix product of 0.2 ms is timed now and then: it shows a GPU with low clocks.
"""

import time
from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

import torch

from xtuner.dist.collectives import Ranks

EVERY = 10  # iterations between two reports of all ranks
LATE = 0.05  # share of an iteration by which a slow rank arrives after the others
SLOW_PRODUCT = 1.15  # time of the product on a slow GPU, in that of the median rank
LONGER = 1.2  # time of an iteration, in the shortest so far, from which all ranks are called slow
REPORTS = 5  # reports in a row that name the same rank and part, until it is reported
FOR_LONG = 60.0  # s that they must span
PROBE_EVERY = 5.0  # s between two products
SIZE = {"cuda": 2048, "cpu": 96}  # rows of the product's matrices
PRODUCTS = 8  # one after another, so that their launch does not count


class RankTimes(NamedTuple):
    """Of one rank, in seconds: medians over the last EVERY iterations, and of the fixed product."""

    data: float
    work: float  # from the end of a message to the begin of the next, waiting for data included
    wait: float  # in the message
    product: float


class RankClock:
    """Measures this rank, and receives the times of all ranks. All ranks use it in the same iterations."""

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self.ranks = ranks
        self.all: tuple[RankTimes, ...] = ()  # the newest of all ranks
        self._own: list[tuple[float, float, float]] = []  # data, work, wait of each iteration
        self._product = _Product(device)
        self._left = self._arrived = time.perf_counter()
        self._count = 0

    def arrive(self, data_time: float) -> list[float]:
        """Before the message. Returns what to add to the sums in it: four for each rank, or nothing."""
        if self.ranks.size == 1:
            return []
        self._arrived = time.perf_counter()
        self._data, self._work = data_time, self._arrived - self._left
        self._count += 1
        if self._count % EVERY or not self._own:
            return []
        shares = [0.0] * (4 * self.ranks.size)
        data, work, wait = map(median, zip(*self._own, strict=True))
        mine = RankTimes(data, work, wait, self._product.seconds())
        shares[4 * self.ranks.rank : 4 * self.ranks.rank + 4] = mine
        self._own = []
        return shares

    def leave(self, sums: Sequence[float]) -> None:
        """After the message, with the sums of what `arrive` returned."""
        if self.ranks.size == 1:
            return
        self._left = time.perf_counter()
        self._own.append((self._data, self._work, self._left - self._arrived))
        if sums:
            self.all = tuple(RankTimes(*sums[i : i + 4]) for i in range(0, len(sums), 4))
            self._product.start()


class _Product:
    """Times a fixed matrix product on the device, in the background."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._matrix: torch.Tensor | None = None
        self._events: tuple[Any, Any] | None = None
        self._last = self._seconds = 0.0

    def start(self) -> None:
        now = time.monotonic()
        if now - self._last < PROBE_EVERY:
            return
        self._last = now
        if self._matrix is None and not self._allocate():
            return
        if self._device.type == "cuda":
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
            self._multiply()
            events[1].record()
            self._events = events
            return
        times = []
        for _ in range(3):  # the others may have been interrupted
            begin = time.perf_counter()
            self._multiply()
            times.append(time.perf_counter() - begin)
        self._seconds = min(times)

    def _allocate(self) -> bool:
        size = SIZE[self._device.type]
        dtype = torch.bfloat16 if self._device.type == "cuda" else torch.float32
        try:
            self._matrix = torch.ones(size, size, device=self._device, dtype=dtype)
            self._result = torch.empty_like(self._matrix)
        except torch.OutOfMemoryError:  # 16 MiB; a run that is so full continues without
            self._matrix = None
            return False
        self._multiply()  # loads the kernel
        return True

    @torch.no_grad()
    def _multiply(self) -> None:
        assert self._matrix is not None
        for _ in range(PRODUCTS):
            torch.mm(self._matrix, self._matrix, out=self._result)

    def seconds(self) -> float:
        """Of the last product; 0 before the first. The iteration since then has waited for the GPU."""
        if self._events and self._events[1].query():
            self._seconds, self._events = self._events[0].elapsed_time(self._events[1]) / 1000, None
        return self._seconds


class Finding(NamedTuple):
    """`rank`: -1 for all ranks alike. `what` and `do` complete the report."""

    rank: int
    part: str
    what: str = ""
    do: str = ""


def find_slow(times: Sequence[RankTimes], shortest: float) -> Finding | None:
    """The rank that makes the others wait, and why.

    Args:
        shortest: the shortest time of an iteration so far, in reports like this one.
    """
    waits, works = [t.wait for t in times], [t.work for t in times]
    whole = median(w + t for w, t in zip(waits, works, strict=True))
    slowest = min(range(len(times)), key=lambda r: waits[r])
    late = median(waits) - waits[slowest]
    products = [t.product for t in times if t.product > 0]
    usual = median(products) if len(products) == len(times) else 0.0
    weakest = max(range(len(times)), key=lambda r: times[r].product)
    ratio = times[weakest].product / usual if usual else 1.0
    if late > LATE * whole:
        data, common = times[slowest].data, median(t.data for t in times)
        what = f"the others wait {late:.3f} s of {whole:.3f} s for it in each iteration"
        if data - common > late / 2:
            what += f"; it waits {data:.3f} s for data, the median rank {common:.3f} s"
            return Finding(slowest, "data", what, "compare the speed of its file system, or raise num_workers")
        if not (usual and times[slowest].product > SLOW_PRODUCT * usual):
            do = "look for other programs there, a slow disk, or a hook that only this rank calls"
            return Finding(slowest, "host", what, do)
        weakest, ratio = slowest, times[slowest].product / usual
    if ratio > SLOW_PRODUCT:
        what = f"a fixed matrix product takes {ratio:.2f} times as long as on the median rank"
        return Finding(weakest, "GPU clocks", what, "there: nvidia-smi -q -d CLOCK,PERFORMANCE,TEMPERATURE")
    if shortest and whole > LONGER * shortest and median(t.data for t in times) < LATE * whole:
        what = (
            f"iterations take {whole:.3f} s, {whole / shortest:.2f} times as long as the shortest so far, on all ranks"
        )
        do = "no rank is late and no GPU is slow; test it with `xtuner doctor` on the allocation"
        return Finding(-1, "network", what, do)
    return None


class SlowRanks:
    """Reports a rank, once for each part, that `find_slow` names in REPORTS reports in a row and for long."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self._hosts = hosts
        self._shortest = 0.0
        self._seen: Sequence[RankTimes] = ()
        self._named: tuple[int, str] | None = None
        self._count, self._since = 0, 0.0
        self._reported: set[tuple[int, str]] = set()

    def add(self, times: Sequence[RankTimes]) -> tuple[str, dict[str, Any]] | None:
        """The newest report of all ranks, which may be known. Returns a message and the facts of its event, if any."""
        if times is self._seen or not times:
            return None
        self._seen = times
        found = find_slow(times, self._shortest)
        whole = median(t.work + t.wait for t in times)
        self._shortest = min(self._shortest or whole, whole)
        named = (found.rank, found.part) if found else None
        if named != self._named:
            self._named, self._count, self._since = named, 0, time.monotonic()
        self._count += 1
        long = self._count >= REPORTS and time.monotonic() - self._since >= FOR_LONG
        if found is None or named is None or not long or named in self._reported:
            return None
        self._reported.add(named)
        if found.rank < 0:
            text = f"the {found.part} is probably slow: {found.what}"
        else:
            text = f"rank {found.rank} on {self._hosts[found.rank]} is slow, probably its {found.part}: {found.what}"
        facts = {"rank": found.rank, "part": found.part}
        if found.rank >= 0:
            facts |= {"host": self._hosts[found.rank], **times[found.rank]._asdict()}
        return f"{text}\n        {found.do}", {"reason": text, **facts}
