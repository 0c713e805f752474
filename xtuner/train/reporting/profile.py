"""Where a GPU's time goes: kernel times of a few iterations, summed by purpose."""

import re
import time
from collections.abc import Mapping

import torch

from xtuner.core.files import write_json
from xtuner.core.log import logger
from xtuner.dist import collectives
from xtuner.train.run import Hook, Iteration, Run

# The purpose of a kernel by its name: the first pattern that matches. Kernels that torch.compile fuses around attention
# have it in their names, but are elementwise.
PARTS = {
    "attention": r"^(?!triton_(poi|red|per)_).*(flash|fmha|attention|sdpa)",
    "optimizer": r"^_update$|adam|multi_tensor|foreach|lpnorm|LpNorm|l2norm",
    "matrix products": r"gemm|nvjet|cutlass|xmma|cublas|splitKreduce",
    "between ranks": r"nccl",
    "copies": r"[Mm]emcpy|[Mm]emset",
    "elementwise": r"",
}


def classify_kernel(kernel: str) -> str:
    return next(part for part, pattern in PARTS.items() if re.search(pattern, kernel))


def sum_by_part(kernels: Mapping[str, float], wall: float) -> dict[str, float]:
    """Sums of `kernels` (ms by name) by part; "idle" is the rest of `wall` (ms)."""
    sums = dict.fromkeys(PARTS, 0.0)
    for kernel, ms in kernels.items():
        sums[classify_kernel(kernel)] += ms
    return {**sums, "idle": max(wall - sum(sums.values()), 0.0)}


class KernelTimer:
    """Times every GPU kernel from its construction to `stop`."""

    def __init__(self) -> None:
        torch.cuda.synchronize()
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self._profile.__enter__()
        self._start = time.perf_counter()

    def stop(self) -> tuple[dict[str, float], float]:
        """(ms by kernel, the longest first; ms of wall time)."""
        torch.cuda.synchronize()
        wall = (time.perf_counter() - self._start) * 1e3
        self._profile.__exit__(None, None, None)
        kernels = [(e.key, e.self_device_time_total / 1e3) for e in self._profile.key_averages()]
        return dict(sorted(((k, ms) for k, ms in kernels if ms), key=lambda pair: -pair[1])), wall


class ProfileHook(Hook):
    """Times every GPU kernel of `iterations` iterations, logs the sums by part and writes them to profile.json.

    Args:
        begin: the first timed iteration; earlier ones compile and fill caches.
    """

    priority = 15

    def __init__(self, begin: int = 5, iterations: int = 2) -> None:
        self.begin, self.iterations = begin, iterations
        self._timer: KernelTimer | None = None

    def after_iteration(self, run: Run, it: Iteration) -> None:
        if run.strategy.device.type != "cuda":
            return
        if it.state.iteration == self.begin - 1:
            self._timer = KernelTimer()
        elif it.state.iteration == self.begin - 1 + self.iterations and self._timer is not None:
            kernels, wall = self._timer.stop()
            self._report(run, {k: ms / self.iterations for k, ms in kernels.items()}, wall / self.iterations)
            self._timer = None

    def _report(self, run: Run, kernels: dict[str, float], wall: float) -> None:
        """Args: kernels, wall: in ms per iteration."""
        sums = sum_by_part(kernels, wall)
        shown = "\n".join(f"  {part:<16} {ms:9.1f} ms {100 * ms / wall:5.1f} %" for part, ms in sums.items() if ms)
        longest = "\n".join(f"  {ms:9.1f} ms  {kernel[:90]}" for kernel, ms in list(kernels.items())[:12])
        logger.info(f"an iteration of {wall:.1f} ms on the GPU, by part\n{shown}\nlongest kernels\n{longest}")
        if collectives.is_main():
            kept = dict(list(kernels.items())[:40])
            try:
                write_json(run.log.parent / "profile.json", {"ms": wall, "parts": sums, "kernels": kept})
            except OSError as e:
                logger.warning(f"profile.json cannot be written: {e.strerror}; its numbers are in the log")
