"""Small networks and packs, and strategies that train them."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xtuner.data.loading.batch import Batch
from xtuner.dist import collectives
from xtuner.dist.mesh import make_mesh
from xtuner.engine import memory
from xtuner.engine.base import Strategy
from xtuner.engine.memory import Division
from xtuner.engine.strategies.sharded_strategy import ShardedStrategy
from xtuner.model.decoder import CausalLM
from xtuner.model.linear import Linear
from xtuner.model.ops.matmul import MatmulKind
from xtuner.model.source import ModelSource, from_scratch
from xtuner.optim.optim_wrapper import OptimWrapper

ITERATIONS, PACKS, LR, MAX_NORM = 10, 4, 1e-3, 1.0


CPU = torch.device("cpu")


def odd_model(products: MatmulKind = "own") -> ModelSource:
    """An odd vocabulary and kv rows, so that nothing divides evenly over ranks."""
    return from_scratch(
        activation_checkpointing=True,
        products=products,
        seed=0,
        vocab_size=401,
        hidden_size=64,
        intermediate_size=120 if products == "own" else 112,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )


def uneven_packs() -> list[Batch]:
    """Of all iterations and ranks; each third has few targets, each fifth none."""
    draw = torch.Generator().manual_seed(1)
    found = []
    for i in range(PACKS * ITERATIONS):
        ids = torch.randint(3, 401, (64,), generator=draw)
        targets = ids.roll(-1)
        targets[-1] = -100
        targets[10:60] = -100 if i % 3 == 1 else targets[10:60]
        targets[:] = -100 if i % 5 == 3 else targets
        borders = torch.tensor([0, 20, 64], dtype=torch.int32)
        positions = torch.cat((torch.arange(20), torch.arange(44)))
        item = dict(input_ids=ids, targets=targets, position_ids=positions, cumulative_len=borders)
        found.append(Batch.from_item(item, i))
    return found


def train_iterations(strategy: Strategy, iterations: range) -> Iterator[tuple[float, float, bool]]:
    everything, rank, ranks = uneven_packs(), collectives.rank(), collectives.ALL.size
    for n in iterations:
        these = everything[PACKS * n : PACKS * (n + 1)]
        batch = these[rank::ranks]
        (targets,), parts = collectives.ALL.sums_and_maxima(
            [sum(p.num_targets for p in batch)], strategy.count_micro_batches(batch)
        )
        loss = strategy.forward_backward(batch, int(targets), parts)
        yield (loss, *strategy.step(LR, MAX_NORM))


def large_model() -> ModelSource:
    sizes = dict(vocab_size=4000, hidden_size=768, intermediate_size=3072, num_hidden_layers=5)
    return from_scratch(seed=0, num_attention_heads=8, num_key_value_heads=4, **sizes)


def sharded_strategy(
    form: str = "fp32", division: Division | None = None, model: ModelSource | None = None, fsdp: str | None = None,
    eps: float = 1e-8,
) -> Any:  # fmt: skip
    adamw = dict(type=torch.optim.AdamW, lr=LR, eps=eps)
    optim = OptimWrapper(adamw, dict(max_norm=MAX_NORM), PACKS // collectives.ALL.size, "fp32", form)
    model, mesh = model or odd_model(), make_mesh(fsdp)
    free = memory.min_free_bytes(CPU, mesh)
    return ShardedStrategy(
        model, optim, CPU, mesh, memory.plan_memory(model, optim, CPU, mesh, free=free, division=division)
    )


def step_with_equal_gradients(s: Any, seed: int) -> None:
    """A step with gradients that are the same however they are divided."""
    for name, p in s._divided.parameters.items():
        draw = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        full = torch.randn(p.weight.shape, generator=draw) * 1e-3
        if p.sum is None:
            continue
        p.sum.reset()
        p.sum.add(full)
        if s.mesh.size > 1:
            p.own_buffer[: p.count] = full.view(-1)[p.begin : p.begin + p.count]
    s._has_targets = True
    s._sum_over_ranks(torch.zeros(2, device=s.device))
    assert s.step(LR, MAX_NORM)[1]


def save_snapshot(s: Any, folder: Path) -> Path:
    s.snapshot(optimizer=True).write(folder)
    collectives.ALL.gather(None)
    return folder


class LowRank(nn.Module):
    def __init__(self, linear: Linear, rank: int = 4) -> None:
        super().__init__()
        self.down, self.up = Linear(linear.sizes[0], rank), Linear(rank, linear.sizes[1])

    def forward(self, x_TK: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(x_TK))


@dataclass(frozen=True)
class LowRanks:
    """Low-rank terms on wqkv and w2; nothing else learns."""

    def apply(self, model: CausalLM) -> None:
        model.requires_grad_(False)
        for block in model.model.layers:
            for linear in (block.attention.wqkv, block.feed_forward.w2):
                linear.adapter = LowRank(linear)

    def initialize(self, name: str, weight: torch.Tensor) -> None:
        draw = torch.Generator(weight.device).manual_seed(zlib.crc32(name.encode()))
        weight.normal_(0.0, 0.1 if ".down." in name else 0.0, generator=draw)


def small_model() -> ModelSource:
    return from_scratch(
        seed=0, vocab_size=401, hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128,
    )  # fmt: skip


def read_masters(strategy: Any) -> dict[str, torch.Tensor]:
    return {name: shard.master.read().clone() for name, shard in strategy._shards().items()}


class Lion(torch.optim.Optimizer):
    """Sign of a mean: each number separately. Counts in plain numbers, of which a checkpoint keeps the kind."""

    def __init__(self, params: Any, lr: float = 1e-3, beta: float = 0.9) -> None:
        super().__init__(params, dict(lr=lr, beta=beta))

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if not state:
                        state |= dict(mean=torch.zeros_like(p), calls=0, share=0.0, warm=False, nothing=None)
                    assert [type(state[k]) for k in ("calls", "share", "warm")] == [int, float, bool]
                    state["calls"] += 1
                    state["share"] += 0.1
                    state["warm"] = True
                    state["mean"].lerp_(p.grad, 1 - group["beta"])
                    p.add_(state["mean"].sign(), alpha=-group["lr"] * state["share"] / state["calls"])
