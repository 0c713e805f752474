"""Muon: the numbers of `torch.optim.Muon`, on one process and where matrices are sharded."""

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.models import (
    CPU,
    PACKS,
    odd_model,
    read_masters,
    save_snapshot,
    step_with_equal_gradients,
    uneven_packs,
)
from helpers.ranks import on_ranks
from helpers.runs import assert_same_state, records
from torch.optim import _muon as of_torch

from xtuner.config.settings import SCHEMA
from xtuner.core.errors import ConfigError
from xtuner.dist import collectives
from xtuner.dist.collectives import Ranks
from xtuner.dist.mesh import Mesh, make_mesh
from xtuner.engine import memory
from xtuner.engine.memory import DIVISIONS, Division
from xtuner.engine.strategies.muon_optimizer import assign_matrices
from xtuner.engine.strategies.sharded_strategy import ShardedStrategy
from xtuner.model.source import from_scratch
from xtuner.optim.muon import Muon, is_matrix, parameter_flops
from xtuner.optim.optim_wrapper import OptimWrapper

LR, MAX_NORM = 0.02, 1.0
ADAMW = dict(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.2)
MUON: dict[str, Any] = dict(type=Muon, lr=LR, weight_decay=0.1, adamw=ADAMW)
FROZEN = "model.layers.1.feed_forward.w3.weight"
GROUPS = [
    dict(match=r"1\.feed_forward\.w3", frozen=True),
    dict(match=r"\.wo\.", lr_scale=0.5, weight_decay=0.0),
    dict(match="norm", weight_decay=0.0),
]


def make(
    optimizer: dict[str, Any], division: Division | None = None, states: str = "fp32", fsdp: Any = None,
    device: torch.device = CPU,
) -> Any:  # fmt: skip
    counts = PACKS // collectives.ALL.size
    optim = OptimWrapper(optimizer, dict(max_norm=MAX_NORM), counts, "auto", states, parameter_groups=GROUPS)
    model, optim = optim.fit_to(odd_model())
    mesh = make_mesh(fsdp)
    plan = memory.plan_memory(model, optim, device, mesh, division=division)
    return ShardedStrategy(model, optim, device, mesh, plan)


def go(strategy: Any, iterations: range) -> Iterator[dict[str, torch.Tensor]]:
    """Yields the gradients of each iteration of one process, clipped."""
    everything, rank, ranks = uneven_packs(), collectives.rank(), collectives.ALL.size
    for n in iterations:
        these = everything[PACKS * n : PACKS * (n + 1)]
        strategy.forward_backward(these[rank::ranks], sum(p.num_targets for p in these))
        gradients = {name: g.clone() for name, g in strategy.gradients.items()}
        norm, applied = strategy.step(LR * (n + 1) / 4, MAX_NORM)
        assert applied
        yield {name: g * min(1.0, MAX_NORM / (norm + 1e-6)) for name, g in gradients.items()}


def heads(name: str, value: torch.Tensor) -> list[torch.Tensor]:
    """q, k and v of the joint projection, whose rows are those of two kv heads: two queries, k, v of 16 rows each."""
    if not name.endswith("wqkv.weight"):
        return [value]
    rows = torch.arange(len(value)).view(2, 4, 16)
    return [value[part.reshape(-1)] for part in (rows[:, :2], rows[:, 2], rows[:, 3])]


def by_torch(start: dict[str, torch.Tensor], record: list[dict[str, torch.Tensor]], **arguments: Any) -> Any:
    """Name → matrices, as torch.optim.Muon and torch.optim.AdamW make them of these gradients."""
    parts = {n: [torch.nn.Parameter(v.clone()) for v in heads(n, start[n].view(g.shape))] for n, g in record[0].items()}
    matrices = {n: p for n, p in parts.items() if n.startswith("model.layers") and p[0].dim() == 2}
    settings = {"wo": dict(weight_decay=0.0, scale=0.5), "norm": dict(weight_decay=0.0)}

    def groups(names: Any) -> list[dict[str, Any]]:
        own = {n: next((s for key, s in settings.items() if key in n), {}) for n in names}
        return [dict(params=parts[n], **({"scale": 1.0} | own[n])) for n in names]

    muon = torch.optim.Muon(groups(matrices), lr=LR, weight_decay=0.1, **arguments)
    adamw = torch.optim.AdamW(groups(parts.keys() - matrices.keys()), **ADAMW)
    for n, of_step in enumerate(record):
        for name, gradient in of_step.items():
            for part, g in zip(parts[name], heads(name, gradient), strict=True):
                part.grad = g.clone()
        for optimizer, lr in ((muon, LR), (adamw, ADAMW["lr"])):
            for group in optimizer.param_groups:
                group["lr"] = lr * (n + 1) / 4 * group["scale"]
            optimizer.step()
    return parts


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        dict(adjust_lr_fn="match_rms_adamw", nesterov=False, momentum=0.8, ns_steps=3, ns_coefficients=(2, -1.5, 0.5)),
    ],
)
def test_the_numbers_of_torch(arguments: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """For each matrix of a block, q, k and v apart; AdamW for the rest. PyTorch's is made to compute in fp32, too."""
    draw = torch.Generator().manual_seed(0)
    for shape in ((40, 64), (64, 40), (48, 48)):  # in bf16, as on GPUs
        x, muon = torch.randn(shape, generator=draw), Muon(**arguments)
        coefficients: Any = tuple(muon.ns_coefficients)
        their = of_torch._zeropower_via_newtonschulz(x, coefficients, muon.ns_steps, muon.eps)
        assert muon.orthogonalize(x.bfloat16()).equal(their * muon.ratio(*shape))
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x.float().clone())  # up to 2.13 or 2.14
    monkeypatch.setattr(of_torch, "torch", SimpleNamespace(**{**vars(torch), "bfloat16": torch.float32}))
    strategy = make(MUON | arguments)
    start = read_masters(strategy)
    record = list(go(strategy, range(4)))
    expected, found = by_torch(start, record, **arguments), read_masters(strategy)
    assert found.keys() - expected.keys() == {FROZEN}
    assert found[FROZEN].equal(start[FROZEN])
    for name, parts in expected.items():
        for mine, part in zip(heads(name, found[name].view(record[0][name].shape)), parts, strict=True):
            assert (mine - part).abs().max() < 1e-5, name
            assert (part - heads(name, start[name].view(record[0][name].shape))[0][: len(part)]).abs().max() > 1e-3


@pytest.mark.processes
def test_sharded_as_on_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two and four processes, full and hybrid, also resumed on others. With equal gradients, every bit is the same."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    alone, forms = make(MUON), ("fp32", "split", "bf16")
    list(go(alone, range(2)))
    save_snapshot(alone, tmp_path / "alone")
    list(go(alone, range(2, 5)))
    right = read_masters(alone)
    for form in forms:
        straight = make(MUON, states=form)
        for seed in range(6):
            step_with_equal_gradients(straight, seed)
            if seed == 1:
                save_snapshot(straight, tmp_path / f"{form}2")
        save_snapshot(straight, tmp_path / f"{form}_straight")

    def near(strategy: Any) -> None:
        for name, shard in strategy._shards().items():
            begin, mine = shard.master.begin, shard.master.read()
            assert (mine - right[name][begin : begin + len(mine)]).abs().max() < 1e-5, name

    def on_several(_: Ranks, folder: Path) -> None:
        size = collectives.ALL.size
        kind: Any = (None, "fp32", "hybrid") if size == 4 else (DIVISIONS["blocks"],)
        strategy, again = make(MUON, *kind), make(MUON, *kind)
        list(go(strategy, range(2)))
        half = save_snapshot(strategy, folder / "half")
        list(go(strategy, range(2, 5)))
        near(strategy)
        again.load(half)
        list(go(again, range(2, 5)))
        assert_same_state(save_snapshot(strategy, folder / "end"), save_snapshot(again, folder / "again"))
        again.load(tmp_path / "alone")
        list(go(again, range(2, 5)))
        near(again)
        for form in forms:
            other = make(MUON, states=form)
            other.load(tmp_path / f"{form}{size}")
            step_with_equal_gradients(other, size)
            step_with_equal_gradients(other, size + 1)
            save_snapshot(other, tmp_path / f"{form}{size + 2}")

    for size in (2, 4):
        assert on_ranks(size, on_several, tmp_path / str(size)) == [0] * size
        alone.load(tmp_path / str(size) / "half")
        list(go(alone, range(2, 5)))
        near(alone)
    for form in forms:
        back = make(MUON, states=form)
        back.load(tmp_path / f"{form}6")
        assert_same_state(tmp_path / f"{form}_straight", save_snapshot(back, tmp_path / f"{form}_back"))


def test_settings_are_declared() -> None:
    fields = {f.name: f for f in dataclasses.fields(Muon)}
    declared = {s.name: s.default for s in SCHEMA.settings if s.owner == "Muon"}
    assert declared.keys() == fields.keys() - {"params", "lr", "weight_decay"}
    assert all(getattr(Muon(), name) == default for name, default in declared.items())


def test_ranks_have_equal_work() -> None:
    """At the size of 7B: on 8 ranks within 3 %; on more ranks than matrices each has at most one."""
    seven = from_scratch(vocab_size=92544, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                         num_attention_heads=32, num_key_value_heads=8)  # fmt: skip
    shapes = {n: s for n, s in seven.trained_shapes.items() if is_matrix(n, s)}
    costs = {n: parameter_flops(n, s, Muon(), seven.config) for n, s in shapes.items()}
    assert sum(costs.values()) == pytest.approx(6.66e14, rel=0.01)
    load = [sum(costs[n] for n in names) for names in assign_matrices(costs, 8)]
    assert max(load) < 1.03 * min(load)
    assert max(map(len, assign_matrices(costs, 200))) == 1
    optims = [OptimWrapper(dict(type=kind, lr=1e-3), dtype="bf16") for kind in (Muon, torch.optim.AdamW)]
    gpu, mesh = torch.device("cuda"), Mesh(dp_shard=8)
    less = [memory.state_bytes(seven, optim, gpu, mesh, DIVISIONS["all"]) for optim in optims]
    assert less[1] - less[0] == 4 * sum(s.numel() for s in shapes.values()) / 8


@pytest.mark.processes
def test_a_run_with_muon(tiny: Path, tmp_path: Path, xtuner: Callable[..., int]) -> None:
    """By its name in a config: the loss falls; DeepSpeed is refused before anything starts; wrong settings by name."""
    config = tmp_path / "muon.py"
    text = tiny.read_text()
    old = "optimizer=dict(type=optim_type, lr=lr, betas=betas, weight_decay=weight_decay)"
    assert text.count(old) == 1

    def write(settings: str) -> None:
        config.write_text(text.replace(old, f"optimizer=dict(type='Muon', lr=lr, {settings})"))

    write("adamw=dict(lr=0.003, betas=betas)")
    words = ["train", config, "--work-dir", tmp_path / "w", "--cfg-options", "custom_hooks=[]", "lr=0.02"]
    with pytest.raises(ConfigError, match=r"Muon is not supported with DeepSpeed(.|\n)*leave --deepspeed out"):
        xtuner(*words, "--dry-run", "--deepspeed", "deepspeed_zero2")
    assert xtuner(*words, "default_hooks.logger.interval=1", "train_cfg.max_epochs=3") == 0
    losses = [line["loss"] for line in records(tmp_path / "w").values()]
    assert losses[-1] < 0.9 * losses[0]
    report = next((tmp_path / "w").glob("*/*.log")).read_text()
    assert "Muon(lr=0.02, adamw=" in report
    words = (
        r"Muon updates 5 matrices of blocks, AdamW the other [\d,]+ parameters; it adds [\d.]+ .FLOPs to an iteration"
    )
    assert re.search(words, report)
    for wrong, message in (
        ("momentum=1.0", r"momentum = 1.0 is not at least 0 and below 1"),
        ("adjust_lr_fn='rms'", "adjust_lr_fn = 'rms' is not one of"),
        ("adamw=dict(beta=1)", r"adamw has no setting 'beta'. Did you mean 'betas'\?"),
        ("adamw=dict(lr=-1)", "AdamW does not take these values: Invalid learning rate"),
        ("nesterof=True", "Did you mean 'nesterov'"),
        ("ns_steps=0", "ns_steps = 0 is not from 1 to 99"),
    ):
        write(wrong)
        with pytest.raises(ConfigError, match=message) as error:
            xtuner("check-cfg", config)
        assert "muon.py:" in str(error.value)
    groups = [dict(match="w2", betas=(0.9, 0.9))]
    with pytest.raises(ConfigError, match="'w2' has betas or eps, and Muon updates all of its parameters"):
        OptimWrapper(MUON, parameter_groups=groups).fit_to(odd_model())
    with pytest.raises(ConfigError, match='states = "8bit" is not supported with Muon'):
        OptimWrapper(MUON, states="8bit")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu(tmp_path: Path) -> None:
    """As on a CPU, but orthogonalized in bf16. The step waits for nothing, and a resume is the same bit for bit."""
    gpu = torch.device("cuda")
    exact, ours, again = make(MUON), make(MUON, device=gpu), make(MUON, device=gpu)
    step_with_equal_gradients(exact, 0)
    before = read_masters(exact)
    ours.load(save_snapshot(exact, tmp_path / "cpu"))
    for strategy in (exact, ours):
        step_with_equal_gradients(strategy, 1)
    for name, value in read_masters(exact).items():
        if name == FROZEN:  # in bf16 there
            continue
        error, moved = read_masters(ours)[name].cpu() - value, value - before[name]
        assert error.norm() <= (0.05 if "layers" in name else 1e-3) * moved.norm(), name
    again.load(save_snapshot(ours, tmp_path / "gpu"))
    for strategy in (ours, again):
        step_with_equal_gradients(strategy, 2)
        strategy._sum_over_ranks(torch.zeros(2, device=gpu))
        torch.cuda.set_sync_debug_mode("error")
        try:
            assert strategy.step(LR, MAX_NORM)[1]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(value.equal(read_masters(again)[name]) for name, value in read_masters(ours).items())
