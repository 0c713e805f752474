"""The same work by others: one loop for all peers, on the packs, with the state of AdamW and the figures of ours.

A peer is a function that builds its model and a loss from a `Settings`; the loop is a plain one as their trainers run
it: one pack of 32,768 tokens a step, documents kept apart, clipping to norm 1, AdamW. Reading data is not counted, to
the peer's favour. State of AdamW, as nearly as the peers' ways allow:

    fp32    fp32 weights, gradients and moments (16 bytes a parameter), computed in bf16; fused AdamW
    bf16    everything in bf16 (8 bytes); fused AdamW
    8bit    bf16 weights rounded at random, 8-bit moments (6 bytes): torchao's AdamW8bit   # pip install torchao
"""

import argparse
import importlib
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cases import PACK, PACKS, VOCABULARY, Case, in_order, write_data
from table import shape_of
from torch import nn

from xtuner.data.batch import Batch
from xtuner.model.decoder import DecoderConfig
from xtuner.model.flops import peak_flops, training_flops
from xtuner.train.profile import KernelTimer, by_part

TINY, TINY_PACK = DecoderConfig(VOCABULARY, 128, 512, 2, 1, 1, 128), 512


@dataclass(frozen=True)
class Settings:
    """What a peer is asked for; None leaves a choice to it."""

    engine: str
    shape: DecoderConfig
    device: torch.device
    states: str
    long: bool = False  # every pack is one document
    attention: str | None = None
    recompute: str | None = None
    compute: torch.dtype = torch.bfloat16

    @property
    def dtype(self) -> torch.dtype:
        """Of weights."""
        return torch.float32 if self.states == "fp32" else torch.bfloat16


@dataclass
class Peer:
    name: str  # the engine with what was chosen, as the table shows it
    attention: str
    versions: str
    model: nn.Module
    loss: Callable[[Batch], torch.Tensor]  # mean over a pack's targets


def build(s: Settings) -> Peer:
    if s.states == "split":
        raise SystemExit("peers know no --states split: take fp32")
    module = "peer_titan" if s.engine == "torchtitan" else "peer_hf"
    try:
        return importlib.import_module(module).build(s)
    except ModuleNotFoundError as e:
        raise SystemExit(f"{e}; benchmarks/{module}.py says what to install") from e


def optimizer_of(states: str, model: nn.Module) -> torch.optim.Optimizer:
    if states == "8bit":
        try:
            from torchao.optim import AdamW8bit
        except ModuleNotFoundError as e:
            raise SystemExit(f"{e}; AdamW with 8-bit moments is torchao's: pip install torchao") from e

        return AdamW8bit(model.parameters(), lr=4e-5, weight_decay=0.01, bf16_stochastic_round=True)
    return torch.optim.AdamW(model.parameters(), lr=4e-5, weight_decay=0.01, fused=True)


def measure(case: Case, a: argparse.Namespace, begin: float) -> dict[str, Any]:
    """Train a peer's model for `a.iterations`; the row of the table. `begin`: when the command did, for `first`."""
    if not a.tiny and not torch.cuda.is_available():
        raise SystemExit("peers are measured on a GPU; --tiny tries one on a CPU")
    device = torch.device("cpu" if a.tiny else "cuda")
    shape, length = (TINY, TINY_PACK) if a.tiny else (shape_of(case.name), PACK)
    settings = Settings(a.engine, shape, device, case.states, case.long, a.attention, a.recompute)
    torch.manual_seed(0)
    peer = build(settings)
    if a.tiny and peer.attention != "sdpa":
        raise SystemExit("on a CPU only sdpa has a backward: --attention sdpa, for torchtitan a -long case")
    peer.model.train()
    optimizer = optimizer_of(case.states, peer.model)
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder), 6 if a.tiny else PACKS, PACK if case.long else 0)
        data, order = in_order(Path(folder), length)
        packs = [Batch.of(data[i]) for i in order[: a.iterations + 2]]

    def backward(pack: Batch) -> torch.Tensor:
        loss = peer.loss(pack.to(device))
        loss.backward()
        return loss.detach()

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(peer.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    times, speeds, losses, first = [], [], [], 0.0
    for i, pack in enumerate(packs[: a.iterations]):
        if i == a.warm and not a.tiny:
            torch.cuda.reset_peak_memory_stats()  # compilers tried kernels out before
        start = time.perf_counter()
        loss = backward(pack)
        step()
        losses.append(loss.item())  # waits for the device
        took = time.perf_counter() - start
        first = first or time.perf_counter() - begin
        print(f"iter {i + 1} loss {losses[-1]:.4f} {length / took:,.0f} tok/s", flush=True)
        if i >= a.warm:
            times.append(took)
            speeds.append(training_flops(shape, length, pack.attention_pairs) / took)
    wall, peak = statistics.median(times), peak_flops(device)
    return {
        "engine": peer.name,
        "versions": peer.versions,
        "tokens_per_s": length / wall,
        "spread": [length / max(times), length / min(times)],
        "mfu": peak and statistics.median(speeds) / peak,
        "memory": 0 if a.tiny else torch.cuda.max_memory_allocated(),
        "data_time": None,
        "first": first,
        "losses": losses[a.warm :],
        "profile": profile(backward, step, packs[a.iterations :], wall * 1e3) if a.profile and not a.tiny else None,
    }


def profile(
    backward: Callable[[Batch], Any], step: Callable[[], None], packs: list[Batch], wall: float
) -> dict[str, float]:
    """ms an iteration by part, of `wall`. All of `step` is the optimizer's: names of compiled kernels do not say so."""
    kernels: dict[str, float] = {}
    stepping = 0.0
    for pack in packs:
        timer = KernelTimer()
        backward(pack)
        for name, ms in timer.stop()[0].items():
            kernels[name] = kernels.get(name, 0.0) + ms / len(packs)
        timer = KernelTimer()
        step()
        stepping += sum(timer.stop()[0].values()) / len(packs)
    for name, ms in sorted(kernels.items(), key=lambda pair: -pair[1])[:20]:
        print(f"{ms:9.1f} ms  {name[:100]}")
    parts = by_part(kernels, wall - stepping)
    return {**parts, "optimizer": parts["optimizer"] + stepping}
