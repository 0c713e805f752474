"""Facts of the machine and its software: for `xtuner doctor`, and for the report kept with every run.

A fact that cannot be determined is None; no function fails because something is missing. Only functions that need torch
import it.
"""

import contextlib
import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import xtuner
from xtuner.core.secrets import mask, mask_command

CHECKOUT = Path(__file__).resolve().parents[3]
# used if installed; all other imports are required
OPTIONAL = ("deepspeed", "matplotlib", "transformers", "triton", "flash-attn-4", "nvidia-cudnn-frontend")
GIT_SECONDS = 2.0
NVIDIA_SMI_SECONDS = 5.0
# Variables that change what a run does or where it runs
VARIABLES = re.compile(
    r"(HF|HUGGINGFACE|TRANSFORMERS|NCCL|GLOO|UCX|CUDA|CUBLAS|NVIDIA|TORCH|PYTORCH|TRITON|SLURM|PBS|LSB|OMPI|PMI|PMIX|OMP|MKL"
    r"|KMP|OPENBLAS|DS|DEEPSPEED|FLASH_ATTENTION|XTUNER|TOKENIZERS|PYTHON|SAFETENSORS)_.*"
    r"|RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|NODE_RANK|NNODES|MASTER_ADDR|MASTER_PORT|PYTHONPATH|PYTHONHASHSEED"
    r"|LD_LIBRARY_PATH|LD_PRELOAD|TMPDIR|VIRTUAL_ENV|CONDA_PREFIX|(HTTPS?|ALL|NO)_PROXY|(https?|all|no)_proxy"
)


def facts(*folders: Path) -> dict[str, Any]:
    """Versions, hardware, command line, variables, and the git state of each of `folders` and of our own checkout."""
    import torch

    found_gpus = gpus()
    return {
        "xtuner": xtuner.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "torch": torch.__version__,
        "numpy": installed("numpy"),
        "packages": {name: installed(name) for name in [*requirements(), *OPTIONAL]},
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": nccl_version(),
        "driver": driver_version(),
        "gpu": found_gpus[0]["name"] if found_gpus else None,
        "gpu_count": len(found_gpus),
        "gpus": found_gpus,
        "host": platform.node(),
        "cpus": os.cpu_count(),
        "usable_cpus": usable_cpus(),
        "threads": torch.get_num_threads(),
        "memory": memory()["total"],
        "git": {str(folder): git_state(folder) for folder in folders},
        "xtuner_git": git_state(CHECKOUT) if (CHECKOUT / ".git").exists() else None,
        "variables": variables(),
        "command": mask_command(sys.argv),
    }


def installed(package: str) -> str | None:
    """The installed version, without importing the package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def requirements() -> dict[str, str]:
    """Required package → lowest version: from the checkout's pyproject.toml, else from the installed package."""
    project = CHECKOUT / "pyproject.toml"
    lines: Iterable[str] = []
    with contextlib.suppress(OSError, KeyError, tomllib.TOMLDecodeError):
        declared = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        lines = declared["dependencies"] if declared["name"] == "xtuner" else []
    if not lines:
        with contextlib.suppress(metadata.PackageNotFoundError):
            lines = [line for line in metadata.requires("xtuner") or [] if "extra ==" not in line]
    found = (re.match(r"([\w.-]+)\s*(?:>=\s*([\d.]+))?", line) for line in lines)
    return {m[1]: m[2] or "0" for m in found if m}


def release(version: str) -> tuple[int, ...]:
    """`2.13.0+cpu` → (2, 13, 0), which can be compared."""
    numbers = re.match(r"[\d.]*\d", version)
    return tuple(map(int, numbers[0].split("."))) if numbers else ()


def usable_cpus() -> int:
    """CPUs that this process may use, by its affinity and the quota of its container."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            count = min(count, max(1, round(int(quota) / int(period))))
    return count


def memory() -> dict[str, int | None]:
    """Bytes of host memory, "total" and "free", within the container's limit if there is one."""
    found: dict[str, int | None] = {"total": None, "free": None}
    with contextlib.suppress(OSError, ValueError, KeyError):
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        total, free = (int(lines[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
        found = {"total": total, "free": free}
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max" and int(limit) < total:
            used = int(Path("/sys/fs/cgroup/memory.current").read_text())
            found = {"total": int(limit), "free": min(free, max(0, int(limit) - used))}
    return found


def gpus() -> list[dict[str, Any]]:
    """GPUs that torch sees, with "name", "memory" (bytes), "capability" and "bf16"."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        facts = {"name": p.name, "memory": p.total_memory, "capability": f"{p.major}.{p.minor}"}
        found.append(facts | {"bf16": p.major >= 8 or torch.version.hip is not None})
    return found


def nccl_version() -> str | None:
    import torch

    try:
        return ".".join(map(str, torch.cuda.nccl.version()))
    except (AttributeError, RuntimeError, ImportError, TypeError):
        return None  # a build for CPUs


def driver_version() -> str | None:
    """Version of the NVIDIA kernel driver, from the driver itself or from nvidia-smi."""
    with contextlib.suppress(OSError):
        if found := re.search(r"Kernel Module\D*([\d.]+\d)", Path("/proc/driver/nvidia/version").read_text()):
            return found[1]
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    output = _output_of(words, NVIDIA_SMI_SECONDS) if shutil.which("nvidia-smi") else None
    return output.split()[0] if output and output.split() else None


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA version that the driver supports, as (12, 8); None without a driver."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        number = ctypes.c_int()  # 12080 is 12.8; 0 without a device
        cuda.cuDriverGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):
        return None
    return (number.value // 1000, number.value % 1000 // 10) if number.value else None


def variables() -> dict[str, str]:
    """Environment variables that matter, with secrets masked."""
    return {name: mask(os.environ[name], name) for name in sorted(os.environ) if VARIABLES.fullmatch(name)}


def git_state(folder: Path) -> dict[str, Any] | None:
    """{"commit", "dirty"} of the checkout that `folder` lies in: dirty if tracked files differ from the commit.

    None where there is no checkout, no git, or no answer in time. Nothing is written to the checkout.
    """
    options = ["-C", str(folder), "-c", "core.fsmonitor=false", "--no-optional-locks"]
    output = _output_of(["git", *options, "status", "--porcelain=v2", "--branch", "--untracked-files=no"], GIT_SECONDS)
    commit = re.search(r"^# branch\.oid ([0-9a-f]{40,})$", output or "", re.MULTILINE)
    if not output or not commit:
        return None
    return {"commit": commit[1], "dirty": any(not line.startswith("#") for line in output.splitlines())}


def _output_of(words: list[str], seconds: float) -> str | None:
    """What a program prints; None if it fails or takes longer than `seconds`."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}  # set in a git hook, to its repository
    env |= {"LC_ALL": "C"}
    try:
        done = subprocess.run(words, capture_output=True, timeout=seconds, stdin=subprocess.DEVNULL, env=env)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None
