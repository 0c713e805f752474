"""Our own strategy on meshes: whatever is kept full and however state is divided, the numbers are one process's."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  once, before processes are forked
import pytest
import torch
from helpers.models import (
    LowRanks,
    odd_model,
    save_snapshot,
    sharded_strategy,
    step_with_equal_gradients,
    train_iterations,
    uneven_packs,
)
from helpers.ranks import on_ranks
from helpers.runs import assert_same_state, optimizer_states
from safetensors.torch import load_file

from xtuner.core.errors import CheckpointError, ConfigError
from xtuner.dist import collectives
from xtuner.dist.collectives import Ranks
from xtuner.dist.mesh import Mesh
from xtuner.engine import memory
from xtuner.engine.memory import ALL_FULL, DIVISIONS, Division, MemoryPlan
from xtuner.engine.step_time import StepCost
from xtuner.engine.strategies.sharded_parameters import rows_per_rank
from xtuner.model.ops.autograd_functions import KeepPolicy
from xtuner.model.source import from_scratch
from xtuner.optim.adamw import FORMS
from xtuner.optim.optim_wrapper import OptimWrapper
from xtuner.train.checkpoints import checkpoint
from xtuner.train.state import TrainState

GPU = torch.device("cuda")  # of which only arithmetic speaks here


@pytest.mark.processes
@pytest.mark.parametrize("division", DIVISIONS.values())
@pytest.mark.parametrize("form", ["fp32", "8bit"])
def test_what_is_kept_full_changes_nothing(division: Division, form: str, tmp_path: Path) -> None:
    """Losses, norms and a step that meets a NaN, on two ranks of which one has to cut its packs as the other does."""
    expected = list(train_iterations(sharded_strategy(form), range(4)))
    tolerance = 1e-5 if form == "fp32" else 1e-3  # bf16 sums of two ranks

    def on_two(_: Ranks, folder: Path) -> None:
        s = sharded_strategy(form, division)
        s.memory = replace(s.memory, max_tokens=44 if collectives.rank() else None)
        lines = list(train_iterations(s, range(3)))
        assert lines == [
            (pytest.approx(x, abs=tolerance), pytest.approx(n, rel=10 * tolerance), a) for x, n, a in expected[:3]
        ]
        before = save_snapshot(s, folder / "before")
        hook = None
        if collectives.rank():
            hook = s.model.model.layers[1].register_forward_hook(lambda module, args, out: out * float("nan"))
        ((loss, _, applied),) = train_iterations(s, range(3, 4))
        assert loss != loss
        assert not applied
        assert_same_state(before, save_snapshot(s, folder / "after"))
        if hook:
            hook.remove()
        with torch.no_grad():  # evaluation between iterations
            s.model(uneven_packs()[0].input_ids)
        ((loss, _, applied),) = train_iterations(s, range(3, 4))
        assert applied
        assert loss == pytest.approx(expected[3][0], abs=tolerance)

    assert on_ranks(2, on_two, tmp_path) == [0, 0]


@pytest.mark.processes
@pytest.mark.parametrize("form", FORMS)
def test_equal_gradients_make_equal_bits_on_any_mesh(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales of 8-bit groups and random bits are those of the full parameter. Resumed on 1 → 2 → 4 → 1 processes."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    straight = sharded_strategy(form)
    for seed in range(8):
        step_with_equal_gradients(straight, seed)
        if seed == 1:
            save_snapshot(straight, tmp_path / "at2")
    save_snapshot(straight, tmp_path / "straight")

    def resumed(_: Ranks, folder: Path) -> None:
        ranks = collectives.ALL.size
        other = sharded_strategy(form, DIVISIONS["blocks"])
        s = sharded_strategy(form, fsdp="hybrid" if ranks == 4 else None)
        at = {2: 2, 4: 4}[ranks]
        for each in (s, other):
            each.load(tmp_path / f"at{at}")
            for seed in range(at, at + 2):
                step_with_equal_gradients(each, seed)
        assert_same_state(save_snapshot(s, tmp_path / f"at{at + 2}"), save_snapshot(other, folder / "other"))

    assert on_ranks(2, resumed, tmp_path / "two") == [0, 0]
    assert on_ranks(4, resumed, tmp_path / "four") == [0] * 4
    again = sharded_strategy(form)
    again.load(tmp_path / "at6")
    for seed in (6, 7):
        step_with_equal_gradients(again, seed)
    assert_same_state(tmp_path / "straight", save_snapshot(again, tmp_path / "again"))


def test_rows_keep_groups_together() -> None:
    for shape in ((401, 64), (7,), (1000,), (4096, 4096), (6144, 4097), (3, 5, 7)):
        for ranks in (1, 2, 3, 8):
            each = rows_per_rank(torch.Size(shape), ranks)
            row = torch.Size(shape[1:]).numel()
            assert each * ranks >= shape[0]
            assert ranks == 1 or each * row % 256 == 0
            assert ranks == 1 or (each - 256) * ranks < shape[0]


@pytest.mark.processes
@pytest.mark.parametrize("division", DIVISIONS.values())
def test_an_adapter_trains_and_resumes(division: Division, tmp_path: Path) -> None:
    """The base stays as it is, without masters and moments; on two processes as on one; one resumes what two saved."""
    model = replace(odd_model(), adapter=LowRanks())
    alone = sharded_strategy(model=model)
    start = {n: s.master.read().clone() for n, s in alone._shards().items()}
    expected = list(train_iterations(alone, range(3)))
    half = save_snapshot(alone, tmp_path / "half")
    expected += train_iterations(alone, range(3, 6))
    assert expected[-1][0] < expected[0][0] - 1e-3
    learned = {n for n in start if ".adapter." in n}
    assert len(learned) == 8
    assert {n.partition("/")[2] for n in optimizer_states(half)} == learned
    assert load_file(half / "adapter" / "model.safetensors").keys() == learned
    base = load_file(half / "weights" / "model.safetensors")
    assert base.keys() == start.keys() - learned
    assert all(start[n].equal(v.view(-1)) for n, v in base.items())
    assert {n for n, p in alone._divided.parameters.items() if p.sum} == learned
    again = sharded_strategy(model=model)
    again.load(half)
    assert list(train_iterations(again, range(3, 6))) == expected[3:]
    assert_same_state(save_snapshot(again, tmp_path / "again"), save_snapshot(alone, tmp_path / "end"))
    with pytest.raises(CheckpointError, match="8 tensors are not in the model"):
        sharded_strategy().load(half)

    def on_two(_: Ranks, folder: Path) -> None:
        s = sharded_strategy(division=division, model=model)
        lines = list(train_iterations(s, range(3)))
        save_snapshot(s, folder / "half")
        lines += train_iterations(s, range(3, 6))
        assert [x for x, _, _ in lines] == pytest.approx([x for x, _, _ in expected], abs=1e-5)
        s.load(folder / "half")
        assert list(train_iterations(s, range(3, 6))) == lines[3:]

    assert on_ranks(2, on_two, tmp_path / "two") == [0, 0]
    alone.load(tmp_path / "two" / "half")
    assert [x for x, _, _ in train_iterations(alone, range(3, 6))] == pytest.approx(
        [x for x, _, _ in expected[3:]], abs=1e-5
    )


@pytest.mark.processes
def test_commands_refuse_weights_without_their_adapter(
    tiny: Path, corpus: Path, tmp_path: Path, xtuner: Callable[..., int]
) -> None:
    """Export, evaluation and `load_from` say what, where, why and what to do, and write nothing; the advice works."""
    snapshot = sharded_strategy(model=replace(odd_model(), adapter=LowRanks())).snapshot(optimizer=True)
    saved, _ = checkpoint.write(tmp_path, TrainState(3), snapshot, {}, collectives.ALL)
    start, before = ("--cfg-options", f"load_from={saved}"), sorted(tmp_path.rglob("*"))
    for words in (
        ("convert", "pth_to_hf", tiny, saved, tmp_path / "hf"),
        ("convert", "weights", saved, tmp_path / "all.safetensors"),
        ("eval", "loss", saved, corpus, "--max-length", "64"),
        ("check-cfg", tiny, *start),
        ("train", tiny, "--work-dir", tmp_path / "run", "--dry-run", *start),
        ("train", tiny, "--work-dir", tmp_path / "run", *start),
    ):
        with pytest.raises(CheckpointError) as caught:  # exit code 74
            xtuner(*words)
        error = caught.value
        assert error.what == "the checkpoint has an adapter, which cannot be merged into its weights yet", words
        by = f", by {tiny}:" if start[1] in words else ""
        assert error.where.startswith(f"{saved / 'adapter'}{by}"), words
        assert error.where.endswith(" load_from" if by else "adapter"), words
        assert error.why == "without it the weights are those of the model that the adapter was trained on", words
        assert error.do == f"give {saved / 'weights'} if that is what you want", words
        assert sorted(tmp_path.rglob("*")) == before, words
    assert xtuner("eval", "loss", saved / "weights", corpus, "--max-length", "64") == 0


def test_what_is_kept_full_follows_from_memory() -> None:
    """7B on four GPUs of 79 GiB, in bytes by hand; of what fits, the fastest."""
    shape = dict(vocab_size=92544, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32)
    heads = dict(num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=32768)
    seven = from_scratch(**shape, **heads, activation_checkpointing=True)

    def plan(form: str, ranks: int, free: int = 79, **named: Any) -> MemoryPlan:
        optim = OptimWrapper(dict(type=torch.optim.AdamW, lr=1), dtype="bf16", states=form, **named)
        return memory.plan_memory(seven, optim, GPU, Mesh(dp_shard=ranks, local_size=ranks), free=free * 2**30)

    def state(form: str, name: str) -> float:
        optim = OptimWrapper(dict(type=torch.optim.AdamW, lr=1), dtype="bf16", states=form)
        return memory.state_bytes(seven, optim, GPU, Mesh(dp_shard=4), DIVISIONS[name])

    parameters, ends = 7_737_708_544, 758_120_448
    block = (parameters - ends) / 32
    assert state("8bit", "all") == 4 * parameters + 2 * parameters / 4
    assert state("fp32", "all") == 6 * parameters + 10 * parameters / 4
    passing = 4 * 1.25 * (ends / 2 + block)
    assert state("fp32", "weights") == int(2 * parameters + passing + 14 * parameters / 4)
    assert state("fp32", "gradients") == int(2 * (ends + 3 * block) + 4 * parameters + 12 * parameters / 4)
    assert state("fp32", "blocks") == int(2 * (ends + 3 * block) + passing + 16 * parameters / 4)
    assert plan("8bit", 4).division == ALL_FULL
    assert plan("8bit", 4).max_tokens == 11_520
    assert plan("fp32", 4).division == DIVISIONS["weights"]
    assert plan("fp32", 4, sums="bf16").division == ALL_FULL
    assert plan("fp32", 4, 60).division == DIVISIONS["blocks"]
    assert plan("fp32", 4, full="blocks").division == DIVISIONS["blocks"]
    assert plan("fp32", 1).division == ALL_FULL
    assert plan("8bit", 1, micro_batch=5000).max_tokens == 5000
    for named in (dict(micro_batch=0), dict(full="most"), dict(sums="fp8")):
        with pytest.raises(ConfigError, match=next(iter(named))):
            plan("fp32", 4, **named)
    # more ranks, longer links: the same rows of work take longer, never less
    work = StepCost(seven.config, 32768, 4, [KeepPolicy()] * 32, num_gathers=1, num_reduces=4, gradient_bytes=4)
    one, four, two_nodes = (work.seconds(Mesh(dp_shard=n, local_size=here)) for n, here in ((1, 1), (4, 4), (8, 4)))
    assert one < four < two_nodes
    # with a card for each GPU, replicas of nodes are slower than sharding over all of them
    optim, free = OptimWrapper(dict(type=torch.optim.AdamW, lr=1), dtype="bf16"), 79 * 2**30
    for replicas, found in ((1, ""), (4, "--fsdp full is estimated to be 7 % faster")):
        mesh = Mesh(replicas, 32 // replicas, local_size=8)
        chosen = memory.plan_memory(seven, optim, GPU, mesh, free=free)
        text = memory.suggest_mesh(chosen, seven, optim, GPU, mesh, memory.USUAL_PACK, free)
        assert text.startswith(found)
        assert bool(text) == bool(found)


@pytest.mark.processes
def test_ranks_with_unequal_memory_choose_the_same(tmp_path: Path) -> None:
    def on_two(ranks: Ranks, folder: Path) -> None:
        memory.free_bytes = lambda device: 2**33 + ranks.rank * 2**30  # type: ignore[assignment]
        s = sharded_strategy(model=replace(odd_model(), recompute=True))
        assert s.memory.division == ALL_FULL
        assert s.memory.activations.room == 2**33 - s.memory.state - memory.RESERVE_BYTES - memory.COLLECTIVE_BYTES

    assert on_ranks(2, on_two, tmp_path) == [0, 0]
