"""Each optimizer of `torch.optim` under each engine: what docs/*/config.md say is what happens here.

Two iterations, a checkpoint, two more; then the same two from the checkpoint, in objects of their own, bit for bit.
"""

import inspect
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  once, before processes are forked
import pytest
import torch
from helpers.models import CPU, Lion, odd_model, read_masters, small_model, uneven_packs
from helpers.paths import ROOT
from helpers.ranks import on_ranks

from xtuner.core.errors import CheckpointError, ConfigError
from xtuner.dist import collectives
from xtuner.dist.collectives import Ranks
from xtuner.engine.base import Strategy
from xtuner.engine.strategies import select
from xtuner.engine.zero import deepspeed_config
from xtuner.optim.optim_wrapper import OptimWrapper
from xtuner.optim.optimizer_traits import known_traits, try_optimizer

PACKS, LR = 2, 1e-2
ENGINES = {  # as columns of the docs: --deepspeed, --fsdp
    "one process": (None, None),
    "FSDP": (None, "full"),
    "ZeRO-1": ("deepspeed_zero1", None),
    "ZeRO-2": ("deepspeed_zero2", None),
    "ZeRO-3": ("deepspeed_zero3", None),
}
FORMS: dict[str, dict[str, Any]] = {
    "AdamW(amsgrad=True)": dict(amsgrad=True),
    "AdamW(maximize=True)": dict(maximize=True),
    "Adam(foreach=True)": dict(foreach=True),
    "NAdam(decoupled_weight_decay=True)": dict(decoupled_weight_decay=True),
    "RMSprop(momentum=0.9, centered=True)": dict(momentum=0.9, centered=True),
    "SGD(momentum=0.9, nesterov=True)": dict(momentum=0.9, nesterov=True),
}
WORKS, REJECTED_BY_CHECK, REJECTED_BY_TRAIN = "✓", "`check-cfg`", "`train`"


def rows() -> dict[str, dict[str, Any]]:
    """Name in the docs → spec."""
    kinds = [k for k in vars(torch.optim).values() if inspect.isclass(k) and issubclass(k, torch.optim.Optimizer)]
    found = {k.__name__: dict(type=k, lr=LR) for k in kinds if k is not torch.optim.Optimizer}
    found |= {name: dict(type=getattr(torch.optim, name.split("(")[0]), lr=LR, **a) for name, a in FORMS.items()}
    return dict(sorted(found.items()))


def make(spec: dict[str, Any], engine: str, folder: Path) -> Strategy:
    zero, fsdp = ENGINES[engine]
    if engine == "ZeRO-3":
        zero = str(folder.parents[1] / "zero3.json")
    optim, model = OptimWrapper(spec, None, PACKS // collectives.ALL.size), small_model()
    return select.build_strategy(select.choose_strategy(model, optim, CPU, zero, fsdp), model, optim, CPU)


def go(strategy: Strategy, iterations: range) -> Iterator[tuple[float, float, bool]]:
    """With a rate that changes, as in warm-ups."""
    everything, rank, ranks = uneven_packs(), collectives.rank(), collectives.ALL.size
    for n in iterations:
        these = everything[PACKS * n : PACKS * (n + 1)]
        loss = strategy.forward_backward(these[rank::ranks], sum(p.num_targets for p in these))
        yield (loss, *strategy.step(LR * (n + 1), None))


def trained(spec: dict[str, Any], engine: str, folder: Path) -> list[tuple[float, float, bool]]:
    """Losses and norms of four iterations; the last two are the same after a resume."""
    whole = make(spec, engine, folder)
    lines = list(go(whole, range(2)))
    whole.snapshot(optimizer=True).write(folder)
    collectives.ALL.gather(None)
    lines += go(whole, range(2, 4))
    again = make(spec, engine, folder)
    again.load(folder)
    assert list(go(again, range(2, 4))) == lines[2:]
    for name, master in read_masters(again).items():
        assert master.equal(read_masters(whole)[name]), name
    assert all(applied for _, _, applied in lines)
    collectives.ALL.gather(None)
    return lines


def outcome(run: Callable[[], Any], rejected: str) -> str:
    """What the docs write of it: `rejected` after an error that names the setting and what to use instead."""
    try:
        run()
    except ConfigError as e:
        right = e.where.startswith("optim_wrapper.optimizer") and e.why and "AdamW" in e.do
        return rejected if right else str(e)
    return WORKS


@pytest.mark.slow
@pytest.mark.processes
def test_what_the_docs_say_of_each_optimizer_happens(tmp_path: Path) -> None:
    table, alone = {}, {}
    for name, spec in rows().items():
        verdict = outcome(lambda spec=spec: OptimWrapper(spec), REJECTED_BY_CHECK)
        table[name] = [verdict] * (1 if verdict == WORKS else len(ENGINES))
        if verdict == WORKS:
            alone[name] = trained(spec, "one process", tmp_path / name)

    def on_two(_: Ranks, folder: Path) -> None:
        found: dict[str, list[str]] = {}
        for name in alone:
            found[name] = []
            for engine in list(ENGINES)[1:]:

                def run(name: str = name, engine: str = engine) -> None:
                    place = folder / name / engine
                    place.mkdir(parents=True, exist_ok=True)
                    lines = trained(rows()[name], engine, place)
                    for (loss, norm, _), (true_loss, true_norm, _) in zip(lines, alone[name], strict=True):
                        assert abs(loss - true_loss) < 1e-4, (name, engine)
                        assert abs(norm - true_norm) < 1e-3 * true_norm, (name, engine)

                found[name].append(outcome(run, REJECTED_BY_TRAIN))
        if collectives.is_main():
            (folder / "found.json").write_text(json.dumps(found))

    settings = deepspeed_config.read_settings(
        "deepspeed_zero3"
    )  # as shipped every weight of so small a model stays whole
    settings["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 1000}
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "zero3.json").write_text(json.dumps(settings))
    assert on_ranks(2, on_two, tmp_path / "two") == [0, 0]
    for name, cells in json.loads((tmp_path / "two" / "found.json").read_text()).items():
        table[name] += cells
    for language in ("en", "zh_cn"):
        text = (ROOT / "docs" / language / "config.md").read_text()
        for name, cells in table.items():
            assert f"| `{name}` | {' | '.join(cells)} |" in text, (language, name)
        documented = re.findall(r"^\| `(\w+)(?:\(.*\))?` \| (?:✓|`check-cfg`)", text, re.MULTILINE)
        assert {n for n in documented if hasattr(torch.optim, n)} == {n.split("(")[0] for n in table}


# ---- optimizers of other packages -----------------------------------------------------------------------------------


class Lars(Lion):
    """A rate for each matrix as a whole, and a state whose shape is a parameter's turned round."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    turned = self.state[p].setdefault("turned", torch.zeros_like(p.T if p.dim() > 1 else p))
                    flat = self.state[p].setdefault("flat", torch.zeros(p.numel()))
                    turned += p.grad.T if p.dim() > 1 else p.grad
                    flat += turned.T.reshape(-1) if p.dim() > 1 else turned
                    p.sub_(flat.view_as(p), alpha=group["lr"] * float(p.norm() / (1e-9 + p.grad.norm())))


class Hidden(Lion):
    """Keeps what it needs where no checkpoint looks."""

    count = 0

    def step(self) -> None:  # type: ignore[override]
        self.count += 1
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p.data.sub_(p.grad, alpha=1e-3 / self.count)


class Listed(Lion):
    def step(self) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            self.state[p]["history"] = [1]


class Eager(Lion):
    """As Adagrad: state from the start, for parameters that DeepSpeed replaces."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, lr)
        for p in self.param_groups[0]["params"]:
            self.state[p]["total"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                self.state[p]["total"] += p.grad
                p.sub_(self.state[p]["total"], alpha=self.param_groups[0]["lr"])


@pytest.mark.processes
def test_optimizers_of_other_packages(tmp_path: Path) -> None:
    """They train and resume, or the reason why not is seen before anything starts."""
    for kind in (Lion, Lars, Eager, lambda params, lr: Lion(params, lr)):
        trained(dict(type=kind, lr=LR), "one process", tmp_path / getattr(kind, "__name__", "function"))
    for kind, reason in (
        (Hidden, "Hidden cannot be resumed from a checkpoint: its next steps differ"),
        (Listed, "Listed cannot train this model: its state 'history' is a list"),
        (lambda params, lr: params, "it is a list, not a torch.optim.Optimizer"),
        (torch.optim.Muon, "Muon cannot train this model: Muon only supports 2D parameters"),
        (torch.optim.SparseAdam, "SparseAdam does not support dense gradients"),
        (torch.optim.LBFGS, "LBFGS is not supported"),
    ):
        with pytest.raises(ConfigError, match=reason):
            OptimWrapper(dict(type=kind, lr=LR))
    with pytest.raises(ConfigError, match=r"AdamW does not take these values: Invalid beta parameter at index 0: 2"):
        OptimWrapper(dict(type=torch.optim.AdamW, lr=LR, betas=(2, 0.9)))
    capturable = OptimWrapper(dict(type=torch.optim.NAdam, lr=LR, capturable=True))  # right on a GPU
    with pytest.raises(ConfigError, match=r"NAdam cannot train this model: .*capturable"):
        capturable.traits(CPU)

    def on_two(_: Ranks, folder: Path) -> None:
        (folder / "zero3.json").write_text("{}")
        for engine in ("FSDP", "ZeRO-2"):
            (folder / engine).mkdir(exist_ok=True)
            trained(dict(type=Lion, lr=LR), engine, folder / engine)
        trained(dict(type=Eager, lr=LR), "FSDP", folder / "FSDP")
        for engine, kind, reason in (
            ("FSDP", Lars, r"Lars cannot be used with --fsdp full"),
            ("ZeRO-1", Lars, r"Lars cannot be used with --deepspeed deepspeed_zero1"),
            ("ZeRO-2", Eager, r"Eager cannot be used with --deepspeed deepspeed_zero2"),
        ):
            with pytest.raises(ConfigError, match=reason) as error:
                make(dict(type=kind, lr=LR), engine, folder)
            assert (
                "creates its state when it is built" if kind is Eager else "each element independently"
            ) in error.value.why

    assert on_ranks(2, on_two, tmp_path / "two") == [0, 0]


@pytest.mark.processes
def test_a_checkpoint_without_state_is_not_one_without_optimizer(tmp_path: Path) -> None:
    """Plain SGD has no state; weights alone are another thing. A resume on more ranks, too."""
    trained(dict(type=torch.optim.SGD, lr=LR), "one process", tmp_path / "sgd")
    strategy = make(dict(type=torch.optim.SGD, lr=LR), "one process", tmp_path)
    strategy.snapshot(optimizer=False).write(tmp_path / "light")
    with pytest.raises(CheckpointError, match="it was saved with save_optimizer=False"):
        strategy.load(tmp_path / "light")

    def on_two(_: Ranks, folder: Path) -> None:
        strategy = make(dict(type=torch.optim.SGD, lr=LR), "FSDP", folder)
        strategy.load(tmp_path / "sgd")
        assert len(list(go(strategy, range(2, 4)))) == 2

    assert on_ranks(2, on_two, tmp_path / "two") == [0, 0]


def test_what_is_known_of_adamw_is_what_a_trial_finds() -> None:
    """It saves the import of PyTorch's compiler. Whatever its constructor rejects is tried, for the message."""
    usual = dict(lr=1e-3, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    for arguments in ({"lr": 1e-3}, usual):
        build = partial(torch.optim.AdamW, fused=True, **arguments)
        tried, known = try_optimizer(build, "AdamW", CPU), known_traits(torch.optim.AdamW, arguments, CPU)
        assert known
        assert (known.moments, known.shardable, known.built_with_state) == (8, True, False)
        assert (tried.moments, tried.shardable, tried.built_with_state) == (8, True, False)
        (key,) = tried.scalars
        assert (key, tried.scalars[key].dtype, tried.scalars[key].device) == ("step", torch.float32, CPU)
        assert (known.scalars[key].dtype, known.scalars[key].device) == (torch.float32, CPU)
    for wrong in (
        dict(lr=-1.0), dict(eps=-1.0), dict(weight_decay=-0.1), dict(betas=(0.9, 1.0)), dict(betas=(0.9, 1)),
        dict(betas=(0.9,)), dict(betas=3), dict(lr="1"), dict(eps=None), dict(lr=float("nan")),
    ):  # fmt: skip
        assert known_traits(torch.optim.AdamW, usual | wrong, CPU) is None, wrong
        with pytest.raises(ConfigError):
            OptimWrapper(optimizer=dict(type=torch.optim.AdamW, **usual | wrong))
    for other in (dict(amsgrad=True), dict(maximize=True), dict(fused=False)):
        assert known_traits(torch.optim.AdamW, usual | other, CPU) is None
    assert known_traits(torch.optim.Adam, usual, CPU) is None
    assert known_traits(torch.optim.AdamW, usual, torch.device("meta")) is None


def test_memory_counts_what_an_optimizer_keeps() -> None:
    from xtuner.dist.mesh import Mesh
    from xtuner.engine import memory

    def state(kind: Any, **arguments: Any) -> float:
        optim = OptimWrapper(dict(type=kind, lr=1, **arguments))
        return memory.plan_memory(odd_model(), optim, CPU, Mesh()).state / memory.num_parameters(odd_model().config)

    assert state(torch.optim.AdamW) == 16
    assert state(torch.optim.AdamW, amsgrad=True) == 20
    assert state(torch.optim.SGD) == 8
    assert state(torch.optim.SGD, momentum=0.9) == 12
    assert 8 < state(torch.optim.Adafactor) < 8.2
