"""Checkpoints of an earlier version are resumed as if nothing had changed. make_old_checkpoints.py has made them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import deepspeed  # noqa: F401  once, before processes are forked
import pytest
import torch
from helpers.corpus import write_corpus
from helpers.make_old_checkpoints import AT, KEPT, LOSSES, RUNS
from helpers.ranks import exit_codes, on_ranks, start_ranks, stderr_of
from helpers.runs import optimizer_states, records
from safetensors.torch import load_file

from xtuner.compat.translate import load
from xtuner.config.build import build
from xtuner.dist import collectives
from xtuner.dist.collectives import Ranks
from xtuner.engine.strategies import select
from xtuner.train.checkpoints.checkpoint import read_trainer

pytestmark = pytest.mark.processes

LINES = json.loads((KEPT / "losses.json").read_text())
SAME_MACHINE = LINES["computed_by"] == [torch.__version__, torch.backends.cpu.get_cpu_capability()]


@pytest.mark.parametrize("name", RUNS)
def test_an_old_run_continues(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, xtuner: Callable[..., int]
) -> None:
    """Its next ten losses: bit for bit in one process, where the same library computes on the same kind of CPU."""
    monkeypatch.chdir(tmp_path)
    write_corpus(Path("corpus"), 10)
    shutil.copy(KEPT / "config.py", "config.py")
    ranks, options = RUNS[name]
    words = ["train", "config.py", "--work-dir", "w", "--resume", KEPT / name, *options]
    if ranks == 1:
        assert xtuner(*words) == 0
    else:
        assert exit_codes(start_ranks([*words, "--launcher", "pytorch"], tmp_path, ranks)) == [0] * ranks, stderr_of(
            tmp_path, 0
        )
    lines = records(tmp_path / "w")
    assert min(lines) == AT + 1
    losses = [lines[AT + 1 + i]["loss"] for i in range(LOSSES)]
    assert losses == pytest.approx(LINES[name], rel=1e-6)
    if ranks == 1 and SAME_MACHINE:
        assert losses == LINES[name]
    before, after = (read_trainer(folder)[0] for folder in (KEPT / name, tmp_path / "w" / "iter_30.pth"))
    assert (before.iteration, before.packs, after.iteration, after.packs) == (AT, 2 * AT, 30, 60)


@pytest.mark.parametrize(("name", "ranks"), [(name, ranks) for name in RUNS for ranks in (1, 2)])
def test_old_masters_and_moments_are_taken_bit_for_bit(name: str, ranks: int, tmp_path: Path) -> None:
    """By as many processes as saved them and by others, whatever the engine."""
    options = [o for o in RUNS[name][1] if "=" in o]
    config = load(str(KEPT / "config.py"), options)
    zero = next((o for o in RUNS[name][1] if o.startswith("deepspeed")), None) if ranks > 1 else None

    def taken(_: Ranks, folder: Path) -> None:
        source, optim = (build(config.values[key], key) for key in ("model", "optim_wrapper"))
        choice = select.choose(source, optim, torch.device("cpu"), zero, None)
        strategy = select.strategy(choice, source, optim, torch.device("cpu"))
        strategy.load(KEPT / name)
        strategy.snapshot(optimizer=True).write(folder)
        collectives.ALL.gather(None)

    assert on_ranks(ranks, taken, tmp_path) == [0] * ranks
    old, new = (load_file(folder / "weights" / "model.safetensors") for folder in (KEPT / name, tmp_path))
    assert old.keys() == new.keys()
    assert all(new[n].equal(value) for n, value in old.items())
    before, after = optimizer_states(KEPT / name), optimizer_states(tmp_path)
    assert {key.partition("/")[0] for key in before} >= {"exp_avg", "exp_avg_sq", "step"}
    assert before.keys() == after.keys()
    assert all(after[n].equal(value.to(after[n].dtype)) for n, value in before.items())
