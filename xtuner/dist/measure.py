"""Measure an allocation: clocks, all-reduce, and a matrix product on each rank."""

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
import torch.distributed as torch_dist

from xtuner.dist.collectives import Ranks

REPEATS = 5
BYTES = {"cuda": 256 * 2**20, "cpu": 4 * 2**20}
SIZE = {"cuda": 8192, "cpu": 256}  # rows of the product's matrices


def group_of_nodes(hosts: Sequence[str]) -> tuple[list[int], Any]:
    """The first rank of each host, and their process group. All ranks call it together."""
    first = [hosts.index(host) for host in dict.fromkeys(hosts)]
    return first, torch_dist.new_group(first)


def clock_offsets(ranks: Ranks) -> list[float]:
    """Seconds by which each rank's clock is ahead of rank 0's, as far as a barrier ends on all ranks at once: of
    several tries the one with the least spread."""
    tries = []
    for _ in range(REPEATS):
        torch_dist.barrier()
        clocks = ranks.gather(time.time())
        tries.append([clock - clocks[0] for clock in clocks])
    return min(tries, key=lambda offsets: max(offsets) - min(offsets))


def all_reduce_speed(device: torch.device, group: Any = None) -> tuple[float, float]:
    """(seconds of a small message, bytes per second each way of a large one) on the ranks of `group`, which call it."""
    size = torch_dist.get_world_size(group)
    count = BYTES[device.type] // 4
    small, large = torch.ones(2, device=device), torch.ones(count, device=device)
    latency = _time(lambda: torch_dist.all_reduce(small, group=group), device)
    seconds = _time(lambda: torch_dist.all_reduce(large, group=group), device)
    return latency, 2 * (size - 1) / size * 4 * count / seconds


def product_seconds(device: torch.device) -> float:
    """Of a matrix product in the dtype of training, after some of them: a GPU is warm then."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    matrix = torch.ones(SIZE[device.type], SIZE[device.type], device=device, dtype=dtype)
    for _ in range(10 * REPEATS):
        torch.mm(matrix, matrix)
    return _time(lambda: torch.mm(matrix, matrix), device)


def _time(action: Any, device: torch.device) -> float:
    """Median seconds, after one that is not counted."""
    found = []
    for _ in range(REPEATS + 1):
        begin = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - begin)
    return median(found[1:])
