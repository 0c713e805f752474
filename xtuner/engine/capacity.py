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
from xtuner.engine.long_documents import longest_that_fits
from xtuner.engine.strategies.select import Choice
from xtuner.engine.zero import deepspeed_config
from xtuner.model.flops import num_parameters
from xtuner.model.source import ModelSource
from xtuner.optim.adamw import FORMS
from xtuner.optim.optim_wrapper import OptimWrapper

TYPICAL_GPU_BYTES = 80e9  # for advice
SHARERS = [2**i for i in range(1, 9)]


def require_capacity(
    choice: Choice, source: ModelSource, optim: OptimWrapper, device: torch.device, length_key: str = "max_length"
) -> None:
    """Raise ConfigError if the state or the longest document does not fit, with what it needs, what there is, and what
    to do.

    Args:
        length_key: name of the setting of packs' length.
    """
    if device.type == "cuda":
        memory.require_free(choice.state, source, device)
        plan = choice.memory
        if not plan.fits(plan.longest_row):
            raise _too_long(plan, choice.mesh, source, optim, device, length_key)
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
    moments, trained = optim.traits(device).moments, source.count_trained().total
    zero = deepspeed_config.read_settings(choice.deepspeed)["zero_optimization"] if choice.deepspeed else {}
    if device.type == "cuda":
        masters = 4 + moments if "offload_optimizer" in zero else 0
        return int(masters * trained * mesh.local_size / mesh.size)
    if not (choice.deepspeed or choice.fsdp):
        form = optim.state_form(device)
        weight, all_of_it = (2, form.bytes) if form else (4, 8 + moments)  # bytes of a parameter; with its state
        held = source.count_weight_bytes(torch.bfloat16 if form else torch.float32)
        return int(held.total + held.read_back + (all_of_it - weight) * trained)
    if not choice.deepspeed:
        return choice.state * mesh.local_size
    total = 4 * parameters + (4 + moments) * trained
    return int(total * mesh.local_size / (mesh.size if zero.get("stage") else 1))


def _too_large(choice: Choice, source: ModelSource, optim: OptimWrapper, needed: int, total: int) -> ConfigError:
    parameters = num_parameters(source.config)
    advice = []
    if smaller := memory.smaller_frozen_weights(source):
        advice.append(smaller)
    elif not (choice.deepspeed or choice.fsdp) and optim.optimizer_class is torch.optim.AdamW and not source.adapter:
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


def _too_long(
    plan: memory.MemoryPlan, mesh: Mesh, source: ModelSource, optim: OptimWrapper, device: torch.device, key: str
) -> ConfigError:
    """The error for documents that do not fit, even if everything is recomputed; `key` limits their length."""
    kept, document = plan.activations, plan.document
    room, advice = kept.room or 0, []
    free = plan.state + room + memory.RESERVE_BYTES + memory.COLLECTIVE_BYTES * (mesh.size > 1)
    for sharers in [n for n in SHARERS if n > mesh.cp]:
        other, row = Mesh(cp=sharers, local_size=min(sharers, mesh.local_size)), -(-document // sharers)
        found = memory.plan_memory(source, optim, device, other, row, free, document=document, host=kept.host)
        if found.fits(row):
            advice.append(f"sequence_parallel_size = {sharers}, on as many ranks or a multiple")
            break
    leanest = min(FORMS.values(), key=lambda form: form.bytes)
    if optim.optimizer_class is torch.optim.AdamW and optim.states.bytes > leanest.bytes:
        saved = (optim.states.bytes - leanest.bytes) * num_parameters(source.config) // mesh.shard_size
        advice.append(f'optim_wrapper.states = "{leanest.name}", which frees up to {human_bytes(saved)} on each GPU')
    if fitting := longest_that_fits(kept):
        advice.append(f"{key} = {fitting * mesh.cp} or less, which cuts longer documents")
    on_host = f" and {human_bytes(kept.host)} of host memory" if kept.host else ""
    return ConfigError(
        f"a document of {document:,} tokens needs {human_bytes(kept.peak_bytes(plan.longest_row))} for activations on "
        f"each GPU if as little as possible is kept there; {human_bytes(room)}{on_host} are left by "
        f"{human_bytes(plan.state)} of state",
        where=f"{key}: packs have documents of up to {document:,} tokens, each shared by {mesh.cp} "
        f"{'rank' if mesh.cp == 1 else 'ranks'}",
        why="a document cannot be divided into micro-batches, and the first iteration would run out of memory",
        do="; or ".join(advice) or "use GPUs with more memory",
    )
