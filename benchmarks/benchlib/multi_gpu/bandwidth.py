"""Bandwidth of collectives between the GPUs of one host, and how much a concurrent one slows down a matrix product.

NVLink multicast is off (NCCL_NVLS_ENABLE=0). On CPUs, with gloo, the numbers only show that it runs.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from benchlib.workloads import add_to_python_path

from xtuner.engine.prediction import bus_bytes

MIB = 2**20
SIZES = [MIB << i for i in range(0, 11, 2)]  # 1 MiB … 1 GiB
TINY = [MIB >> 4, MIB]
OFF = {"NCCL_NVLS_ENABLE": "0"}


def measure(gpus: int, tiny: bool = False) -> dict[str, Any]:
    """Start one process per GPU; returns the results of rank 0."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "benchlib.multi_gpu.bandwidth"]
        environ = add_to_python_path(os.environ) | OFF | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        ranks = [
            subprocess.Popen([*words, str(rank), str(gpus), folder, str(int(tiny))], env=environ)
            for rank in range(gpus)
        ]
        while any(rank.poll() is None for rank in ranks) and not any(rank.returncode for rank in ranks):
            time.sleep(0.05)
        if failed := [i for i, rank in enumerate(ranks) if rank.returncode]:
            for rank in ranks:  # the others wait for it
                rank.kill()
            raise SystemExit(f"collectives of {gpus} processes: rank {failed[0]} failed, see above")
        return json.loads((Path(folder) / "found.json").read_text())


def worker(rank: int, ranks: int, folder: Path, tiny: bool) -> None:
    """The work of each process; rank 0 writes `found.json`."""
    warnings.filterwarnings("ignore", r"`torch.distributed.\w+` is deprecated", FutureWarning)  # 2.11 has no others
    on_gpu = torch.cuda.is_available() and not tiny
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks
    )
    times = 3 if tiny else 10
    found: dict[str, Any] = {
        "ranks": ranks,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "backend": dist.get_backend(),
        "nvls": os.environ.get("NCCL_NVLS_ENABLE"),
        "torch": torch.__version__,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else None,
        "date": time.strftime("%Y-%m-%d"),
        "bytes_per_s": {},
    }
    for name in ("all_reduce", "all_gather", "reduce_scatter"):
        found["bytes_per_s"][name] = reached = {}
        for size in TINY if tiny else SIZES:
            seconds = _seconds(_collective(name, size, ranks, device), times, device)
            reached[str(size)] = bus_bytes(name, size, ranks) / seconds
    found["slowdown"] = _slowdown(ranks, device, tiny)
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _collective(name: str, size: int, ranks: int, device: torch.device) -> Callable[[], Any]:
    """A collective on a full tensor of `size` bytes, in the dtype of training: weights bf16, gradients fp32."""
    dtype = torch.bfloat16 if name == "all_gather" else torch.float32
    count = size // dtype.itemsize // ranks * ranks
    whole = torch.zeros(count, dtype=dtype, device=device)
    part = torch.zeros(count // ranks, dtype=dtype, device=device)
    if name == "all_reduce":
        return lambda: dist.all_reduce(whole, async_op=True)
    if name == "all_gather":
        return lambda: dist.all_gather_into_tensor(whole, part, async_op=True)
    return lambda: dist.reduce_scatter_tensor(part, whole, async_op=True)


def _seconds(work: Callable[[], Any], times: int, device: torch.device) -> float:
    """Seconds per call on the slowest rank, after one warm-up call."""
    work().wait()
    _wait(device)
    dist.barrier()
    begin = time.perf_counter()
    for handle in [work() for _ in range(times)]:
        handle.wait()
    _wait(device)
    spent = torch.tensor((time.perf_counter() - begin) / times, device=device)
    dist.all_reduce(spent, op=dist.ReduceOp.MAX)
    return float(spent)


def _slowdown(ranks: int, device: torch.device, tiny: bool) -> float:
    """How much longer a matrix product takes next to a collective, as a share of the collective's time.

    Collectives use some of a GPU's multiprocessors and memory bandwidth: hidden ones are not free.
    """
    n = 256 if tiny else 8192
    a = torch.randn(n, n, device=device, dtype=torch.float32 if tiny else torch.bfloat16)
    size = (TINY if tiny else SIZES)[-1]
    gather = _collective("all_gather", size, ranks, device)
    alone = _seconds(gather, 4, device)
    products = max(1, round(2 * alone / _spent(lambda: a @ a, device)))

    def multiply() -> None:
        for _ in range(products):
            a @ a

    def both() -> None:
        handle = gather()
        multiply()
        handle.wait()

    dist.barrier()
    usual = _spent(multiply, device)
    dist.barrier()
    return max(0.0, _spent(both, device) - usual) / alone


def _spent(work: Callable[[], Any], device: torch.device) -> float:
    work()
    _wait(device)
    begin = time.perf_counter()
    for _ in range(5):
        work()
    _wait(device)
    return (time.perf_counter() - begin) / 5


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(found: dict[str, Any]) -> str:
    """Bus bandwidth, one row per size."""
    names = list(found["bytes_per_s"])
    lines = [
        f"{found['ranks']} × {found['device']}, {found['backend']}, NVLink multicast off; GB/s each way",
        f"A concurrent matrix product takes longer by {found['slowdown']:.0%} of the collective's time.",
        "",
        "| MiB | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
    ]
    for size in found["bytes_per_s"][names[0]]:
        cells = [f"{found['bytes_per_s'][name][size] / 1e9:.1f}" for name in names]
        lines.append(f"| {int(size) / MIB:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) != 5:
        raise SystemExit("this is one process of `multi_gpu.py bandwidth`")
    worker(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4] == "1")
