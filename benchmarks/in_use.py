"""How much of a GPU a run takes, by the driver's count: with libraries, and what PyTorch's allocator keeps back."""

import json
import os
import resource
from pathlib import Path

import torch

from xtuner.train.run import Hook, Iteration, Run


def in_use(device: torch.device) -> int:
    """The most bytes that were in use so far, all processes of the GPU together; on a CPU this process's.

    What the allocator had reserved at most and has given back since is added to what the driver says now.
    """
    if device.type != "cuda":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    free, total = torch.cuda.mem_get_info(device)
    returned = torch.cuda.max_memory_reserved(device) - torch.cuda.memory_reserved(device)
    return int(total - free + returned)


def most(folder: Path) -> int | None:
    """Of all ranks of a run; None if none has written it."""
    return max((json.loads(file.read_text()) for file in folder.glob("in_use-*")), default=None)


class InUseHook(Hook):
    """Each rank writes its own into `folder`, with no word to the others."""

    priority = 5

    def __init__(self, folder: str) -> None:
        self.file = Path(folder) / f"in_use-{os.environ.get('RANK', 0)}"

    def after_iteration(self, run: Run, it: Iteration) -> None:
        self.file.write_text(str(in_use(run.strategy.device)))
