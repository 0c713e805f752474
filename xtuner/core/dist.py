"""The processes of a run, and small messages between them. One process is the case with rank 0 of 1.

Messages are JSON, not pickles: what another rank sends is data, never code.
"""

import json
import os
import sys
from typing import Any


class Ranks:
    """A group of all processes of the run.

    Collective calls must be made by all ranks in the same order within one group; a background thread therefore needs a
    group of its own (`fresh`).
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group

    @property
    def rank(self) -> int:
        return int(os.environ.get("RANK", "0")) if _started() else 0

    @property
    def size(self) -> int:
        return int(os.environ.get("WORLD_SIZE", "1")) if _started() else 1

    @property
    def is_main(self) -> bool:
        """True on the one process that prints and writes shared files."""
        return self.rank == 0

    def fresh(self) -> "Ranks":
        """A gloo group of its own for collectives of another thread."""
        if self.size == 1:
            return Ranks()
        import torch

        return Ranks(torch.distributed.new_group(backend="gloo"))

    def gather(self, value: Any) -> list[Any]:
        """Every rank's JSON value, by rank, on every rank."""
        if self.size == 1:
            return [value]
        import torch
        from torch import distributed

        raw = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        distributed.all_gather(lengths, torch.tensor([len(raw)]), group=self._group)
        longest = max(int(n) for n in lengths)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(raw)] = raw
        texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        distributed.all_gather(texts, padded, group=self._group)
        return [json.loads(bytes(t[: int(n)].tolist())) for t, n in zip(texts, lengths, strict=True)]

    def from_main(self, value: Any) -> Any:
        """Rank 0's JSON value, on every rank."""
        return self.gather(value if self.is_main else None)[0]

    def sum(self, value: float) -> float:
        """Sum of a number over all ranks, exact for integers below 2**53."""
        if self.size == 1:
            return value
        import torch
        from torch import distributed

        total = torch.tensor([value], dtype=torch.float64)
        distributed.all_reduce(total, group=self._group)
        return float(total)

    def reduce(self, tensor: Any, to: int) -> None:
        """Sum a tensor over all ranks into that of rank `to`; the others' become undefined."""
        from torch import distributed

        distributed.reduce(tensor, to, group=self._group)


ALL = Ranks()


def rank() -> int:
    return ALL.rank


def world_size() -> int:
    return ALL.size


def is_main() -> bool:
    return ALL.is_main


def all_sum(value: int) -> int:
    return int(ALL.sum(value))


def _started() -> bool:
    torch = sys.modules.get("torch")  # not imported yet: no process group either
    return bool(torch and torch.distributed.is_available() and torch.distributed.is_initialized())
