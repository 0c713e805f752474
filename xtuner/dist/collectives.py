"""The ranks of a run, and small messages between them. A single process is rank 0 of 1.

Messages are JSON, not pickles, so that a message cannot run code.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from xtuner.core.activity import record_progress
from xtuner.core.errors import CheckpointError, XTunerError

T = TypeVar("T")


class Ranks:
    """A group of all processes of the run.

    All ranks must call the collectives of one group in the same order. A background thread therefore needs its own
    group (`new_group`).
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group

    @property
    def rank(self) -> int:
        return _distributed().get_rank() if _started() else 0

    @property
    def size(self) -> int:
        return _distributed().get_world_size() if _started() else 1

    @property
    def is_main(self) -> bool:
        """True on the one process that prints and writes shared files."""
        return self.rank == 0

    def new_group(self) -> "Ranks":
        """A new gloo group, for collectives of another thread."""
        return Ranks(_distributed().new_group(backend="gloo")) if self.size > 1 else Ranks()

    def gather(self, value: Any) -> list[Any]:
        """The JSON values of all ranks, in the order of ranks, on every rank."""
        if self.size == 1:
            return [value]
        import torch

        record_progress("all_gather of a message")
        distributed = _distributed()
        raw = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        distributed.all_gather(lengths, torch.tensor([len(raw)]), group=self._group)
        longest = max(int(n) for n in lengths)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(raw)] = raw
        texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        distributed.all_gather(texts, padded, group=self._group)
        return [json.loads(bytes(t[: int(n)].tolist())) for t, n in zip(texts, lengths, strict=True)]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's JSON value, on every rank."""
        return self.gather(value if self.is_main else None)[0]

    def run_on_all(self, action: Callable[[], T]) -> T:
        """Run `action`, which must not communicate, on every rank. Returns this rank's result.

        If it raises an error for users on any rank, the first of these errors is raised on all ranks.
        """
        if self.size == 1:
            return action()
        outcome, failure = attempt(action)
        failures = self.gather(failure)
        for rank, error in enumerate(failures):
            if error is not None:
                raise restore_error(error, reported_elsewhere=rank != self.rank)
        assert outcome is not None
        return outcome[0]

    def run_on_main(self, action: Callable[[], Any]) -> Any:
        """Run `action` on rank 0 only. Returns its JSON result, or raises its error for users, on all ranks."""
        value = self.run_on_all(lambda: action() if self.is_main else None)
        return value if self.size == 1 else self.broadcast(value)

    def sum(self, value: float) -> float:
        """Sum of a number over all ranks, exact for integers below 2**53."""
        if self.size == 1:
            return value
        import torch

        record_progress("all_reduce of a sum")
        total = torch.tensor([value], dtype=torch.float64)
        _distributed().all_reduce(total, group=self._group)
        return float(total)

    def sum_on_device(self, value: Any) -> Any:
        """Sum of a small tensor over all ranks, as a list; reduced on its own device, not on the host."""
        total = value.double().clone()
        if self.size > 1:
            record_progress("all_reduce of a sum")
            _distributed().all_reduce(total, group=self._group)
        return total.tolist()

    def sums_and_maxima(self, sums: Sequence[float], values: Sequence[int]) -> tuple[list[float], list[int]]:
        """Over all ranks, the sums of `sums` and the maxima of `values`, in one all-reduce.

        The lengths must be equal on all ranks. Sums are exact for integers below 2**53; `values` are 0 or more.
        """
        if self.size == 1:
            return list(sums), list(values)
        import torch

        record_progress("all_reduce of sums and maxima")
        distributed = _distributed()
        # A maximum from a sum: with a base above `size`, lower powers never add up to the next power
        bits = self.size.bit_length()
        powers = [2.0 ** (bits * v) if bits * v < 960 else math.inf for v in values]
        totals = torch.tensor([*sums, *powers], dtype=torch.float64)
        distributed.all_reduce(totals, group=self._group)
        found, powers = totals[: len(sums)].tolist(), totals[len(sums) :].tolist()
        if math.inf not in powers:
            return found, [(math.frexp(power)[1] - 1) // bits for power in powers]
        largest = torch.tensor(values, dtype=torch.int64)
        distributed.all_reduce(largest, distributed.ReduceOp.MAX, group=self._group)
        return found, largest.tolist()

    def broadcast_int(self, value: int) -> int:
        """Rank 0's number, on every rank."""
        if self.size == 1:
            return value
        import torch

        record_progress("broadcast of a number")
        number = torch.tensor([value])
        _distributed().broadcast(number, 0, group=self._group)
        return int(number)

    def reduce(self, tensor: Any, to: int) -> None:
        """Sum a tensor over all ranks into that of rank `to`; it becomes undefined on the other ranks."""
        record_progress(f"reduce of {tensor.numel():,} elements to rank {to}")
        _distributed().reduce(tensor, to, group=self._group)


def attempt(action: Callable[[], T]) -> tuple[tuple[T] | None, dict[str, str] | None]:
    """((result,), None), or (None, the error for users as JSON). An OSError becomes a CheckpointError."""
    try:
        return (action(),), None
    except XTunerError as e:
        kind, error = type(e).__name__, e
    except OSError as e:
        kind, error = "CheckpointError", CheckpointError(str(e))
    return None, {"kind": kind, "what": error.what, "where": error.where, "why": error.why, "do": error.do}


def restore_error(failure: dict[str, str], reported_elsewhere: bool) -> XTunerError:
    """The error that `attempt` caught, from JSON; `reported_elsewhere`: it is another rank's, which reports it."""
    kinds = {kind.__name__: kind for kind in XTunerError.__subclasses__()}
    kind, what = failure["kind"], failure["what"]
    error = kinds[kind](what, where=failure["where"], why=failure["why"], do=failure["do"])
    error.reported_elsewhere = reported_elsewhere
    return error


ALL = Ranks()


def rank() -> int:
    return ALL.rank


def local_world_size() -> int:
    """Ranks on this machine, as set by the launcher or by dist/process_group.py."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main() -> bool:
    return ALL.is_main


def _distributed() -> Any:
    from torch import distributed

    return distributed


def _started() -> bool:
    torch = sys.modules.get("torch")  # not imported: there is no process group
    return bool(torch and torch.distributed.is_available() and torch.distributed.is_initialized())
