"""Parameter groups: each parameter has the rate and decay of its group, under every engine and form of state."""

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  once, before processes are forked
import pytest
import torch
from helpers.models import CPU, Lion, read_masters, small_model, uneven_packs
from helpers.ranks import on_ranks

from xtuner.core.errors import ConfigError
from xtuner.dist import collectives
from xtuner.dist.collectives import Ranks
from xtuner.engine.strategies import select
from xtuner.engine.strategies.local_optimizer import OwnAdamW
from xtuner.engine.zero import deepspeed_config
from xtuner.optim.adamw import FORMS
from xtuner.optim.optim_wrapper import OptimWrapper
from xtuner.optim.parameter_groups import require_matches

PACKS, LR, MAX_NORM, DECAY = 2, 1e-2, 1.0, 0.8
ADAMW = dict(type=torch.optim.AdamW, lr=LR, betas=(0.9, 0.95), weight_decay=0.5)
ENGINES: dict[str, tuple[str | None, str | None, dict[str, Any]]] = {  # --deepspeed, --fsdp, settings
    "fsdp": (None, "full", {}),
    "zero1": ("deepspeed_zero1", None, {}),
    "zero2": ("deepspeed_zero2", None, {}),
    "zero2_by_deepspeed": ("deepspeed_zero2", None, dict(full="weights")),  # it sends gradients itself
    "zero3": ("zero3.json", None, {}),
    "zero3_offload": ("deepspeed_zero3_offload", None, {}),
}
GROUPS = [
    dict(match=r"0\.attention_norm|w2", frozen=True),
    dict(match="norm", weight_decay=0.0, lr_scale=3),
    dict(match=r"^model\.tok_embeddings", lr_scale=0.1, weight_decay=0),
    dict(match="norm|w[13]", weight_decay=2.0),  # norms are taken
    dict(match="^output", betas=(0.5, 0.9), eps=1e-3),
]
BOTTOM = [dict(match="tok_embeddings|layers", frozen=True)]  # no block's input needs a gradient
FROZEN = frozenset(f"model.layers.0.{name}.weight" for name in ("attention_norm", "feed_forward.w2"))


def make(engine: str = "", groups: Any = (), folder: Path = Path(), **settings: Any) -> Any:
    zero, fsdp, more = ENGINES.get(engine, (None, None, {}))
    zero = str(folder / zero) if zero and zero.endswith(".json") else zero
    counts = PACKS // collectives.ALL.size
    decay = DECAY if groups is GROUPS else None
    wrapper = OptimWrapper(
        ADAMW, dict(max_norm=MAX_NORM), counts, parameter_groups=groups, layer_decay=decay, **settings | more
    )
    model, optim = wrapper.fit_to(small_model())
    return select.build_strategy(select.choose_strategy(model, optim, CPU, zero, fsdp), model, optim, CPU)


def go(strategy: Any, *iterations: int) -> list[dict[str, torch.Tensor]]:
    """Returns each iteration's gradients and, as "norm", their norm; of one process alone."""
    record, everything, rank, ranks = [], uneven_packs(), collectives.rank(), collectives.ALL.size
    for n in iterations:
        these = everything[PACKS * n : PACKS * (n + 1)]
        strategy.forward_backward(these[rank::ranks], sum(p.num_targets for p in these))
        gradients = {} if ranks > 1 else {name: g.clone() for name, g in strategy.gradients.items()}
        norm, applied = strategy.step(LR * (n + 1), MAX_NORM)
        assert applied
        record.append(gradients | {"norm": torch.tensor(norm)})
    return record


def expected(start: dict[str, torch.Tensor], record: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """What torch.optim.AdamW makes of these gradients, with the groups written out."""
    assert start.keys() - record[0].keys() == FROZEN
    trained = {n: v for n, v in start.items() if n not in FROZEN}
    parameters = {n: torch.nn.Parameter(v.view(record[0][n].shape).clone()) for n, v in trained.items()}
    kinds: dict[tuple[float, float, bool], list[torch.nn.Parameter]] = {}
    for name, p in parameters.items():
        part = name.split(".")[-2]
        # above the only layer are the last norm and the output layer
        own = {"ffn_norm": (3.0 * DECAY, 0.0), "norm": (3.0, 0.0), "tok_embeddings": (0.1 * DECAY**2, 0.0)}
        own |= {"output": (1.0, 0.5), "w1": (DECAY, 2.0), "w3": (DECAY, 2.0)}
        key = *own.get(part, (DECAY, 0.5)), part == "output"
        kinds.setdefault(key, []).append(p)
    assert len(kinds) == 6
    groups = [
        dict(params=held, weight_decay=decay, scale=scale) | (dict(betas=(0.5, 0.9), eps=1e-3) if other else {})
        for (scale, decay, other), held in kinds.items()
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), fused=True)
    for n, of_step in enumerate(record):
        for name, p in parameters.items():
            p.grad = of_step[name].float().clone()
        torch.nn.utils.clip_grads_with_norm_(parameters.values(), MAX_NORM, of_step["norm"])
        for group in optimizer.param_groups:
            group["lr"] = LR * (n + 1) * group["scale"]
        optimizer.step()
    return start | {n: p.detach().view(-1) for n, p in parameters.items()}


@pytest.mark.parametrize("states", FORMS)
def test_groups_are_those_of_torch(states: str) -> None:
    """In one process, in every form of AdamW's state; and a group that says what all have changes no bit."""

    def strategy(groups: Any) -> Any:
        whole = make("", groups, states=states)
        if states == "fp32":  # as on a GPU; on CPUs it is PyTorch's own
            rows = {n: p.rows for n, p in whole._divided.parameters.items() if p.sum}
            decay = DECAY if groups is GROUPS else None
            _, optim = OptimWrapper(ADAMW, parameter_groups=groups, layer_decay=decay).fit_to(small_model())
            whole._optimizer = OwnAdamW(rows, optim, FORMS["fp32"])
            small_model().fill_weights({n: s.master for n, s in whole._shards().items()}, whole._shapes, CPU)
        return whole

    whole = strategy(GROUPS)
    start = read_masters(whole)
    record = go(whole, *range(4))
    tolerance = {"fp32": 1e-5, "split": 1e-5}.get(states, 2e-2)
    for name, value in expected(start, record).items():
        assert (read_masters(whole)[name] - value).abs().max() < tolerance, name
    plain, same = strategy(()), strategy([dict(match=".", lr_scale=1.0, weight_decay=0.5)])
    go(plain, 0, 1)
    go(same, 0, 1)
    assert all(value.equal(read_masters(same)[name]) for name, value in read_masters(plain).items())


@pytest.mark.processes
def test_every_engine_has_groups_and_resumes(tmp_path: Path) -> None:
    """As torch.optim.AdamW in one process, and from its checkpoint; bit for bit from a checkpoint of their own."""
    alone = make("", GROUPS)
    start = read_masters(alone)
    record = go(alone, 0, 1)
    alone.snapshot(optimizer=True).write(tmp_path / "alone")
    record += go(alone, 2, 3)
    right = read_masters(alone)
    assert all(value.equal(right[name]) for name, value in expected(start, record).items())
    plain = make()
    go(plain, 0, 1, 2, 3)
    assert all((value - right[name]).abs().max() > 1e-3 for name, value in read_masters(plain).items())
    one = make("", [dict(match=".", weight_decay=0.5)])
    go(one, 0, 1, 2, 3)
    assert all(value.equal(read_masters(one)[name]) for name, value in read_masters(plain).items())

    bottom = make("", BOTTOM)
    go(bottom, 0, 1)
    above = {name: value for name, value in read_masters(bottom).items() if "layers" not in name}

    def near(strategy: Any) -> None:
        for name, shard in strategy._shards().items():
            begin = shard.master.begin
            mine = shard.master.read()
            assert bool(shard.state) == (name not in FROZEN)
            assert name not in FROZEN or mine.equal(start[name][begin : begin + len(mine)])
            assert (mine - right[name][begin : begin + len(mine)]).abs().max() < 1e-5, name

    def on_two(ranks: Ranks, folder: Path) -> None:
        for engine in ("fsdp", "zero3"):
            partly = make(engine, BOTTOM, folder)
            go(partly, 0, 1)
            for name, shard in partly._shards().items():
                begin, mine = shard.master.begin, shard.master.read()
                wanted = above.get(name, start[name])[begin : begin + len(mine)]
                assert (mine - wanted).abs().max() < 1e-5, (engine, name)
            del partly
            gc.collect()
        for engine in ENGINES:
            whole = make(engine, GROUPS, folder)
            go(whole, 0, 1)
            sums = {id(s) for m in whole.model.modules() for s in getattr(m, "gradient_sums", {}).values()}
            assert len(sums) in (0, len(right) - len(FROZEN))
            whole.snapshot(optimizer=True).write(folder / engine)
            ranks.gather(None)
            go(whole, 2, 3)
            near(whole)
            again = make(engine, GROUPS, folder)
            again.load(folder / engine)
            go(again, 2, 3)
            assert all(value.equal(read_masters(whole)[name]) for name, value in read_masters(again).items())
            again.load(tmp_path / "alone")
            go(again, 2, 3)
            near(again)
            # DeepSpeed's engines import as they are collected; during another import CPython 3.11 fails (gh-106176)
            del whole, again
            gc.collect()

    settings = deepspeed_config.read_settings(
        "deepspeed_zero3"
    )  # as shipped every weight of so small a model stays full
    settings["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 1000}
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "zero3.json").write_text(json.dumps(settings))
    assert on_ranks(2, on_two, tmp_path / "two") == [0, 0]
    for engine in ENGINES:
        back = make("", GROUPS)
        back.load(tmp_path / "two" / engine)
        go(back, 2, 3)
        near(back)


class Listed(Lion):
    """Takes parameters alone."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__([p for p in params if p.requires_grad], lr)


@pytest.mark.parametrize(
    ("groups", "optimizer", "message"),
    [
        ([dict(weight_decay=0)], ADAMW, r"expected dict\(match=.*\n.*parameter_groups.0\n"),
        ([dict(match="norm"), 3], ADAMW, "changes nothing"),
        ([dict(match="norm", lr_scale=1, weight_decay=None)], ADAMW, "the group 'norm' changes nothing"),
        ([dict(match="nor(m", lr_scale=2)], ADAMW, "is not a regular expression: missing"),
        ([dict(match="norm", lr_mult=2)], ADAMW, "no setting 'lr_mult'"),
        ([dict(match="norm", frozen=1)], ADAMW, "frozen = 1 is not True or False"),
        ([dict(match="norm", frozen=True, lr_scale=2)], ADAMW, "frozen and has settings of training: lr × 2, frozen"),
        ([dict(match="norm", betas=(0.9, 1))], ADAMW, r"betas = \(0.9, 1\) is not two numbers"),
        ([dict(match="norm", eps=1e-6)], dict(type=torch.optim.SGD, lr=1), "SGD has no eps"),
        ([dict(match="norm", lr_scale=-1)], ADAMW, "lr_scale = -1 is not a number of at least 0"),
        ([dict(match="norm", weight_decay=True)], ADAMW, "weight_decay = True is not a number"),
        (dict(match="norm", lr_scale=2), ADAMW, "is not a list"),
        ([dict(match="norm", weight_decay=0)], dict(type=torch.optim.Rprop, lr=1), "Rprop has no weight_decay"),
        ([dict(match="norm", lr_scale=0.5)], dict(type=Listed, lr=1), "Listed does not take parameter groups"),
    ],
)
def test_groups_that_are_rejected(groups: Any, optimizer: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptimWrapper(optimizer, parameter_groups=groups)


@pytest.mark.processes
def test_a_group_has_to_take_a_parameter(tiny: Path, tmp_path: Path, xtuner: Callable[..., int], caplog: Any) -> None:
    """Found by check-cfg with file and line; what the groups take is reported, and a change of it on a resume."""
    names = small_model().trained_names()
    require_matches(names, OptimWrapper(ADAMW, parameter_groups=GROUPS).parameter_groups)
    config = tmp_path / "grouped.py"
    group = "dict(match='norm', weight_decay=0.0), dict(match='wo', frozen=True)"
    line = "parameter_groups=[" + group + ", dict(match={!r}, lr_scale=0.5)],"
    text = tiny.read_text()
    assert text.count("accumulative_counts=accumulative_counts,") == 1

    def write(match: str) -> None:
        own = f"accumulative_counts=accumulative_counts, {line.format(match)}"
        config.write_text(text.replace("accumulative_counts=accumulative_counts,", own))

    for match, message in (
        ("bais", "'bais' matches no trained parameter"),
        ("layers.*atention", r"'layers.\*atention' matches no trained parameter. Similar: 'attention', 'layers'"),
        ("ffn_norm", "'ffn_norm' gets no parameter"),
    ):
        write(match)
        where = r"(.|\n)*grouped.py:\d+ optim_wrapper.parameter_groups.2"
        with pytest.raises(ConfigError, match=f"match = {message}{where}"):
            xtuner("check-cfg", config)
    write("output|embed")
    words = [
        "train",
        config,
        "--work-dir",
        tmp_path / "w",
        "--cfg-options",
        "custom_hooks=[]",
        "train_cfg.max_epochs=1",
    ]
    assert xtuner(*words) == 0
    report = next((tmp_path / "w").glob("*/*.log")).read_text()
    assert "3 parameters that match 'norm': weight_decay=0\n" in report
    assert "1 parameters that match 'wo': frozen\n" in report
    assert "2 parameters that match 'output|embed': lr × 0.5\n" in report
    write("output")
    with pytest.raises(ConfigError, match=r"parameter_groups.2.match: 'output\|embed' → 'output'"):
        xtuner(*words, "--resume")
