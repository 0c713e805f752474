"""One training loop for all peers: the same packs, initial weights, AdamW state and metrics as ours.

A peer builds its model and a loss from `Settings`. The loop is what plain trainers run: one pack of 32,768 tokens per
step and rank, attention within documents, clipping to norm 1, AdamW. Reading data is not counted, in the peer's favour.
State of AdamW, as close to ours as the peers' options allow:

    fp32    fp32 weights, gradients and moments (16 bytes per parameter), compute in bf16; fused AdamW
    bf16    everything in bf16 (8 bytes); fused AdamW
    8bit    bf16 weights with stochastic rounding, 8-bit moments (6 bytes): torchao's AdamW8bit   # pip install torchao

With LoRA or QLoRA: frozen weights in bf16 or nf4, the factors and their state as fp32 (peft_terms.py).

On several GPUs (multi_gpu/peer_runs.py) FSDP2 shards the fp32 state, and gradients are summed in fp32.
"""

import argparse
import importlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from benchlib.gpu_memory import in_use
from benchlib.results_table import shape_of
from benchlib.workloads import TINY_PACK, VOCABULARY, Case, Terms, packs_in_training_order
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from xtuner.data.loading.batch import Batch
from xtuner.families import LLAMA, QWEN3, ModelFamily
from xtuner.model.decoder import CausalLM, DecoderConfig, initialize_parameter
from xtuner.model.flops import matmul_parameters, peak_flops, training_flops
from xtuner.model.weights import split_for_family
from xtuner.train.reporting.profile import KernelTimer, sum_by_part

Weights = dict[str, torch.Tensor]
LR = 4e-5
TINY = DecoderConfig(VOCABULARY, 128, 512, 2, 1, 1, 128)


@dataclass(frozen=True)
class Settings:
    """Options of a peer; None: the peer's choice."""

    engine: str
    shape: DecoderConfig
    device: torch.device
    states: str
    long: bool = False  # every pack is one document
    attention: str | None = None
    recompute: str | None = None
    compute: torch.dtype = torch.bfloat16
    mesh: DeviceMesh | None = None  # of several ranks: the state is sharded over them
    shared: bool = False  # all ranks share each pack (shared_packs.py)
    terms: Terms | None = None
    products: str | None = None  # of blocks: a recipe of fp8_products.py

    def label(self, attention: str, recompute: str) -> str:
        """The engine and its options, as the table shows them."""
        return " ".join([self.engine, attention, recompute, *([self.products] if self.products else [])])

    @property
    def dtype(self) -> torch.dtype:
        """Of weights."""
        if self.terms:
            return self.compute
        return torch.float32 if self.states == "fp32" else torch.bfloat16


@dataclass
class Peer:
    """Args: model: with buffers; its parameters are overwritten.  loss: mean over a pack's targets."""

    name: str  # engine and options, as the table shows them
    attention: str
    versions: str
    model: nn.Module
    loss: Callable[[Batch], torch.Tensor]
    rename: Callable[[Weights], Weights] = lambda weights: weights  # llama layout → the model's own names
    adds_up: bool = False  # sums gradients over ranks; FSDP averages by default
    adapt: Callable[[], None] | None = None  # freezes the model and adds what is trained instead
    has_weights: bool = False  # the random ones that ours starts from, and the adapter

    def start(self, shape: DecoderConfig) -> None:
        """Load the random weights that ours starts from, one tensor at a time, and add the adapter."""
        if self.has_weights:
            return
        theirs = dict(self.model.named_parameters())
        for weights in initial_weights(shape, next(iter(theirs.values())).device):
            for key, weight in self.rename(weights).items():
                copy_shard(theirs.pop(key), weight)
        if theirs:
            raise RuntimeError(f"{self.name} has weights that ours does not have: {', '.join(theirs)}")
        if self.adapt:
            self.adapt()


def initial_weights(shape: DecoderConfig, device: torch.device) -> Iterator[Weights]:
    """The random weights that ours starts from, one of our parameters at a time, in llama layout."""
    with torch.device("meta"):
        ours = dict(CausalLM(shape).named_parameters())
    for name, parameter in ours.items():
        full = torch.empty(parameter.shape, device=device)
        initialize_parameter(name, full, shape, 0)
        yield split_for_family(name, full, layout(shape), shape)


def layout(shape: DecoderConfig) -> ModelFamily:
    """The family whose classes peers use for the network."""
    return QWEN3 if shape.qk_norm else LLAMA


@torch.no_grad()
def copy_shard(parameter: torch.Tensor, full: torch.Tensor) -> None:
    """Copy `full` into a parameter; if FSDP shards it, only this rank's rows."""
    if isinstance(parameter, DTensor):
        mesh, held = parameter.device_mesh, parameter.to_local()
        rows = full.chunk(mesh.size(), 0)
        full = rows[mesh.get_local_rank()] if mesh.get_local_rank() < len(rows) else full[:0]
        held.copy_(full)
    else:
        parameter.copy_(full)


def build(s: Settings) -> Peer:
    if s.states == "split":
        raise SystemExit("peers do not support --states split: use fp32")
    if s.terms and s.engine == "torchtitan":
        raise SystemExit("torchtitan trains no adapters: use --engine hf-liger or hf")
    if s.terms and s.products:
        raise SystemExit("peers train adapters without --products")
    if s.mesh and s.states != "fp32":
        raise SystemExit("peers on several GPUs are measured with fp32 state")
    module = {"torchtitan": "torchtitan_model", "unsloth": "unsloth_model"}.get(s.engine, "transformers_model")
    try:
        return importlib.import_module(f"benchlib.peers.{module}").build(s)
    except ModuleNotFoundError as e:
        raise SystemExit(f"{e}; benchmarks/benchlib/peers/{module}.py says what to install") from e


def optimizer_of(states: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    chosen: dict[str, Any] = dict(lr=LR, betas=(0.9, 0.95), weight_decay=0.01)
    if states == "8bit":
        try:
            from torchao.optim import AdamW8bit
        except ModuleNotFoundError as e:
            raise SystemExit(f"{e}; AdamW with 8-bit moments is torchao's: pip install torchao") from e

        return AdamW8bit(parameters, bf16_stochastic_round=True, **chosen)
    return torch.optim.AdamW(parameters, fused=True, **chosen)


class Loop:
    """A plain trainer. Each rank takes one pack of an iteration."""

    def __init__(self, peer: Peer, s: Settings) -> None:
        self.peer, self.device = peer, s.device
        self.rank, self.ranks = (s.mesh.get_local_rank(), s.mesh.size()) if s.mesh else (0, 1)
        peer.start(s.shape)
        if s.device.type == "cuda":
            torch.cuda.empty_cache()  # full tensors of the initial weights
        peer.model.train()
        self.parameters = [p for p in peer.model.parameters() if p.requires_grad]
        self.optimizer = optimizer_of(s.states, self.parameters)

    def backward(self, packs: Sequence[Batch]) -> torch.Tensor:
        """Mean loss over the targets of all ranks; its gradient is on all ranks.

        Args:
            packs: of the iteration, one per rank, or one that all share.
        """
        mine = packs[self.rank] if len(packs) > 1 else packs[0]
        share = mine.num_targets / sum(pack.num_targets for pack in packs)
        loss = self.peer.loss(mine.to(self.device)) * share
        (loss if self.peer.adds_up else loss * len(packs)).backward()
        loss = loss.detach()
        if self.ranks > 1:
            dist.all_reduce(loss)
        return loss

    def step(self) -> torch.Tensor:
        """Clip, step, and return the gradient norm over all ranks."""
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        nn.utils.clip_grads_with_norm_(self.parameters, 1.0, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def iterate(
        self, iterations: Sequence[Sequence[Batch]], rates: Sequence[float] = ()
    ) -> Iterator["IterationResult"]:
        """
        Args:
            rates: the learning rate of each iteration; empty: constant.
        """
        for i, packs in enumerate(iterations):
            for group in self.optimizer.param_groups if rates else ():
                group["lr"] = rates[i]
            start = time.perf_counter()
            loss = self.backward(packs)
            norm = self.step()
            found = loss.item(), norm.item()  # synchronizes with the device and all ranks
            took = time.perf_counter() - start
            if self.rank == 0:
                print(f"iter {i + 1} loss {found[0]:.4f} {packs[0].num_tokens / took:,.0f} tok/s a rank", flush=True)
            yield IterationResult(took, *found)


@dataclass(frozen=True)
class IterationResult:
    seconds: float
    loss: float
    norm: float


def measure(case: Case, a: argparse.Namespace, begin: float) -> dict[str, Any]:
    """Train a peer's model for `a.iterations` on one device. Returns a row of the table. `begin`: of the command."""
    if not a.tiny and not torch.cuda.is_available():
        raise SystemExit("peers need a GPU; --tiny tries one on a CPU")
    device = torch.device("cpu" if a.tiny else "cuda")
    shape, length = (TINY, TINY_PACK) if a.tiny else (shape_of(case.name), case.pack)
    compute = torch.float32 if a.tiny else torch.bfloat16  # CPUs may multiply bf16 a hundred times slower
    options: Any = dict(attention=a.attention, recompute=a.recompute, terms=case.terms, products=a.products)
    settings = Settings(a.engine, shape, device, case.states, case.long, compute=compute, **options)
    peer = build(settings)
    if a.tiny and peer.attention not in ("sdpa", "loop"):
        raise SystemExit("on a CPU only sdpa and loop have a backward: --attention sdpa, for torchtitan a -long case")
    loop = Loop(peer, settings)
    with tempfile.TemporaryDirectory() as folder:
        case.write_data(Path(folder), *([6] if a.tiny else []))
        data, order = packs_in_training_order(Path(folder), length)
        packs = [[Batch.from_item(data[i])] for i in order[: a.iterations + 2]]
    found, first = [], 0.0
    for i, iterated in enumerate(loop.iterate(packs[: a.iterations])):
        first = first or time.perf_counter() - begin
        found.append(iterated)
        if i + 1 == a.warm and not a.tiny:
            torch.cuda.reset_peak_memory_stats()  # forget the autotuning of compilers
    counted = found[a.warm :]
    frozen, added = (matmul_parameters(shape), sum(p.numel() for p in loop.parameters)) if case.terms else (0, 0)
    speeds = [
        training_flops(shape, length, pack.attention_pairs, frozen, added) / it.seconds
        for (pack,), it in zip(packs[a.warm : a.iterations], counted, strict=True)
    ]
    times = [it.seconds for it in counted]
    wall, peak = statistics.median(times), peak_flops(device)
    return {
        "engine": peer.name,
        "versions": peer.versions,
        "tokens_per_s": length / wall,
        "spread": [length / max(times), length / min(times)],
        "mfu": peak and statistics.median(speeds) / peak,
        "memory": 0 if a.tiny else torch.cuda.max_memory_allocated(),
        "in_use": None if a.tiny else in_use(device),
        "data_time": None,
        "first": first,
        "losses": [it.loss for it in counted],
        "profile": profile(loop, packs[a.iterations :], wall * 1e3) if a.profile and not a.tiny else None,
    }


def profile(loop: Loop, packs: list[list[Batch]], wall: float) -> dict[str, float]:
    """ms per iteration by part, of `wall`. All of `step` counts as optimizer: compiled kernels have other names."""
    kernels: dict[str, float] = {}
    stepping = 0.0
    for pack in packs:
        timer = KernelTimer()
        loop.backward(pack)
        for name, ms in timer.stop()[0].items():
            kernels[name] = kernels.get(name, 0.0) + ms / len(packs)
        timer = KernelTimer()
        loop.step()
        stepping += sum(timer.stop()[0].values()) / len(packs)
    for name, ms in sorted(kernels.items(), key=lambda pair: -pair[1])[:20]:
        print(f"{ms:9.1f} ms  {name[:100]}")
    parts = sum_by_part(kernels, wall - stepping)
    return {**parts, "optimizer": parts["optimizer"] + stepping}
