"""What to do when a run has ended early, as command lines that can be run as they are."""

import copy
import shlex
from collections.abc import Callable, Iterator, Sequence

import torch

from xtuner.core import dist
from xtuner.core.errors import ConfigError, InterruptedRunError
from xtuner.core.files import MANIFEST
from xtuner.core.log import human_bytes
from xtuner.dist.mesh import Mesh
from xtuner.engine import zero_config, zero_memory
from xtuner.engine.adamw import FORMS
from xtuner.engine.choose import Choice
from xtuner.engine.memory import LEAST
from xtuner.engine.strategies.out_of_memory import OutOfMemory
from xtuner.model.flops import num_parameters
from xtuner.train.run import Run

ENGINES = (
    "deepspeed_zero1",
    "deepspeed_zero2",
    "deepspeed_zero2_offload",
    "deepspeed_zero3",
    "deepspeed_zero3_offload",
)
# `optim_wrapper.full` with each; without it stage 2 sums whole gradients, where there is memory at the start
FULL = dict.fromkeys(ENGINES) | {"deepspeed_zero2": "weights"}
OPTIONS = ("--deepspeed", "--fsdp", "--resume")  # replaced, not repeated
SHORTEST = 2048  # tokens of a pack below which shorter ones are no advice


def out_of_memory(run: Run, words: Sequence[str], choice: Choice, error: BaseException) -> ConfigError:
    """The error to end with.

    Args:
        words: what followed `xtuner train` on the command line.
        choice: what was trained with.
    """
    ranks, tokens = run.mesh.size, run.loader.dataset.packed_length
    used = _in_use(run.device)
    advice = [f"{command}\n            # {effect}" for command, effect in _advice(run, list(words), choice)]
    found = ConfigError(
        f"memory ran out in iteration {run.state.iteration + 1}{used}: {str(error).splitlines()[0][:200]}",
        where=f"{choice.name}, ranks: {ranks}, packs of {tokens:,} tokens, on {run.device}",
        why=f"weights, gradients and optimizer take {human_bytes(choice.state)} here by arithmetic; "
        "what a pack needs comes on top, the more the longer its documents",
        do="one of these, first what costs least:\n        "
        + "\n        ".join([*advice, "or more GPUs: what is divided over ranks becomes less on each"]),
    )
    found.quiet = isinstance(error, OutOfMemory) and error.rank != run.mesh.rank
    return found


def interrupted(run: Run, words: Sequence[str]) -> InterruptedRunError:
    """The error to end with after a second Ctrl-C. What a save in flight leaves must be there by now."""
    at, sealed = run.state.iteration, list(run.work_dir.glob(f"*.pth/{MANIFEST}"))
    newest = max(sealed, key=lambda manifest: manifest.stat().st_mtime, default=None)
    error = InterruptedRunError(
        f"stopped without saving, after iteration {at}",
        where=f"newest checkpoint: {newest.parent}" if newest else f"{run.work_dir}: no checkpoint was saved",
        do=f"to continue from it: {_line(list(words), ['--resume'], run.mesh)}"
        if newest
        else f"to begin again: {_line(list(words), [], run.mesh)}",
    )
    error.quiet = not dist.is_main()
    return error


def _advice(run: Run, words: list[str], choice: Choice) -> Iterator[tuple[str, str]]:
    """(command line, what it changes), what costs least first."""
    config, resume = run.config, ["--resume", "auto"]
    if not run.source.recompute and config.get("model.llm") is None:
        again = ["--cfg-options", "model.activation_checkpointing=True", *resume]
        yield _line(words, again, run.mesh), "computes each block again in the backward; the same result"
    tokens = run.loader.dataset.packed_length
    if choice.deepspeed and hasattr(run, "strategy"):  # our own has tried it
        half = min(run.strategy.memory.most or tokens, tokens) // 2
        if half >= LEAST:
            smaller = ["--cfg-options", f"optim_wrapper.micro_batch={half}", *resume]
            yield _line(words, smaller, run.mesh), "micro-batches half as long, if documents are; the same result"
    for name, state in _leaner(run, choice):
        slower = "; slower: the optimizer steps on the CPU" if "offload" in name else ""
        lean = ["--cfg-options", f"optim_wrapper.full={FULL[name]}"] if FULL[name] != run.optim.full else []
        yield (
            _line(words, ["--deepspeed", name, *lean, *resume], run.mesh),
            f"{human_bytes(state)} of state a GPU{slower}",
        )
    if not (choice.deepspeed or choice.fsdp) and run.optim.own_form(run.device) in (FORMS["fp32"], FORMS["split"]):
        size = human_bytes(num_parameters(run.source.config) * FORMS["8bit"].bytes)
        leaner = ["--cfg-options", "optim_wrapper.states=8bit"]
        yield _line(words, leaner, run.mesh), f"{size} of state; a new run, as the optimizer's state is another"
    packed, counts = config.get("max_length"), config.get("accumulative_counts")
    if isinstance(packed, int) and isinstance(counts, int) and packed // 2 >= SHORTEST:
        shorter = ["--cfg-options", f"max_length={packed // 2}", f"accumulative_counts={counts * 2}"]
        yield (
            _line(words, shorter, run.mesh),
            "half the pack, as many tokens an iteration; a new run, as packs are others",
        )


def _leaner(run: Run, choice: Choice) -> Iterator[tuple[str, int]]:
    """Settings of DeepSpeed's that need less, and bytes of state a GPU: those after the present ones, or all."""
    if run.optim.states is not FORMS["fp32"] or run.source.adapter:
        return  # not with DeepSpeed
    at = ENGINES.index(choice.deepspeed) + 1 if choice.deepspeed in ENGINES else 0
    optim = copy.copy(run.optim)
    for name in ENGINES[at:]:
        optim.full = FULL[name]
        # by arithmetic alone: the GPU is full
        state = zero_memory.zero_state(run.source, optim, run.device, run.mesh.size, zero_config.read(name))
        if state < 0.9 * choice.state or (at and state <= choice.state):
            yield name, state


def _line(words: list[str], more: list[str], mesh: Mesh) -> str:
    """The command line with `more`, which replaces what was given of the same options."""
    replaced = {"--resume", *more} | ({"--fsdp"} if "--deepspeed" in more else set())
    kept, i = [], 0
    while i < len(words):
        option, _, value = words[i].partition("=")
        i += 1
        if option not in OPTIONS or option not in replaced:
            kept.append(words[i - 1])
        elif not value and not "".join(words[i : i + 1]).startswith("-"):
            i += 1  # its value
    return shlex.join([*_started_by(words, mesh), "xtuner", "train", *kept, *more])


def _started_by(words: list[str], mesh: Mesh) -> list[str]:
    """What goes before `xtuner`, so that as many processes start again."""
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


def _in_use(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    return f" ({human_bytes(total - free)} of {human_bytes(total)} in use)"
