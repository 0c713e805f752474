"""Advice after a run has ended early: command lines that can be run unchanged."""

import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from xtuner.core.errors import ConfigError, InterruptedRunError
from xtuner.core.files import MANIFEST
from xtuner.core.log import human_bytes
from xtuner.dist import collectives
from xtuner.dist.mesh import Mesh
from xtuner.engine.gpu_kinds import MEASURED
from xtuner.engine.memory import MIN_MICRO_BATCH, MemoryPlan, smaller_frozen_weights
from xtuner.engine.strategies.out_of_memory import OutOfMemory
from xtuner.engine.zero import deepspeed_config, zero_memory
from xtuner.model.flops import num_parameters
from xtuner.optim.adamw import FORMS
from xtuner.train.forecast.forecast import Cluster, fewest_gpus
from xtuner.train.forecast.workload import Workload, for_gpus
from xtuner.train.run import Plan, Settings

ENGINES = deepspeed_config.list_shipped()  # sorted by name, and by memory: each needs less than those before it
# The value of `optim_wrapper.full` for each; None would let stage 2 keep full gradients if memory allows at the start
FULL = dict.fromkeys(ENGINES) | {"deepspeed_zero2": "weights"}
OPTIONS = ("--deepspeed", "--fsdp", "--resume")  # replaced, not repeated
DRIVER_BYTES = 2**30  # of a GPU that processes cannot allocate
MIN_PACK_TOKENS = 2048  # shorter packs are not suggested


def out_of_memory_error(
    settings: Settings, plan: Plan, done: int, words: Sequence[str], error: BaseException, now: MemoryPlan | None = None
) -> ConfigError:
    """The error with which the run ends.

    Args:
        done: completed iterations.
        words: the command line after `xtuner train`.
        now: the latest use of memory; None if it ran out before the strategy was built.
    """
    choice, ranks, tokens = plan.choice, settings.mesh.size, settings.dataset.packed_length
    used = _describe_memory_in_use(settings.device)
    advice = [f"{command}\n            # {effect}" for command, effect in _advice(settings, plan, list(words), now)]
    found = ConfigError(
        f"memory ran out in iteration {done + 1}{used}: {str(error).splitlines()[0][:200]}",
        where=f"{choice.name}, ranks: {ranks}, packs of {tokens:,} tokens, on {settings.device}",
        why=f"weights, gradients and optimizer take {human_bytes(choice.state)} by arithmetic; "
        "activations come on top, more for longer documents",
        do="one of these, the cheapest first:\n        " + "\n        ".join([*advice, *_more_gpus(settings, plan)]),
    )
    found.reported_elsewhere = isinstance(error, OutOfMemory) and error.rank != settings.mesh.rank
    return found


def _more_gpus(settings: Settings, plan: Plan) -> Iterator[str]:
    """More GPUs, and how many fit by arithmetic."""
    yield "or more GPUs: each then holds a smaller part of the state"
    if settings.device.type != "cuda":
        return
    optim = for_gpus(settings.optim.with_accumulation(plan.accumulative_counts))
    free = torch.cuda.mem_get_info(settings.device)[1] - DRIVER_BYTES
    length, sharers = settings.dataset.packed_length, settings.mesh.cp
    document, costs = plan.choice.memory.document, np.full(1, float(length))
    work = Workload(settings.source, optim, length, document, costs, None, plan.balance, sharers, "")
    try:
        count = fewest_gpus(work, Cluster(replace(MEASURED, free=free)), settings.mesh.size)
    except ConfigError:  # no way to shard this: the error that the run ends with matters more
        return
    if count:
        name = shlex.quote(str(settings.config.path))
        yield f"    {count} such GPUs fit by arithmetic; `xtuner plan {name} --gpus {count}` predicts memory and speed"


def interrupted_error(work_dir: Path, done: int, words: Sequence[str], mesh: Mesh) -> InterruptedRunError:
    """The error with which the run ends after a second Ctrl-C. Any save in progress must have finished."""
    sealed = list(work_dir.glob(f"*.pth/{MANIFEST}"))
    newest = max(sealed, key=lambda manifest: manifest.stat().st_mtime, default=None)
    error = InterruptedRunError(
        f"stopped without saving, after iteration {done}",
        where=f"newest checkpoint: {newest.parent}" if newest else f"{work_dir}: no checkpoint was saved",
        do=f"to continue from it: {_command_line(list(words), ['--resume'], mesh)}"
        if newest
        else f"to start again: {_command_line(list(words), [], mesh)}",
    )
    error.reported_elsewhere = not collectives.is_main()
    return error


def _advice(settings: Settings, plan: Plan, words: list[str], now: MemoryPlan | None) -> Iterator[tuple[str, str]]:
    """(command line, its effect), the cheapest first."""
    config, mesh, resume = settings.config, settings.mesh, ["--resume", "auto"]
    choice, device, optim = plan.choice, settings.device, settings.optim
    if not settings.source.recompute and config.get("model.llm") is None:
        again = ["--cfg-options", "model.activation_checkpointing=True", *resume]
        yield _command_line(words, again, mesh), "recomputes each block in the backward; the same result"
    tokens = settings.dataset.packed_length
    if choice.deepspeed and now:  # our own strategies have tried it already
        half = min(now.max_tokens or tokens, tokens) // 2
        if half >= MIN_MICRO_BATCH:
            smaller = ["--cfg-options", f"optim_wrapper.micro_batch={half}", *resume]
            yield (
                _command_line(words, smaller, mesh),
                "micro-batches of half the length, where documents allow; the same result",
            )
    for name, state in _leaner_settings(settings, plan):
        slower = "; slower: the optimizer steps on the CPU" if "offload" in name else ""
        lean = ["--cfg-options", f"optim_wrapper.full={FULL[name]}"] if FULL[name] != optim.full else []
        yield (
            _command_line(words, ["--deepspeed", name, *lean, *resume], mesh),
            f"{human_bytes(state)} of state per GPU{slower}",
        )
    if lighter := smaller_frozen_weights(settings.source):
        smaller_weights = ["--cfg-options", "model.frozen_weights=nf4"]
        yield _command_line(words, smaller_weights, mesh), f"{lighter}; a new run: its results are slightly different"
    elif not (choice.deepspeed or choice.fsdp or settings.source.adapter) and optim.state_form(device) in (
        FORMS["fp32"],
        FORMS["split"],
    ):
        size = human_bytes(num_parameters(settings.source.config) * FORMS["8bit"].bytes)
        leaner = ["--cfg-options", "optim_wrapper.states=8bit"]
        yield _command_line(words, leaner, mesh), f"{size} of state; a new run: the optimizer's state is different"
    packed, counts = config.get("max_length"), config.get("accumulative_counts")
    if isinstance(packed, int) and isinstance(counts, int) and packed // 2 >= MIN_PACK_TOKENS:
        shorter = ["--cfg-options", f"max_length={packed // 2}", f"accumulative_counts={counts * 2}"]
        yield (
            _command_line(words, shorter, mesh),
            "half the pack length, as many tokens per iteration; a new run: the packs are different",
        )


def _leaner_settings(settings: Settings, plan: Plan) -> Iterator[tuple[str, int]]:
    """DeepSpeed settings that need less memory than the current strategy: (name, bytes of state per GPU)."""
    if settings.optim.states is not FORMS["fp32"] or settings.source.adapter or settings.optim.muon:
        return  # DeepSpeed does not support these
    choice, ranks = plan.choice, settings.mesh.size
    at = ENGINES.index(choice.deepspeed) + 1 if choice.deepspeed in ENGINES else 0
    optim = settings.optim.with_accumulation(plan.accumulative_counts)
    for name in ENGINES[at:]:
        optim.full = FULL[name]
        # pure arithmetic: the GPU has no free memory
        state = zero_memory.zero_state_bytes(
            settings.source, optim, settings.device, ranks, deepspeed_config.read_settings(name)
        )
        if state < 0.9 * choice.state or (at and state <= choice.state):
            yield name, state


def _command_line(words: list[str], more: list[str], mesh: Mesh) -> str:
    """The command line with `more` appended; options in `more` replace earlier ones."""
    replaced = {"--resume", *more} | ({"--fsdp"} if "--deepspeed" in more else set())
    kept, i = [], 0
    while i < len(words):
        option, _, value = words[i].partition("=")
        i += 1
        if option not in OPTIONS or option not in replaced:
            kept.append(words[i - 1])
        elif not value and not "".join(words[i : i + 1]).startswith("-"):
            i += 1  # also drop its value
    return shlex.join([*_launcher_prefix(words, mesh), "xtuner", "train", *kept, *more])


def _launcher_prefix(words: list[str], mesh: Mesh) -> list[str]:
    """The words before `xtuner` that start the same number of processes."""
    ranks, local = mesh.size, mesh.local_size
    if ranks == 1:
        return []
    launcher = next(
        (w.partition("=")[2] or words[i + 1] for i, w in enumerate(words) if w.startswith("--launcher")), ""
    )
    prefixes: dict[str, Callable[[], list[str]]] = {
        "slurm": lambda: ["srun"],
        "mpi": lambda: ["mpirun", "-n", str(ranks)],
        "pytorch": lambda: ["torchrun", f"--nproc-per-node={local}", "-m"],
    }
    return prefixes.get(launcher, lambda: [f"NPROC_PER_NODE={local}"] if ranks == local else [])()


def _describe_memory_in_use(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    return f" ({human_bytes(total - free)} of {human_bytes(total)} in use)"
