"""LoRA on several ranks trains what one process does, under every division, mesh and room for activations."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  once, before processes are forked
import pytest
import torch
from helpers.lora import trained_checkpoint, with_lora, write_base
from helpers.models import CPU, LR, MAX_NORM, PACKS, read_masters, save_snapshot, uneven_packs
from helpers.ranks import on_ranks
from helpers.runs import assert_same_state

from xtuner.core.errors import ConfigError
from xtuner.dist.collectives import ALL, Ranks
from xtuner.dist.mesh import make_mesh
from xtuner.engine import memory
from xtuner.engine.memory import DIVISIONS
from xtuner.engine.strategies import select
from xtuner.engine.strategies.sharded_strategy import ShardedStrategy
from xtuner.model.activation_memory import ActivationPlan
from xtuner.model.adapters.folder import open_adapter
from xtuner.model.adapters.loading import load_adapted
from xtuner.optim.optim_wrapper import OptimWrapper

SETTINGS: dict[str, dict[str, Any]] = {
    "lora": dict(targets=["q", "v", "wo", "w1", "w2"], train=["norms", "output"]),
    "dora": dict(dora=True, frozen_weights="int8"),
    "qlora": dict(frozen_weights="nf4"),
}


def make(base: Path, kind: str, division: str = "all", room: int | None = None, cp: int = 1, **mesh: Any) -> Any:
    source, arranged = with_lora(base, **SETTINGS[kind]), make_mesh(mesh.get("fsdp"), cp=cp)
    optim = OptimWrapper(
        dict(type=torch.optim.AdamW, lr=LR), dict(max_norm=MAX_NORM), PACKS // arranged.dp_size, "fp32"
    )
    plan = memory.plan_memory(source, optim, CPU, arranged, division=DIVISIONS[division])
    activations = ActivationPlan(source.config, 4, room, 2**20 * (room == 30_000), cp)
    return ShardedStrategy(source, optim, CPU, arranged, replace(plan, max_tokens=40 // cp, activations=activations))


def train(s: Any, iterations: range) -> Iterator[tuple[float, float]]:
    everything, mesh = uneven_packs(), s.mesh
    for n in iterations:
        these = everything[PACKS * n : PACKS * (n + 1)]
        batch = these[mesh.dp_rank :: mesh.dp_size]
        _, parts = ALL.sums_and_maxima([], s.count_micro_batches(batch))
        loss = s.forward_backward(batch, sum(p.num_targets for p in these), parts, n)
        yield loss, s.step(LR, MAX_NORM)[0]


def close(a: list[tuple[float, float]], b: list[tuple[float, float]]) -> bool:
    return bool(torch.allclose(torch.tensor(a), torch.tensor(b), rtol=1e-5, atol=1e-5))


@pytest.mark.processes
@pytest.mark.parametrize("kind", SETTINGS)
def test_on_several_ranks_as_on_one(kind: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    alone = make(base, kind)
    frozen = {n: v for n, v in read_masters(alone).items() if n in alone._frozen}
    expected = list(train(alone, range(2)))
    half = save_snapshot(alone, tmp_path / "half")
    expected += train(alone, range(2, 4))
    assert all(read_masters(alone)[n].equal(v) for n, v in frozen.items())
    trained = {n for n, p in alone._divided.parameters.items() if p.sum}
    assert trained == set(alone.gradients) == {n for n in alone._shapes if n not in frozen}
    assert not any(s.state for n, s in alone._shards().items() if n in frozen)
    for room in (0, 30_000, 60_000):  # what is recomputed or on the host: the same bits
        other = make(base, kind, room=room)
        other.load(half)
        assert list(train(other, range(2, 4))) == expected[2:]

    def on_two(_: Ranks, folder: Path) -> None:
        cases = {"lora": (("blocks", None, 1), ("weights", 30_000, 2)), "dora": (("blocks", 0, 2),)}
        for division, room, cp in cases.get(kind, (("gradients", None, 1), ("blocks", 30_000, 2))):
            s = make(base, kind, division, room, cp)
            assert close(list(train(s, range(2))), expected[:2]), (division, cp)
            path = save_snapshot(s, folder / f"{division}-{cp}")
            lines = list(train(s, range(2, 4)))
            assert close(lines, expected[2:]), (division, cp)
            again = make(base, kind, division, room, cp)
            again.load(path)
            assert list(train(again, range(2, 4))) == lines
            again.load(half)
            assert_same_state(save_snapshot(again, folder / f"same-{division}-{cp}"), half)

    assert on_ranks(2, on_two, tmp_path / "two") == [0, 0]
    alone.load(next((tmp_path / "two").glob("[a-z]*-2")))
    assert close(list(train(alone, range(2, 4))), expected[2:])


def test_a_part_of_an_adapter_that_is_frozen_is_saved(tmp_path: Path) -> None:
    """By a parameter group: it stays as it begins, and what reads the checkpoint finds it."""
    source = with_lora(write_base(tmp_path / "base"), train=["norms"])
    still = frozenset(n for n in source.trained_names() if ".layers.0." in n)
    saved, model = trained_checkpoint(replace(source, frozen=still), tmp_path)
    opened = open_adapter(saved)
    assert set(opened.tensors) == {n for n in source.trained_names() if n not in still or ".adapter." in n}
    assert not any(opened.tensors[n].any() for n in still if n.endswith(".B"))
    with torch.no_grad():
        ids = torch.arange(3, 40)
        assert torch.equal(load_adapted(opened, tmp_path / "base")(ids), model(ids))


@pytest.mark.processes
def test_under_deepspeed(tmp_path: Path) -> None:
    """ZeRO 1 and 2 as one process; a checkpoint of either resumes under the other; the rest is refused by name."""
    base = write_base(tmp_path / "base")
    alone = make(base, "lora")
    expected = list(train(alone, range(2)))
    half = save_snapshot(alone, tmp_path / "half")
    expected += train(alone, range(2, 4))

    def choose(name: str, **settings: Any) -> Any:
        source, mesh = with_lora(base, **settings), make_mesh(None)
        optim = OptimWrapper(dict(type=torch.optim.AdamW, lr=LR), dict(max_norm=MAX_NORM), PACKS // mesh.dp_size)
        choice = select.choose_strategy(source, optim, CPU, name, None, mesh, 64)
        return select.build_strategy(choice, source, optim, CPU)

    for name, settings, what in (
        ("deepspeed_zero3", {}, "adapters with other stages than 1 and 2"),
        ("deepspeed_zero2_offload", {}, "adapters with other stages than 1 and 2"),
        ("deepspeed_zero2", dict(frozen_weights="nf4"), "weights in 4 or 8 bits"),
        ("deepspeed_zero1", dict(dropout=0.1), "dropout of adapters"),
    ):
        with pytest.raises(ConfigError, match=rf"--deepspeed {name} does not support {what}"):
            choose(name, **settings)  # type: ignore[arg-type]

    def on_two(_: Ranks, folder: Path) -> None:
        for name in ("deepspeed_zero1", "deepspeed_zero2"):
            s = choose(name, **SETTINGS["lora"])
            assert close(list(train(s, range(2))), expected[:2]), name
            save_snapshot(s, folder / name)
            s.load(half)
            assert close(list(train(s, range(2, 4))), expected[2:]), name

    assert on_ranks(2, on_two, tmp_path / "two") == [0, 0]
    alone.load(tmp_path / "two" / "deepspeed_zero2")
    assert close(list(train(alone, range(2, 4))), expected[2:])


@pytest.mark.processes
def test_dropout_is_the_same_wherever_it_is_recomputed(tmp_path: Path) -> None:
    """It changes what is learned, with the seed of iteration and micro-batch; evaluation has none."""
    base = write_base(tmp_path / "base")
    SETTINGS["dropout"] = dict(dropout=0.4)
    SETTINGS["none"] = {}
    first = make(base, "dropout")
    expected = list(train(first, range(4)))
    for room in (0, 30_000, 60_000):
        assert list(train(make(base, "dropout", room=room), range(4))) == expected
    again = make(base, "dropout")
    list(train(again, range(2)))
    half = save_snapshot(again, tmp_path / "half")
    resumed = make(base, "dropout")
    resumed.load(half)
    assert list(train(resumed, range(2, 4))) == expected[2:]
    assert list(train(make(base, "none"), range(4)))[1:] != expected[1:]
    with torch.no_grad():
        ids = torch.arange(3, 40)
        assert torch.equal(first.model(ids), first.model(ids))
