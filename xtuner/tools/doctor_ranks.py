"""Will training work on this allocation? Checks that need all ranks; each yields the same rows on every rank."""

import os
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

import torch

from xtuner.core.log import human_bytes
from xtuner.core.system import disk, sysinfo
from xtuner.dist import measure
from xtuner.dist.collectives import Ranks
from xtuner.tools.doctor import NOTE, OK, PROBLEM, Row

MOST_SKEW = 1.0  # s; a work dir's lock compares times of files with clocks
SLOW_PRODUCT = 1.1  # time of the product on a slow rank, in that of the median rank
FAST = {"cuda": 5e9, "cpu": 0.0}  # bytes/s of an all-reduce between nodes; below: a note
VISIBLE = 10.0  # s in which a file must become visible on other nodes
SHOWN = 8  # ranks named in a row


def examine_ranks(ranks: Ranks, device: torch.device, hosts: Sequence[str], work_dir: Path) -> Iterator[Row]:
    """All ranks call it together, and iterate to its end."""
    nodes = Counter(hosts)
    yield Row("ranks", OK, f"{ranks.size} on {len(nodes)} nodes: " + _some([f"{n} on {h}" for h, n in nodes.items()]))
    yield _versions(ranks, hosts)
    yield _clocks(ranks, hosts)
    yield _shared_folder(ranks, hosts, work_dir)
    yield _products(ranks, device, hosts)
    yield from _all_reduce(ranks, device, hosts)


def gather_rows(ranks: Ranks, hosts: Sequence[str], own: Sequence[Row]) -> Iterator[Row]:
    """Rows of the checks of other nodes that are neither in order nor the same as rank 0's, with their host.

    Args:
        own: of this rank; empty unless it is the first on its node.
    """
    rows = [[Row(*row) for row in found] for found in ranks.gather([list(vars(r).values()) for r in own])]
    known = {(row.name, row.state) for row in rows[0]}
    for rank in range(1, ranks.size):
        for row in rows[rank]:
            if row.state != OK and (row.name, row.state) not in known:
                yield Row(row.name, row.state, f"{hosts[rank]}: {row.found}", row.do)


def checkpoint_row(free: int, size: float, count: int, folder: Path, what: str) -> Row:
    """Whether `count` checkpoints of `size` bytes fit."""
    found = f"{human_bytes(free)} free in {folder}; checkpoints of {what}: {human_bytes(size)} each, {count} of them "
    found += human_bytes(count * size)
    do = "give --work-dir on a larger disk, or set save_total_limit lower (one more is needed while it is written)"
    return Row("checkpoints", PROBLEM if free < count * size else OK, found, do if free < count * size else "")


def _versions(ranks: Ranks, hosts: Sequence[str]) -> Row:
    own = {name: sysinfo.installed(name) for name in ("xtuner", *sysinfo.requirements(), *sysinfo.OPTIONAL)}
    all_ = ranks.gather(own | {"cuda": torch.version.cuda, "gpu": (sysinfo.gpus() or [{"name": None}])[0]["name"]})
    other = []
    for rank, found in enumerate(all_):
        if different := [
            f"{name} {found[name]}, not {all_[0][name]}" for name in found if found[name] != all_[0][name]
        ]:
            other.append(f"rank {rank} on {hosts[rank]}: {', '.join(different)}")
    if other:
        return Row("same software", PROBLEM, _some(other), "start all ranks in the same environment, on the same GPUs")
    return Row("same software", OK, "the same packages and GPUs on all ranks")


def _clocks(ranks: Ranks, hosts: Sequence[str]) -> Row:
    offsets = measure.clock_offsets(ranks)
    far = [f"{hosts[r]} by {offset:+.2f} s" for r, offset in enumerate(offsets) if abs(offset) > MOST_SKEW]
    if far:
        found = f"differ from {hosts[0]}: {_some(list(dict.fromkeys(far)))}"
        return Row("clocks", PROBLEM, found, "synchronize them (chronyd, ntpd)")
    return Row("clocks", OK, f"within {max(offsets) - min(offsets):.3f} s")


def _shared_folder(ranks: Ranks, hosts: Sequence[str], work_dir: Path) -> Row:
    """Each rank writes a file; rank 0 must see all of them, and all must see that of rank 0."""
    folder = Path(ranks.broadcast(str(disk.nearest_existing(work_dir))))
    name = ranks.broadcast(f".xtuner-doctor-{secrets.token_hex(8)}")
    mine = folder / f"{name}-{ranks.rank}"
    problem = ""
    try:
        mine.write_text(str(ranks.rank))
    except OSError as e:
        problem = f"{hosts[ranks.rank]} cannot write: {e.strerror}"
    problems = [p for p in ranks.gather(problem) if p]
    if not problems:
        wanted = range(ranks.size) if ranks.is_main else [0]
        unseen = _wait_for({r: folder / f"{name}-{r}" for r in wanted})
        seen = ranks.gather(unseen)
        problems = [f"{hosts[0]} does not see the files of {hosts[r]}" for r in seen[0]]
        problems += [f"{hosts[r]} does not see the files of {hosts[0]}" for r in range(1, ranks.size) if seen[r]]
    mine.unlink(missing_ok=True)
    if problems:
        found = f"{folder}: {_some(list(dict.fromkeys(problems)))}"
        return Row("shared folder", PROBLEM, found, "give --work-dir on a file system that all nodes share")
    return Row("shared folder", OK, f"all ranks see each other's files in {folder}")


def _wait_for(files: dict[int, Path]) -> list[int]:
    """Ranks whose files cannot be read within VISIBLE seconds: some file systems show new files late."""
    deadline = time.monotonic() + VISIBLE
    left = dict(files)
    while True:
        for rank, file in list(left.items()):
            os.access(file.parent, os.R_OK)
            if file.exists() and file.read_text() == str(rank):
                del left[rank]
        if not left or time.monotonic() > deadline:
            return list(left)
        time.sleep(0.1)


def _products(ranks: Ranks, device: torch.device, hosts: Sequence[str]) -> Row:
    times = ranks.gather(measure.product_seconds(device))
    usual = median(times)
    slow = [f"rank {r} on {hosts[r]} {t / usual:.2f} times" for r, t in enumerate(times) if t > SLOW_PRODUCT * usual]
    found = f"a matrix product takes {1000 * usual:.3f} ms"
    if not slow:
        return Row("compute", OK, f"{found}, on the slowest rank {1000 * max(times):.3f} ms")
    do = "GPUs: nvidia-smi -q -d CLOCK,PERFORMANCE,TEMPERATURE there; CPUs: look for other programs"
    return Row("compute", NOTE, f"{found} on the median rank; {_some(slow)} as long", do)


def _all_reduce(ranks: Ranks, device: torch.device, hosts: Sequence[str]) -> Iterator[Row]:
    latency, speed = ranks.broadcast(measure.all_reduce_speed(device))
    found = f"{speed / 1e9:.2f} GB/s each way, small messages {1e6 * latency:.0f} µs"
    yield Row("all-reduce", OK, f"all {ranks.size} ranks: {found}")
    first, group = measure.group_of_nodes(hosts)
    if len(first) == 1:
        return
    mine = measure.all_reduce_speed(device, group) if ranks.rank in first else (0.0, 0.0)
    latency, speed = ranks.broadcast(mine)
    found = f"one rank of each of {len(first)} nodes: {speed / 1e9:.2f} GB/s each way, small messages "
    found += f"{1e6 * latency:.0f} µs"
    slow = speed < FAST[device.type]
    do = "is the fast network used? NCCL_DEBUG=INFO shows NET/IB or NET/Socket; look for a slow node by halving them"
    yield Row("between nodes", NOTE if slow else OK, found, do if slow else "")


def _some(items: Sequence[str]) -> str:
    return ", ".join(items[:SHOWN]) + (f", and {len(items) - SHOWN} more" if len(items) > SHOWN else "")
