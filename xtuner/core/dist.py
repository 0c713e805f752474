"""Who am I among the processes of this run. One process is the case with rank 0 of 1."""

import os


def rank() -> int:
    return int(os.environ.get("RANK", "0")) if _started() else 0


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1")) if _started() else 1


def is_main() -> bool:
    """True on the one process that prints and writes shared files."""
    return rank() == 0


def _started() -> bool:
    import sys

    torch = sys.modules.get("torch")  # not imported yet: no process group either
    return bool(torch and torch.distributed.is_available() and torch.distributed.is_initialized())


def all_sum(value: int) -> int:
    """Sum of an integer over all ranks; the same number on each."""
    if world_size() == 1:
        return value
    import torch

    total = torch.tensor([value], dtype=torch.int64)
    torch.distributed.all_reduce(total)
    return int(total.item())
