"""Will training work on this machine? One row per check; the checks need neither a config nor a GPU.

Installed versions are compared with the minimum versions of pyproject.toml, hardware and limits with what training
needs, and each device runs a small computation. An exception in a check is reported as a problem; the others still run.
"""

import importlib
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from xtuner.core.log import human_bytes
from xtuner.core.system import disk, sysinfo

OK, NOTE, PROBLEM = "ok", "note", "problem"
PYTHON = (3, 11)
SAFE_TORCH = (2, 10)  # older versions run code from files (CVE-2025-32434, CVE-2026-24747)
GIB = 2**30
CHECKPOINT = 21.1 * GIB  # of the 1.8B model with its optimizer
HEAD_DIM = 128  # of all InternLM2 models
ENOUGH = {"memory": 8 * GIB, "shm": GIB, "files": 4096, "speed": 100e6}  # below: a note
SPEED_BYTES = 128 * 2**20
USES = {  # optional packages
    "deepspeed": "training by ZeRO over several GPUs",
    "matplotlib": "the pictures of `xtuner plot-loss`",
    "transformers": "testing exported models; not needed for training",
}
WITH_TORCH = {"gpu", "cuda", "nccl", "cpu", "self-test"}


@dataclass(frozen=True)
class Row:
    name: str
    state: str
    found: str
    do: str = ""


def _row(name: str, bad: bool, found: str, do: str, state: str = NOTE) -> Row:
    """`do` and `state` apply if the check is `bad`."""
    return Row(name, state if bad else OK, found, do if bad else "")


def examine(work_dir: Path, step: Callable[[int], object] = lambda done: None) -> Iterator[Row]:
    """All checks in turn. `step` is called with the number of bytes that the disk test has processed."""
    checks: list[tuple[str, Callable[[], Iterator[Row]]]] = [
        ("python", _python), ("packages", _packages), ("gpu", _gpus), ("cuda", _cuda), ("nccl", _nccl),
        ("cpu", _cpus), ("memory", _memory), ("/dev/shm", _shared_memory), ("open files", _open_files),
        ("work dir", lambda: _work_dir(work_dir, step)), ("variables", _variables), ("self-test", _self_test),
    ]  # fmt: skip
    for name, check in checks:
        if name in WITH_TORCH and "torch" not in sys.modules:  # absent or broken, as its row reports
            continue
        try:
            yield from check()
        except Exception as e:
            yield Row(name, PROBLEM, f"cannot be checked: {type(e).__name__}: {e}")


def _python() -> Iterator[Row]:
    do = f"install Python {PYTHON[0]}.{PYTHON[1]} or newer"
    yield _row("python", sys.version_info < PYTHON, sys.version.split()[0], do, PROBLEM)


def _packages() -> Iterator[Row]:
    for name, floor in sysinfo.requirements().items():
        version = sysinfo.installed(name)
        do = f"pip install '{name}>={floor}'"
        if version is None:
            yield Row(name, PROBLEM, "not installed", do)
        elif name == "torch" and sysinfo.release(version) < SAFE_TORCH:
            yield Row(name, PROBLEM, f"{version} can run code hidden in checkpoint files (CVE-2025-32434)", do)
        elif sysinfo.release(version) < sysinfo.release(floor):
            yield Row(name, PROBLEM, f"{version} is older than {floor}", do)
        else:
            try:
                importlib.import_module(name)
                yield Row(name, OK, version)
            except Exception as e:
                found = f"{version} cannot be imported: {type(e).__name__}: {e}"
                yield Row(name, PROBLEM, found, f"pip install --force-reinstall '{name}>={floor}'")
    for name, use in USES.items():
        version = sysinfo.installed(name)
        yield _row(name, not version, f"{version or 'not installed'}, for {use}", f"if you want it: pip install {name}")


def _gpus() -> Iterator[Row]:
    import torch

    driver = sysinfo.driver_version()
    found = sysinfo.gpus()
    for i, gpu in enumerate(found):
        facts = f"{gpu['name']}, {human_bytes(gpu['memory'])}, capability {gpu['capability']}"
        facts += f", driver {driver}" if driver else ""
        support = "bf16" if gpu["bf16"] else "no bf16 (which needs capability 8.0)"
        do = "train in fp32: --cfg-options optim_wrapper.dtype=fp32"
        yield _row(f"gpu {i}", not gpu["bf16"], f"{facts}, {support}", do, PROBLEM)
    if found:
        return
    if driver is None:
        yield Row("gpu", NOTE, "none: training runs on the CPU, which is enough only for tiny models")
    elif os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        yield Row(
            "gpu", NOTE, f"driver {driver}, but CUDA_VISIBLE_DEVICES hides every GPU", "unset it to train on them"
        )
    elif torch.version.cuda is None:
        built = f"torch {torch.__version__} is a build without CUDA"
        yield Row("gpu", PROBLEM, f"driver {driver}, but {built}", "install torch from PyPI, not from the CPU index")
    else:
        try:
            torch.cuda.init()
            why = "it finds none"
        except Exception as e:
            why = str(e)
        yield Row("gpu", PROBLEM, f"driver {driver}, but torch sees no GPU: {why}", "check with nvidia-smi")


def _cuda() -> Iterator[Row]:
    import torch

    built, served = torch.version.cuda, sysinfo.driver_cuda()
    if built is None:
        yield Row("cuda", NOTE, f"torch {torch.__version__} is built without CUDA")
    elif served is None:
        yield Row("cuda", NOTE, f"torch is built for {built}; there is no driver")
    else:
        both = f"torch is built for {built}, the driver supports up to {served[0]}.{served[1]}"
        wanted = sysinfo.release(built)
        if wanted[0] > served[0]:
            yield Row("cuda", PROBLEM, both, f"update the driver, or install a torch built for CUDA {served[0]}")
        else:
            # within a major version older drivers usually work
            yield _row("cuda", wanted > served, both, "update the driver if kernels fail")


def _nccl() -> Iterator[Row]:
    version = sysinfo.nccl_version()
    yield _row("nccl", not version, version or "none in this torch: needed only for several GPUs", "")


def _cpus() -> Iterator[Row]:
    import torch

    usable, threads = sysinfo.usable_cpus(), torch.get_num_threads()
    requested = os.environ.get("OMP_NUM_THREADS")
    found = f"{usable} usable of {os.cpu_count()}, torch uses {threads} threads"
    found += f" (OMP_NUM_THREADS={requested})" if requested else ""
    yield _row("cpu", threads > usable, found, f"export OMP_NUM_THREADS={usable}")


def _memory() -> Iterator[Row]:
    total, free = sysinfo.memory().values()
    if total is None or free is None:
        yield Row("memory", NOTE, "unknown")
        return
    found = f"{human_bytes(total)}, {human_bytes(free)} free"
    yield _row("memory", total < ENOUGH["memory"], found, "enough only for tiny models")


def _shared_memory() -> Iterator[Row]:
    if not Path("/dev/shm").is_dir():
        yield Row("/dev/shm", NOTE, "none: keep num_workers = 0")
        return
    total, _, free = shutil.disk_usage("/dev/shm")
    do = "workers and NCCL use it: start the container with --shm-size=8g or --ipc=host"
    yield _row("/dev/shm", total < ENOUGH["shm"], f"{human_bytes(total)}, {human_bytes(free)} free", do)


def _open_files() -> Iterator[Row]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limits = [("unlimited" if n == resource.RLIM_INFINITY else f"{n:,}") for n in (soft, hard)]
    do = f"with many workers: ulimit -n {hard if 0 <= hard < 65536 else 65536}"
    yield _row("open files", 0 <= soft < ENOUGH["files"], f"{limits[0]} (at most {limits[1]})", do)


def _work_dir(wanted: Path, step: Callable[[int], object]) -> Iterator[Row]:
    folder = disk.nearest_existing(wanted)
    free = shutil.disk_usage(folder).free
    do = f"a checkpoint of the 1.8B model takes {human_bytes(CHECKPOINT)}: give --work-dir on a larger disk"
    found = f"{human_bytes(free)} free in {folder}"
    yield _row("work dir", free < CHECKPOINT, found, do, PROBLEM if free < GIB / 4 else NOTE)
    try:
        with tempfile.TemporaryDirectory(prefix=".xtuner-doctor-", dir=folder) as scratch:
            broken = list(disk.find_broken_guarantees(Path(scratch)))
            found = "; ".join(broken) or "hard links, rename and fsync work"
            yield _row("locks", bool(broken), found, "give --work-dir on another file system", PROBLEM)
            write, read = disk.measure_speed(Path(scratch), min(SPEED_BYTES, free // 10), step)
    except OSError as e:
        yield Row("work dir", PROBLEM, f"{folder} cannot be written: {e.strerror}", "give another --work-dir")
        return
    do = f"a checkpoint of the 1.8B model takes {CHECKPOINT / max(write, 1) / 60:.0f} minutes: give a faster disk"
    found = f"writes {write / 1e6:,.0f} MB/s (with fsync), reads {read / 1e6:,.0f} MB/s"
    yield _row("disk speed", write < ENOUGH["speed"], found, do)


def _variables() -> Iterator[Row]:
    given = sysinfo.variables()
    offline = given.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")
    found = ", ".join(f"{name}={value}" for name, value in given.items())
    do = "HF_HUB_OFFLINE is set: models come only from the cache or a folder"
    yield _row("variables", offline, found or "none that are relevant", do)


def _self_test() -> Iterator[Row]:
    import torch

    from xtuner.model.attention import BACKENDS, to_install
    from xtuner.model.selftest import TOLERANCE, matmul_error, packed_error

    for name in ["cpu", *(f"cuda:{i}" for i in range(len(sysinfo.gpus())))]:
        device = torch.device(name)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        backend, error = packed_error(device, dtype)
        precision = str(dtype).removeprefix("torch.")
        found = f"{precision} gradients, attention by {BACKENDS[backend].about}, error {error:.1e}"
        do = "do not train on it: reinstall torch, or check the hardware"
        yield _row(f"test {name}", not error < TOLERANCE[dtype], found, do, PROBLEM)
        if better := to_install(device, dtype, HEAD_DIM):
            yield Row(f"fast {name}", NOTE, f"{better.about} is faster, but not installed", better.install)
        product = matmul_error(device)
        found = f"matrix product, error {product:.1e}"
        wrong = not product < TOLERANCE[torch.bfloat16]
        yield _row(f"bf16 {name}", wrong, found, "do not train in bf16 on it", PROBLEM)
