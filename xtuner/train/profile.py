"""Where a GPU's time goes: kernels of a few iterations, summed up by what they are for."""

import re
import time
from typing import Any

import torch

from xtuner.core import dist
from xtuner.core.files import write_json
from xtuner.core.log import logger
from xtuner.train.run import Hook, Iteration, Run

# What a kernel is for, by its name; the first that matches.
PARTS = {
    "attention": r"flash|fmha|attention|sdpa",
    "optimizer": r"^_update$|adam|multi_tensor|foreach|lpnorm|LpNorm|l2norm",
    "matrix products": r"gemm|nvjet|cutlass|xmma|cublas|splitKreduce",
    "between ranks": r"nccl",
    "copies": r"[Mm]emcpy|[Mm]emset",
    "elementwise": r"",
}


def part_of(kernel: str) -> str:
    return next(part for part, pattern in PARTS.items() if re.search(pattern, kernel))


class ProfileHook(Hook):
    """Times every GPU kernel of `iterations` iterations, tells the sums by part, and writes them to profile.json.

    Args:
        begin: the first iteration that is timed; those before compile and fill caches.
    """

    priority = 15

    def __init__(self, begin: int = 5, iterations: int = 2) -> None:
        self.begin, self.iterations = begin, iterations
        self._profile: Any = None

    def after_iteration(self, run: Run, it: Iteration) -> None:
        if run.strategy.device.type != "cuda":
            return
        if it.state.iteration == self.begin - 1:
            torch.cuda.synchronize()
            self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self._profile.__enter__()
            self._start = time.perf_counter()
        elif it.state.iteration == self.begin - 1 + self.iterations and self._profile is not None:
            torch.cuda.synchronize()
            wall = (time.perf_counter() - self._start) / self.iterations * 1e3
            self._profile.__exit__(None, None, None)
            self._tell(run, wall)
            self._profile = None

    def _tell(self, run: Run, wall: float) -> None:
        """`wall`: ms an iteration."""
        kernels = [(e.key, e.self_device_time_total / 1e3 / self.iterations) for e in self._profile.key_averages()]
        kernels = sorted(((k, ms) for k, ms in kernels if ms), key=lambda pair: -pair[1])
        sums = dict.fromkeys(PARTS, 0.0)
        for kernel, ms in kernels:
            sums[part_of(kernel)] += ms
        sums["idle"] = max(wall - sum(sums.values()), 0.0)
        shown = "\n".join(f"  {part:<16} {ms:9.1f} ms {100 * ms / wall:5.1f} %" for part, ms in sums.items() if ms)
        longest = "\n".join(f"  {ms:9.1f} ms  {kernel[:90]}" for kernel, ms in kernels[:12])
        logger.info(f"an iteration of {wall:.1f} ms on the GPU, by part\n{shown}\nthe longest kernels\n{longest}")
        if dist.is_main():
            write_json(run.log.parent / "profile.json", {"ms": wall, "parts": sums, "kernels": dict(kernels[:40])})
