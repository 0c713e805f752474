"""Planning a GPU's memory: weights and optimizer state first, the rest for micro-batches.

    free at the start = state + reserve + room;   a micro-batch gets the room

The plan says what every rank keeps full, how large micro-batches are, and what is recomputed. Of the plans that fit,
the one with the lowest estimated time is chosen (step_time.py). For documents longer than a micro-batch less is kept
(model/activation_memory.py, long_documents.py). Memory is not planned on CPUs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from xtuner.core.errors import ConfigError
from xtuner.core.log import human_bytes, logger
from xtuner.data.loading.batch import Batch
from xtuner.dist.mesh import Mesh
from xtuner.engine.long_documents import plan_activations
from xtuner.engine.step_time import StepCost
from xtuner.model.activation_memory import KEEP_ORDER, ActivationPlan
from xtuner.model.adapters.lora import LoRA
from xtuner.model.flops import num_parameters
from xtuner.model.ops.matmul import MATMULS
from xtuner.model.ops.saved_tensors import FACTORS
from xtuner.model.source import ModelSource
from xtuner.optim.adamw import FORMS
from xtuner.optim.optim_wrapper import OptimWrapper

USUAL_PACK = 32768  # tokens of a pack, if unknown
MIN_MICRO_BATCH = 4096  # tokens; smaller micro-batches leave tensor cores idle
MIN_SPEEDUP = 1.03  # a faster alternative is mentioned from this factor on
MAX_MICRO_BATCHES = 16  # of a pack, if something is recomputed
COLLECTIVE_BYTES = int(1.1 * 2**30)  # NCCL's buffers, and memory that the allocator reserves for its streams
LIBRARY_BYTES = int(1.3 * 2**30)  # CUDA, cuBLAS, and fragmentation of the allocator: the usual case
RESERVE_BYTES = 3 * 2**30  # the same, in the worst case


@dataclass(frozen=True)
class Division:
    """What our own strategy keeps full on every rank during an iteration; the rest is gathered a block at a time."""

    weights: bool
    gradients: bool

    @property
    def name(self) -> str:
        """Its value of `optim_wrapper.full`."""
        return next(name for name, division in DIVISIONS.items() if division == self)


DIVISIONS = {
    "all": Division(True, True),
    "weights": Division(True, False),
    "gradients": Division(False, True),
    "blocks": Division(False, False),
}
ALL_FULL = DIVISIONS["all"]


@dataclass(frozen=True)
class MemoryPlan:
    """How a rank uses its memory."""

    state: int  # bytes of weights, gradients and optimizer state
    activations: ActivationPlan
    max_tokens: int | None = None  # of a micro-batch; None: a micro-batch is a full pack
    division: Division = ALL_FULL
    library_bytes: int = LIBRARY_BYTES  # what the driver reports in addition
    seconds: float = 0.0  # estimated time of an iteration, without the attention that every plan computes
    document: int = 0  # tokens of the longest document in a pack; 0 if unknown
    sharers: int = 1  # ranks that share a pack

    def count_micro_batches(self, pack: Batch, ranks: int = 1) -> int:
        """Number of micro-batches that a pack is cut into, which `ranks` ranks share."""
        return 1 if self.max_tokens is None else pack.num_parts(self.max_tokens * ranks)

    def micro_batch_tokens(self, pack: int) -> int:
        """Tokens of the largest micro-batch of a pack with `pack` tokens."""
        return pack if self.max_tokens is None else min(pack, self.max_tokens)

    @property
    def longest_row(self) -> int:
        """This rank's tokens of the longest document; 0 if unknown."""
        return -(-self.document // self.sharers)

    def peak_bytes(self, pack: int, longest: int | None = None) -> int:
        """Most bytes that the driver will report as used.

        Args:
            pack: tokens of a pack.
            longest: tokens of the longest document, which is a micro-batch of its own if it has more than `max_tokens`;
                None if it may be as long as a pack.
        """
        largest = max(self.micro_batch_tokens(pack), pack if longest is None else min(longest, pack))
        return self._peak_bytes_of(largest)

    def _peak_bytes_of(self, tokens: int) -> int:
        """Most bytes in use while a micro-batch of so many tokens is computed."""
        return self.state + self.activations.largest_peak(tokens) + self.library_bytes

    def fits(self, tokens: int) -> bool:
        return self.activations.room is None or self.activations.peak_bytes(tokens) <= self.activations.room

    def log_plan(self, pack: int, mesh: Mesh, longest: int | None = None) -> None:
        """Log the plan; for the arguments see `peak_bytes`."""
        tokens = self.micro_batch_tokens(pack)
        details = self._describe_kept(tokens)
        if mesh.shard_size > 1:
            full = {"all": "weights and gradients", "blocks": "nothing"}.get(self.division.name, self.division.name)
            details += f"; every rank keeps {full} full during an iteration"
        logger.info(
            f"memory: {human_bytes(self.state)} of state; micro-batches of at most {tokens:,} tokens, {details}; "
            f"peak {human_bytes(self.peak_bytes(pack, longest))} expected"
        )
        row = self.longest_row or min(longest or 0, pack)
        if row > tokens:
            whole = self.document or row * self.sharers
            shared = f", {row:,} on each of {self.sharers} ranks" if self.sharers > 1 else ""
            logger.info(
                f"memory: documents of up to {whole:,} tokens{shared}, which cannot be cut: "
                f"{self._describe_kept(row)}; peak {human_bytes(self._peak_bytes_of(row))} expected"
            )

    def _describe_kept(self, tokens: int) -> str:
        """What blocks keep of a micro-batch with so many tokens."""
        if self.activations.keeps_everything(tokens):
            return "nothing is recomputed"
        policies = self.activations.choose_kept(tokens)
        kept = {name: sum(getattr(p, name) for p in policies) for name in KEEP_ORDER}
        details = f"activations kept (of {len(policies)} layers): "
        details += ", ".join(f"{name} {count}" for name, count in kept.items())
        if hosted := self.activations.host_bytes(tokens):
            kinds = {name: sum(name in p.on_host for p in policies) for name in ("input", "attention", FACTORS)}
            counts = ", ".join(f"{name} {count}" for name, count in kinds.items() if count)
            details += f"; of these in host memory: {counts}, {human_bytes(hosted)} for each rank"
        return details


M = TypeVar("M", bound=MemoryPlan)


def state_bytes(source: ModelSource, optim: OptimWrapper, device: torch.device, mesh: Mesh, division: Division) -> int:
    """Bytes of weights, gradients and optimizer state on a rank, including the blocks gathered at the same time."""
    return int(sum(state_parts(source, optim, device, mesh, division).values()))


def state_parts(
    source: ModelSource, optim: OptimWrapper, device: torch.device, mesh: Mesh, division: Division
) -> dict[str, float]:
    """Bytes of `state_bytes` by part."""
    form, copy = optim.state_form(device), optim.compute_dtype(device)
    trained, ranks, gradient = source.count_trained(), mesh.shard_size, optim.gradient_dtype(device).itemsize
    # sharded in any case: moments, and masters where these are not the compute weights
    own = (
        form.bytes - 2 - form.gradient.itemsize if form else optim.traits(device).moments + 4 * (copy != torch.float32)
    )
    moment = form.moment.itemsize if form else 0  # Muon has one for each element, AdamW two
    held = source.count_weight_bytes(copy)
    # at the end of the last block's backward: its gradients, the output layer's, and the reduced parts of both
    block_gradients = (trained.head + trained.block) * (1 + 1 / ranks) + trained.total / ranks
    return {
        "optimizer": (own * trained.total - moment * optim.count_matrices(source)) / ranks,
        # a block's weights, those of the next, and those that are being freed
        "weights": (held.total if division.weights else held.ends + 3 * held.block + held.total / ranks)
        + held.read_back,
        "gradients": gradient * (trained.total if division.gradients else block_gradients),
    }


def plan_memory(
    source: ModelSource,
    optim: OptimWrapper,
    device: torch.device,
    mesh: Mesh,
    pack: int = USUAL_PACK,
    free: int | None = None,
    division: Division | None = None,
    document: int = 0,
    host: int = 0,
) -> MemoryPlan:
    """For our own strategy: the fastest plan that fits; if none fits, the one that needs the least memory.

    Args:
        pack: tokens of a pack.
        free: bytes that every rank can still allocate on its GPU; None to ask this GPU.
        division: None to choose one.
        document: tokens of the longest document in a pack; 0 if unknown.
        host: bytes of host memory that each rank's activations may use.
    """
    free = free_bytes(device) if free is None else free
    c, itemsize = source.config, optim.compute_dtype(device).itemsize
    divisions = (
        [d for name, d in DIVISIONS.items() if optim.full in (None, name)] if mesh.shard_size > 1 else [ALL_FULL]
    )
    divisions = [division] if division else divisions
    if free is None or not source.recompute:
        state = state_bytes(source, optim, device, mesh, divisions[0])
        activations = ActivationPlan(c, itemsize, 0 if source.recompute else None)
        return MemoryPlan(state, activations, optim.micro_batch, divisions[0], document=document, sharers=mesh.cp)
    collectives = COLLECTIVE_BYTES * (mesh.size > 1)
    needs = dict(converted=MATMULS[source.products].swiglu_bytes)
    if isinstance(source.adapter, LoRA):
        needs["extra"] = source.adapter.activation_bytes(itemsize)
    candidates: list[MemoryPlan] = []
    held = source.count_weight_bytes(optim.compute_dtype(device))
    share = source.count_trained().total / num_parameters(c)
    row, longest = -(-document // mesh.cp), document or pack * mesh.cp
    for d in divisions:
        state = state_bytes(source, optim, device, mesh, d)
        room = max(free - state - RESERVE_BYTES - collectives, 0)
        activations = plan_activations(c, itemsize, room, host, longest, mesh.cp, source.products, **needs)
        for max_tokens in [optim.micro_batch] if optim.micro_batch else candidate_sizes(activations, pack):
            parts = optim.accumulative_counts * -(-pack // max_tokens)
            cost = StepCost(
                c,
                tokens=pack * optim.accumulative_counts,
                micro_batches=parts,
                policies=activations.choose_kept(min(max_tokens, pack)),
                num_gathers=1 if d.weights else 2 * parts,
                num_reduces=1 if d.gradients else parts,
                gradient_bytes=optim.gradient_dtype(device).itemsize * share,
                weight_bytes=itemsize,
                sent_weights=held.total,
                frozen=source.frozen_products,
                products=source.products,
            )
            libraries = LIBRARY_BYTES + collectives
            seconds = cost.seconds(mesh)
            if row > max_tokens:  # as if half of the tokens were in the longest documents
                many = replace(cost, micro_batches=-(-cost.tokens // row), policies=activations.choose_kept(row))
                seconds = (seconds + replace(many, length=longest).seconds(mesh)) / 2
            candidates.append(MemoryPlan(state, activations, max_tokens, d, libraries, seconds, document, mesh.cp))
    fitting = [plan for plan in candidates if plan.fits(row)]
    if not fitting:
        return min(candidates, key=lambda plan: plan.state + plan.activations.peak_bytes(row))
    sizes = [plan.micro_batch_tokens(pack) for plan in fitting]
    efficient = [
        plan
        for plan, size in zip(fitting, sizes, strict=True)
        if size >= min(MIN_MICRO_BATCH, pack)
        and plan.fits(size)
        and not plan.activations.hosts_factors(size)  # only of documents that cannot be cut
    ]
    return pick_fastest(efficient or fitting, pack)


def pick_fastest(plans: Sequence[M], pack: int) -> M:
    """The fastest plan that fits; if none fits, the one that needs the least memory."""
    if fitting := [plan for plan in plans if plan.fits(plan.micro_batch_tokens(pack))]:
        return min(fitting, key=lambda plan: plan.seconds)
    return min(plans, key=lambda plan: plan.state + plan.activations.peak_bytes(plan.micro_batch_tokens(pack)))


def suggest_mesh(
    chosen: MemoryPlan, source: ModelSource, optim: OptimWrapper, device: torch.device, mesh: Mesh, pack: int,
    free: int | None,
) -> str:  # fmt: skip
    """A remark if sharding over all ranks instead of each node's is estimated to be faster; else "". The opposite never
    is: all cards of a node take part in sharding over all ranks, and replicas send more."""
    if mesh.dp_replicate == 1 or not chosen.seconds:
        return ""
    other = Mesh(1, mesh.size // mesh.cp, mesh.cp, local_size=mesh.local_size)
    document, host = chosen.document, chosen.activations.host
    found = plan_memory(source, optim, device, other, pack, free, document=document, host=host)
    if not found.fits(found.micro_batch_tokens(pack)) or chosen.seconds < MIN_SPEEDUP * found.seconds:
        return ""
    faster = f"{100 * (chosen.seconds / found.seconds - 1):.0f} % faster"
    return f"--fsdp full is estimated to be {faster} here; a checkpoint of either resumes under the other"


def candidate_sizes(plan: ActivationPlan, pack: int) -> list[int]:
    """Micro-batch sizes to consider: the largest without recomputation, and equal parts of a pack plus a margin for
    cuts at document borders."""
    equal = {-(-(pack // parts + pack // 64) // 256) * 256 for parts in range(1, MAX_MICRO_BATCHES + 1)}
    return sorted(size for size in {plan.largest_micro_batch(2**17), *equal} if size)


def require_free(state: int, source: ModelSource, device: torch.device) -> None:
    """Raise ConfigError unless a GPU has `state` bytes free."""
    free = free_bytes(device)
    if free is not None and state + RESERVE_BYTES > free:
        raise too_large_error(source, state, free)


def free_bytes(device: torch.device) -> int | None:
    """Bytes that this process can still allocate on a GPU; None for CPUs."""
    if device.type != "cuda":
        return None
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + cached


def min_free_bytes(device: torch.device, mesh: Mesh) -> int | None:
    """The smallest `free_bytes` of all ranks, which must choose the same plan. All ranks call it together."""
    free = free_bytes(device)
    return None if free is None else min(mesh.ranks.gather(free))


def too_large_error(source: ModelSource, state: int, free: int) -> ConfigError:
    """The error for a model whose state alone does not fit."""
    parameters = num_parameters(source.config)
    if smaller := smaller_frozen_weights(source):
        return _too_large(state, free, parameters, [smaller])
    leaner = [f for f in FORMS.values() if parameters * f.bytes + RESERVE_BYTES <= free]
    needed = -(-parameters * 20 // max(int(free - 2 * RESERVE_BYTES), 1))
    advice = [f'optim_wrapper.states = "{f.name}" ({human_bytes(parameters * f.bytes)} on one GPU)' for f in leaner[:1]]
    advice.append(f"{needed} or more such GPUs with --deepspeed deepspeed_zero3 or --fsdp full")
    advice.append("fewer with --deepspeed deepspeed_zero3_offload")
    if source.adapter:
        advice = ["several GPUs with --fsdp full: each then holds a part of the weights"]
    return _too_large(state, free, parameters, advice)


def smaller_frozen_weights(source: ModelSource) -> str:
    """The setting that makes frozen weights smaller, for advice; "" if there is none."""
    if source.base is None or source.frozen_weights == "nf4":
        return ""
    size = human_bytes(int(replace(source, frozen_weights="nf4").count_weight_bytes(torch.bfloat16).total))
    return f'model.frozen_weights = "nf4" (weights of {size})'


def _too_large(state: int, free: int, parameters: int, advice: list[str]) -> ConfigError:
    return ConfigError(
        f"weights, gradients and optimizer state need {human_bytes(state)}, and the GPU has {human_bytes(free)} free",
        where=f"model: {parameters:,} parameters",
        why="the first step would run out of memory",
        do="; or ".join(advice),
    )
