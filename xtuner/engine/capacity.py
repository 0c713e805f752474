"""Whether the state of a run can be held by the machine at all.

A GPU is asked what it has free, as the strategy does. Of host memory only what no run could get around is refused:
weights, gradients and optimizer state of all processes of this machine against all the memory that it or its container
has, whatever else uses it now.
"""

import torch

from xtuner.core.errors import ConfigError
from xtuner.core.log import human_bytes
from xtuner.core.system import sysinfo
from xtuner.dist.mesh import Mesh
from xtuner.engine import memory
from xtuner.engine.strategies.select import Choice
from xtuner.engine.zero import deepspeed_config
from xtuner.model.flops import num_parameters
from xtuner.model.source import ModelSource
from xtuner.optim.adamw import FORMS
from xtuner.optim.optim_wrapper import OptimWrapper

USUAL_GPU = 80e9  # bytes; for advice


def require(choice: Choice, source: ModelSource, optim: OptimWrapper, device: torch.device) -> None:
    """Raise ConfigError if the state cannot be held; says what it takes, what there is, and what to do."""
    if device.type == "cuda":
        memory.require(choice.state, source, device)
    total = sysinfo.memory()["total"]
    needed = _on_host(choice, source, optim, device)
    if total is not None and needed > total:
        raise _too_large(choice, source, optim, needed, total)


def why_not_alone(source: ModelSource, optim: OptimWrapper, device: torch.device) -> str:
    """In words, why one process cannot train the model on this machine; empty if it can."""
    try:
        require(Choice(memory.of_mesh(source, optim, device, Mesh()), Mesh()), source, optim, device)
    except ConfigError as e:
        return f"`xtuner train` by one process on this machine is refused: {e}"
    return ""


def _on_host(choice: Choice, source: ModelSource, optim: OptimWrapper, device: torch.device) -> int:
    """Bytes that all processes of this machine together hold at the least."""
    parameters, mesh = num_parameters(source.config), choice.mesh
    moments = optim.traits(device).moments
    zero = deepspeed_config.read(choice.deepspeed)["zero_optimization"] if choice.deepspeed else {}
    if device.type == "cuda":
        masters = 4 + moments if "offload_optimizer" in zero else 0
        return int(masters * parameters * mesh.local_size / mesh.size)
    if not (choice.deepspeed or choice.fsdp):
        form = optim.own_form(device)
        return int((form.bytes if form else 8 + moments) * parameters)
    if not choice.deepspeed:
        return choice.state * mesh.local_size
    return int((8 + moments) * parameters * mesh.local_size / (mesh.size if zero.get("stage") else 1))


def _too_large(choice: Choice, source: ModelSource, optim: OptimWrapper, needed: int, total: int) -> ConfigError:
    parameters = num_parameters(source.config)
    ways = []
    if not (choice.deepspeed or choice.fsdp) and optim.kind is torch.optim.AdamW:
        leaner = [f for f in FORMS.values() if parameters * f.bytes < min(total, needed)]
        ways += [f'optim_wrapper.states = "{f.name}" ({human_bytes(parameters * f.bytes)})' for f in leaner[:1]]
    gpus = -(-parameters * 20 // int(USUAL_GPU - 2 * memory.RESERVE))
    ways.append(f"{gpus} or more GPUs of 80 GB with --deepspeed deepspeed_zero3 or --fsdp full")
    ways.append("more machines, or one with more memory")
    return ConfigError(
        f"weights, gradients and optimizer state need {human_bytes(needed)} of this machine's memory, "
        f"which is {human_bytes(total)} in all",
        where=f"model: {parameters:,} parameters; {choice.name}, ranks: {choice.mesh.size}",
        why="the first step would run out of memory",
        do="; or ".join(ways),
    )
