"""Loss spikes and plateaus: reported once, with the documents; and when the next save is due."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from xtuner.cli.status import describe_work_dir
from xtuner.data import InternRepoSampler, load_intern_repo_tokenized_dataset
from xtuner.data.loading.loader import PackLoader
from xtuner.data.loading.sampler import Position
from xtuner.data.packing.pack import PackedDataset
from xtuner.tools.board.snapshot import Snapshots
from xtuner.tools.board.work_dirs import Board
from xtuner.train.hooks import CheckpointHook
from xtuner.train.reporting import loss_watch
from xtuner.train.reporting.loss_watch import Plateaus, Spikes


def curve(seed: int, count: int = 20_000) -> Any:
    """Losses that fall as those of a model, with noise that has a heavier tail than normal noise."""
    noise = np.random.RandomState(seed).standard_t(12, size=count) * 0.04
    return 2.0 + 8.0 * (np.arange(count) + 1) ** -0.3 + noise


def test_a_spike_is_found_once_and_noise_is_none() -> None:
    for seed in range(5):
        losses = curve(seed)
        spikes = Spikes()
        assert [i for i, loss in enumerate(losses) if spikes.find(loss)] == []
        losses[5000] += 0.8  # a single iteration
        losses[9000:9100] += np.linspace(2.0, 0.0, 100)  # one that lasts
        losses[9030] -= 1.0  # and swings
        losses[20:30] += 2.0  # before anything is usual
        spikes = Spikes()
        found = {i: usual for i, loss in enumerate(losses) if (usual := spikes.find(loss))}
        assert list(found)[:2] == [5000, 9000]
        assert len(found) <= 3, found
        assert found[5000][0] == pytest.approx(2.0 + 8.0 * 5001**-0.3, abs=0.05)
        assert found[5000][1] > loss_watch.SPIKE
    steady = Spikes()
    assert not any(steady.find(loss) for loss in [1.0] * 100 + [1.049] * 100)
    assert steady.find(1.2)


def test_a_plateau_is_found_once() -> None:
    for seed in range(5):
        losses = curve(seed)
        plateaus = Plateaus(2000)
        assert [i for i, loss in enumerate(losses) if plateaus.find(loss)] == []
        losses[4000:10_000] = 2.7
        plateaus = Plateaus(2000)
        assert [i for i, loss in enumerate(losses) if plateaus.find(loss)] == [7999]


@pytest.mark.parametrize("balance", [0, 1, 3])
def test_packs_of_an_iteration_are_those_of_all_ranks(corpus: Path, balance: int) -> None:
    data = PackedDataset(load_intern_repo_tokenized_dataset(corpus), 32)
    loaders = [
        PackLoader(data, InternRepoSampler(data, seed=7, rank=rank, world_size=2), balance=balance,
                   accumulative_counts=3, reshuffle=True, windows_from=2)
        for rank in range(2)
    ]  # fmt: skip
    per_epoch = loaders[0].packs_per_epoch
    for skipped in (2, 8, 26, 50):
        position = Position().advance(skipped, per_epoch)
        streams = [loader.numbers_from(position) for loader in loaders]
        for _ in range(8):
            trained = sorted(next(stream) for stream in streams for _ in range(3))
            assert sorted(loaders[1].packs_of_iteration(position)) == trained
            position = position.advance(6, per_epoch)


NOTED = """
from xtuner.train.hooks import Hook
class Noted(Hook):
    priority = 5
    def before_run(self, run):
        compute = run.strategy.forward_backward
        def noted(batch, *more):
            print([b.pack for b in batch], file=open(TRAINED, "a"))
            return compute(batch, *more)
        run.strategy.forward_backward = noted
    def after_iteration(self, run, it):
        if it.state.iteration == 58:
            it.loss *= 3
"""


@pytest.mark.processes
def test_a_spike_of_a_run(
    tiny: Path, tmp_path: Path, xtuner: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its documents are in the log and in events.json, and the board marks it; so with a plateau."""
    config, trained = tmp_path / "spike.py", tmp_path / "packs"
    first = "from torch.optim import AdamW\n"
    text = tiny.read_text().replace(first, f"{first}TRAINED = {str(trained)!r}\n{NOTED}")
    config.write_text(text.replace("custom_hooks = [\n", "custom_hooks = [\n    dict(type=Noted),\n"))
    monkeypatch.setattr(loss_watch, "FEWEST", 10)
    words = ["--cfg-options", "max_epochs=4", "lr=1e-12", "evaluation_inputs=[]", "save_steps=-1"]
    assert xtuner("train", config, "--work-dir", tmp_path / "w", *words) == 0
    numbers = json.loads(trained.read_text().splitlines()[57])
    (events,) = (tmp_path / "w").glob("*/events.json")
    found = [json.loads(line) for line in events.read_text().splitlines()]
    (spike,) = [e for e in found if e["event"] == "spike"]
    assert (spike["iter"], spike["num_packs"]) == (58, 2)
    assert [p["pack"] for p in spike["packs"]] == numbers
    assert spike["loss"] == pytest.approx(3 * spike["usual"], rel=0.05)
    (log,) = (tmp_path / "w").glob("*/2*.log")
    assert log.read_text().count("loss spike at iteration 58: loss ") == 1
    logged = log.read_text().partition("loss spike at ")[2].partition("iter 59/")[0]
    for pack in spike["packs"]:
        assert f"pack {pack['pack']}: documents " in logged
        assert pack["documents"]
        assert pack["file"] in logged
    assert "look at a pack: xtuner data show" in logged
    assert [e["iter"] for e in found if e["event"] == "plateau"] == [20]
    board = Snapshots(Board([tmp_path / "w"], describe_work_dir))
    (run,) = board.list_runs()["runs"]
    shown = board.show_run(run["id"])
    assert shown
    assert [m["iter"] for m in shown["marks"]["spike"]] == [58]
    assert "usual deviations above the usual 6.0" in shown["marks"]["spike"][0]["text"]


@pytest.mark.parametrize(
    ("interval", "by_epoch", "packs", "expected"),
    [(-1, False, 4, None), (5, False, 8, 5), (5, False, 20, 15), (5, False, 74, 36), (1, True, 4, 6), (2, True, 4, 12),
     (1, True, 24, 18)],
)  # fmt: skip
def test_the_next_save(interval: int, by_epoch: bool, packs: int, expected: int | None) -> None:
    """Of 6 epochs of 12 packs, two an iteration: 36 iterations."""
    state = SimpleNamespace(iteration=packs // 2, position=Position().advance(packs, 12))
    plan = SimpleNamespace(packs_per_epoch=12, packs_per_iteration=2)
    run = SimpleNamespace(state=state, plan=plan, max_iterations=36)
    assert CheckpointHook(interval, by_epoch).next_save(run) == expected  # type: ignore[arg-type]
