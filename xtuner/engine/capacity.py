"""Whether the state of a run fits into the machine's memory at all.

On GPUs the free memory counts, as for the strategy. For host memory the check is lenient: weights, gradients and
optimizer state of all processes of this machine against the total memory of the machine or its container, whatever else
uses it now.
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

TYPICAL_GPU_BYTES = 80e9  # for advice


def require_capacity(choice: Choice, source: ModelSource, optim: OptimWrapper, device: torch.device) -> None:
    """Raise ConfigError if the state does not fit, with what it needs, what there is, and what to do."""
    if device.type == "cuda":
        memory.require_free(choice.state, source, device)
    total = sysinfo.memory()["total"]
    needed = _on_host(choice, source, optim, device)
    if total is not None and needed > total:
        raise _too_large(choice, source, optim, needed, total)


def why_one_process_cannot(source: ModelSource, optim: OptimWrapper, device: torch.device) -> str:
    """Why one process cannot train the model on this machine, as a sentence; empty if it can."""
    try:
        require_capacity(Choice(memory.plan_memory(source, optim, device, Mesh()), Mesh()), source, optim, device)
    except ConfigError as e:
        return f"`xtuner train` by one process on this machine is refused: {e}"
    return ""


def _on_host(choice: Choice, source: ModelSource, optim: OptimWrapper, device: torch.device) -> int:
    """Bytes of host memory that all processes of this machine need at least."""
    parameters, mesh = num_parameters(source.config), choice.mesh
    moments = optim.traits(device).moments
    zero = deepspeed_config.read_settings(choice.deepspeed)["zero_optimization"] if choice.deepspeed else {}
    if device.type == "cuda":
        masters = 4 + moments if "offload_optimizer" in zero else 0
        return int(masters * parameters * mesh.local_size / mesh.size)
    if not (choice.deepspeed or choice.fsdp):
        form = optim.state_form(device)
        return int((form.bytes if form else 8 + moments) * parameters)
    if not choice.deepspeed:
        return choice.state * mesh.local_size
    return int((8 + moments) * parameters * mesh.local_size / (mesh.size if zero.get("stage") else 1))


def _too_large(choice: Choice, source: ModelSource, optim: OptimWrapper, needed: int, total: int) -> ConfigError:
    parameters = num_parameters(source.config)
    advice = []
    if not (choice.deepspeed or choice.fsdp) and optim.optimizer_class is torch.optim.AdamW:
        leaner = [f for f in FORMS.values() if parameters * f.bytes < min(total, needed)]
        advice += [f'optim_wrapper.states = "{f.name}" ({human_bytes(parameters * f.bytes)})' for f in leaner[:1]]
    gpus = -(-parameters * 20 // int(TYPICAL_GPU_BYTES - 2 * memory.RESERVE_BYTES))
    advice.append(f"{gpus} or more GPUs of 80 GB with --deepspeed deepspeed_zero3 or --fsdp full")
    advice.append("more machines, or one with more memory")
    return ConfigError(
        f"weights, gradients and optimizer state need {human_bytes(needed)} of this machine's memory, "
        f"which is {human_bytes(total)} in all",
        where=f"model: {parameters:,} parameters; {choice.name}, ranks: {choice.mesh.size}",
        why="the first step would run out of memory",
        do="; or ".join(advice),
    )
