"""GPU memory that a run uses as the driver counts it: including libraries and PyTorch's cached memory."""

import json
import os
import resource
from pathlib import Path

import torch

from xtuner.train.run import Hook, Iteration, Run


def in_use(device: torch.device) -> int:
    """Peak bytes in use so far by all processes of the GPU; on a CPU by this process.

    That is the driver's present value plus what PyTorch's allocator has returned since its peak.
    """
    if device.type != "cuda":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    free, total = torch.cuda.mem_get_info(device)
    returned = torch.cuda.max_memory_reserved(device) - torch.cuda.memory_reserved(device)
    return int(total - free + returned)


def read_most_in_use(folder: Path) -> int | None:
    """The largest value of any rank of a run; None if no rank has written one."""
    return max((json.loads(file.read_text()) for file in folder.glob("in_use-*")), default=None)


class GpuMemoryHook(Hook):
    """Each rank writes its own peak into `folder`, without communication."""

    priority = 5

    def __init__(self, folder: str) -> None:
        self.file = Path(folder) / f"in_use-{os.environ.get('RANK', 0)}"

    def after_iteration(self, run: Run, it: Iteration) -> None:
        partial = self.file.with_name(f"writing-{self.file.name}")  # the run may be killed at any moment
        partial.write_text(str(in_use(run.strategy.device)))
        partial.replace(self.file)
