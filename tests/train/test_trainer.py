"""Training: resume is exact wherever a run was killed; every hook and setting has its effect; stops and refusals."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.configs import with_hook
from helpers.corpus import write_corpus
from helpers.runs import contents, records
from safetensors.torch import load_file

from xtuner.cli.main import main
from xtuner.core.errors import CheckpointError, ConfigError, DataError
from xtuner.train.resume import find_window_start, fit_accumulative_counts

Command = Callable[..., int]
PLAIN = ["custom_hooks=[]"]

pytestmark = pytest.mark.processes


def killed_after(iterations: int, config: Path, work_dir: Path, options: list[str]) -> None:
    """Run in a forked process that stands still after `iterations`, and SIGKILL it there."""
    read, write = os.pipe()
    paused = with_hook(config, work_dir.with_suffix(".py"), iterations, f"os.write({write}, b'x'), signal.pause()")
    words = ["train", str(paused), "--work-dir", str(work_dir), "--cfg-options", *options]
    child = multiprocessing.get_context("fork").Process(target=main, args=(words,))
    child.start()
    os.close(write)
    assert os.read(read, 1) == b"x", "the run ended before it could be killed"
    os.close(read)
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL


@pytest.mark.slow
def test_resume_is_exact_wherever_it_was_killed(tiny: Path, tmp_path: Path, xtuner: Command) -> None:
    """For every N: N iterations, SIGKILL, resume. Accumulation 2, 25 packs an epoch: iterations cross epoch borders."""
    options = ["max_epochs=2", "save_steps=2", "save_total_limit=2", "max_length=64", "evaluation_inputs=[]"]
    straight = tmp_path / "straight"
    assert xtuner("train", tiny, "--work-dir", straight, "--cfg-options", *options) == 0
    lines = records(straight)
    last = max(lines)
    per_epoch = json.loads((straight / f"iter_{last}.pth" / "trainer.json").read_text())["data"]["num_packs"]
    assert per_epoch % 2 == 1, "no iteration crosses an epoch border"
    assert last == per_epoch  # two epochs, two packs an iteration
    for n in range(1, last):
        work_dir = tmp_path / f"killed_{n}"
        killed_after(n, tiny, work_dir, options)
        assert max(records(work_dir)) == n
        assert xtuner("train", tiny, "--work-dir", work_dir, "--resume", "--cfg-options", *options) == 0
        assert records(work_dir) == lines, n
        assert contents(work_dir / f"iter_{last}.pth") == contents(straight / f"iter_{last}.pth"), n
        shutil.rmtree(work_dir)


def test_sigterm_stops_cleanly(tiny: Path, tmp_path: Path) -> None:
    """Exit code 75 with a checkpoint at the iteration that was reached, although none was due."""
    work_dir = tmp_path / "stopped"
    config = with_hook(tiny, tmp_path / "stopped.py", 3, "os.kill(os.getpid(), signal.SIGTERM)")
    assert main(["train", str(config), "--work-dir", str(work_dir)]) == 75
    assert (work_dir / "last_checkpoint").read_text() == "iter_3.pth\n"
    assert max(records(work_dir)) == 3


def final(work_dir: Path) -> dict[str, torch.Tensor]:
    name = (work_dir / "last_checkpoint").read_text().strip()
    return load_file(work_dir / name / "weights" / "model.safetensors")


@pytest.fixture(scope="module")
def base(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs without custom hooks; tests change one setting of it."""
    work_dir = tmp_path_factory.mktemp("base") / "w"
    words = ["train", str(tiny), "--work-dir", str(work_dir), "--cfg-options", *PLAIN, "max_epochs=2"]
    assert main(words) == 0
    return work_dir


@pytest.fixture
def run(tiny: Path, tmp_path: Path, xtuner: Command) -> Callable[..., Path]:
    """Trains with further options; returns the work dir."""

    def train(name: str, *options: str, words: tuple[str, ...] = ()) -> Path:
        work_dir = tmp_path / name
        assert xtuner("train", tiny, "--work-dir", work_dir, *words, "--cfg-options", *PLAIN, *options) == 0
        return work_dir

    return train


def test_equal_settings_make_equal_runs(base: Path, run: Callable[..., Path]) -> None:
    assert records(run("again", "max_epochs=2")) == records(base)


def test_the_schedule_is_a_hook(base: Path, run: Callable[..., Path]) -> None:
    lines = records(base)
    changed = records(run("changed", "max_epochs=2", "default_hooks.param_scheduler.type=xtuner.train.hooks.Hook"))
    assert {r["lr"] for r in changed.values()} == {2e-3}
    assert len({r["lr"] for r in lines.values()}) > len(lines) // 2


def test_the_seed_of_an_epoch_is_a_hook(base: Path, run: Callable[..., Path]) -> None:
    lines = records(base)
    changed = records(run("changed", "max_epochs=2", "default_hooks.sampler_seed.type=xtuner.train.hooks.Hook"))
    assert changed[2] == lines[2]
    assert changed[len(lines)] != lines[len(lines)]


def test_the_interval_of_log_lines(base: Path, run: Callable[..., Path]) -> None:
    total = len(records(base))
    assert list(records(run("interval", "default_hooks.logger.interval=5"))) == [5, 10, total // 2]


def test_the_timer_adds_to_log_lines(base: Path) -> None:
    record = json.loads(next(base.glob("*/vis_data/scalars.json")).read_text().splitlines()[-1])
    assert {"time", "data_time", "eta", "memory"} <= record.keys()
    assert "tokens_per_s" not in record


def test_which_checkpoints_are_kept(base: Path, run: Callable[..., Path]) -> None:
    one_epoch = len(records(base)) // 2
    kept = run("kept", "save_steps=2", "save_total_limit=2")
    expected = {f"iter_{one_epoch}.pth", f"iter_{(one_epoch - 1) // 2 * 2}.pth"}
    assert {p.name for p in kept.glob("iter_*")} == expected
    epochs = run(
        "epochs", "max_epochs=2", "default_hooks.checkpoint.by_epoch=True", "save_steps=1", "save_total_limit=-1"
    )
    assert len(list(epochs.glob("iter_*"))) == 2


def test_a_checkpoint_without_optimizer_state_is_not_resumed(base: Path, run: Callable[..., Path]) -> None:
    lean = run("lean", "save_optimizer=False")
    assert not (lean / f"iter_{len(records(base)) // 2}.pth" / "optimizer").exists()
    with pytest.raises(CheckpointError, match="save_optimizer=False"):
        run("lean", "save_optimizer=False", words=("--resume",))


@pytest.mark.parametrize(
    "option",
    [
        "lr=0.001",
        "betas=(0.5, 0.5)",
        "weight_decay=0.5",
        "max_norm=0.01",
        "warm_up_ratio=0.5",
        "train_dataloader.sampler.shuffle=False",
        "train_dataloader.sampler.seed=7",
        "train_dataset.seed=7",
        "train_dataset.dataset_cfg.min_length=20",
        "train_dataset.label_rule=xtuner",
        "data_order_path={order}",
        "randomness.seed=5",
        "load_from={checkpoint}",
        "train_dataset.dataset_cfg.file_type=b.bin",
        "optim_wrapper.optimizer.type=torch.optim.NAdam",
    ],
)
def test_a_setting_changes_the_weights(
    option: str, base: Path, corpus: Path, tmp_path: Path, run: Callable[..., Path], xtuner: Command
) -> None:
    order = tmp_path / "order" / "data_order.txt"
    if "{order}" in option:
        xtuner("data", "order", "--data-folder", corpus, "--save-folder", order.parent)
        order.write_text("\n".join(reversed(order.read_text().split())))
    checkpoint = base / (base / "last_checkpoint").read_text().strip()
    weights, changed = (
        final(base),
        final(run("changed", "max_epochs=2", option.format(order=order, checkpoint=checkpoint))),
    )
    assert any(not changed[k].equal(weights[k]) for k in weights)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["dataloader_num_workers=2"], ()),
        (["model.activation_checkpointing=True"], ()),
        (["randomness.deterministic=True"], ()),
        (["log_level=WARNING"], ()),
        ([], ("--seed", "0")),
    ],
)
def test_a_setting_changes_no_weight(
    options: list[str], words: tuple[str, ...], base: Path, run: Callable[..., Path]
) -> None:
    same, weights = final(run("same", "max_epochs=2", *options, words=words)), final(base)
    torch.use_deterministic_algorithms(False)
    assert all(same[k].equal(weights[k]) for k in weights)


def test_a_config_may_name_work_dir_and_resume(base: Path, tiny: Path, tmp_path: Path, xtuner: Command) -> None:
    """The copied run has ended: nothing is trained."""
    shutil.copytree(base, tmp_path / "copy")
    options = [*PLAIN, "max_epochs=2", "resume=True", f"work_dir={tmp_path / 'copy'}"]
    assert xtuner("train", tiny, "--cfg-options", *options) == 0
    assert final(tmp_path / "copy")["output.weight"].equal(final(base)["output.weight"])
    assert len(records(tmp_path / "copy")) == len(records(base))


def test_packs_of_an_iteration(run: Callable[..., Path]) -> None:
    assert len(records(run("counts", "accumulative_counts=1"))) > len(records(run("more", "accumulative_counts=4")))


def test_a_line_is_the_mean_since_the_one_before(tiny: Path, tmp_path: Path, xtuner: Command) -> None:
    """Loss over all targets of the interval; of a single iteration its own, to the last bit; tokens of all so far."""

    def lines(interval: int) -> dict[int, dict[str, Any]]:
        work_dir = tmp_path / str(interval)
        options = (f"default_hooks.logger.interval={interval}", "evaluation_inputs=[]", "log_level=WARNING")
        assert xtuner("train", tiny, "--work-dir", work_dir, "--cfg-options", *options) == 0
        text = next(work_dir.glob("*/vis_data/scalars.json")).read_text()
        return {line["iter"]: line for line in map(json.loads, text.splitlines())}

    single, five = lines(1), lines(5)
    last = max(single)
    assert list(five) == [*range(5, last, 5), last]
    smoothed = targets = begin = 0.0
    for number, line in single.items():
        smoothed = smoothed * 0.98 + line["loss"] * line["targets"]
        targets = targets * 0.98 + line["targets"]
        assert line["loss_smoothed"] == pytest.approx(smoothed / targets, rel=1e-12)
        assert line["tokens"] == number * 2 * 32
        if number in five:
            those = [single[i] for i in range(int(begin) + 1, number + 1)]
            mean = sum(r["loss"] * r["targets"] for r in those) / sum(r["targets"] for r in those)
            assert five[number]["loss"] == pytest.approx(mean, rel=1e-12)
            assert five[number]["targets"] == sum(r["targets"] for r in those)
            same = ("lr", "grad_norm", "tokens", "applied", "loss_smoothed")
            assert [five[number][key] for key in same] == [line[key] for key in same]
            begin = number


def test_averages_of_odd_iterations() -> None:
    """NaN is left out of the mean, iterations without targets weigh nothing, rates are weighted by seconds."""
    from xtuner.train.reporting.averages import Averages
    from xtuner.train.run import Iteration
    from xtuner.train.state import TrainState

    def line(*iterations: tuple[float, int, bool, float]) -> dict[str, Any]:
        averages = Averages()
        for loss, targets, applied, seconds in iterations:
            record = {"time": seconds, "tokens_per_s": 100 / seconds, "own": seconds}
            averages.add(Iteration(TrainState(), 0.1, loss, 1.0, applied, targets, 100, 0, 0.0, record))
        return averages.record()

    nan, none = (float("nan"), 10, False, 1.0), (0.0, 0, False, 3.0)
    found = line((2.0, 30, True, 1.0), nan, none, (4.0, 10, True, 5.0))
    assert (found["loss"], found["targets"], found["applied"]) == (2.5, 50, False)
    assert (found["time"], found["tokens_per_s"], found["own"]) == (2.5, 40.0, 5.0)
    assert line((2.0, 30, True, 1.0), none)["applied"] is True
    assert (line(none)["targets"], line(none)["applied"]) == (0, False)
    assert line(none, nan)["loss"] != line(none, nan)["loss"]


def test_custom_hooks_speak(tiny: Path, tmp_path: Path, xtuner: Command, capsys: Any) -> None:
    options = ["evaluation_freq=5", "evaluation_inputs=['import os', 'x = ']", "SYSTEM='be brief'"]
    assert xtuner("train", tiny, "--work-dir", tmp_path / "w", "--cfg-options", *options) == 0
    log = next((tmp_path / "w").glob("*/*.log")).read_text()
    total = len(records(tmp_path / "w"))
    assert log.count("sample at iteration") == 2 * (2 + total // 5)
    assert log.count("be brief\nimport os") == 2 + total // 5
    assert "first pack begins" in log
    assert "tok/s" in log
    assert "ETA" in log
    assert capsys.readouterr().err.count("sample at iteration") == log.count("sample at iteration")
    environment = json.loads(next((tmp_path / "w").glob("*/environment.json")).read_text())
    assert environment["torch"] == torch.__version__
    assert list((tmp_path / "w").glob("*/vis_data/events.out.tfevents.*"))
    assert json.loads(next((tmp_path / "w").glob("*/config.json")).read_text())["evaluation_freq"] == 5


def test_dry_run_touches_nothing(tiny: Path, tmp_path: Path, xtuner: Command, capsys: Any) -> None:
    assert xtuner("train", tiny, "--work-dir", tmp_path / "w", "--dry-run") == 0
    assert not (tmp_path / "w").exists()
    shown = capsys.readouterr().out  # the report is what a dry run is for
    for word in ("parameters", "documents", "tail of", "iterations", "epochs", "FLOPs without attention"):
        assert word in shown


def test_an_iteration_without_targets_changes_no_weight(tiny: Path, tmp_path: Path, xtuner: Command) -> None:
    from xtuner.data.format.writer import write_bin

    for i in range(3):
        learned = i == 1
        write_bin(tmp_path / "data" / f"{i}.bin", [[5 if learned else -5] * 70])
    options = [f"dataset_folder={tmp_path / 'data'}", "accumulative_counts=1", "save_steps=1", "save_total_limit=-1"]
    options += ["train_dataloader.sampler.shuffle=False", *PLAIN]
    assert xtuner("train", tiny, "--work-dir", tmp_path / "w", "--cfg-options", *options) == 0
    lines = records(tmp_path / "w")
    assert [r["targets"] > 0 for r in lines.values()] == [False, False, True, True, False, False]
    assert [r["applied"] for r in lines.values()] == [r["targets"] > 0 for r in lines.values()]
    weights = [load_file(tmp_path / "w" / f"iter_{i}.pth" / "weights" / "model.safetensors") for i in range(1, 7)]
    same = [all(a[k].equal(b[k]) for k in a) for a, b in pairwise(weights)]
    assert same == [True, False, False, True, True]


def test_data_without_anything_to_learn(tiny: Path, tmp_path: Path, xtuner: Command, capsys: Any) -> None:
    """Reported once and then counted; a whole epoch, or a whole run, without a target is an error (65)."""
    from xtuner.data.format.writer import write_bin

    write_bin(tmp_path / "data" / "a.bin", [[-5] * 32] * 25)
    options = [f"dataset_folder={tmp_path / 'data'}", "accumulative_counts=1", "save_steps=1", *PLAIN]
    for name, more in (("a", []), ("b", ["max_epochs=3"])):
        capsys.readouterr()
        with pytest.raises(DataError, match="no token to learn from in 25 packs: nothing was trained"):
            xtuner("train", tiny, "--work-dir", tmp_path / name, "--cfg-options", *options, *more)
        said = capsys.readouterr().err
        assert said.count("changed no weight") == 1
        assert said.count("10 iterations so far had no token") == 1
    write_bin(tmp_path / "data" / "b.bin", [[5] * 32])
    capsys.readouterr()
    assert xtuner("train", tiny, "--work-dir", tmp_path / "w", "--cfg-options", *options) == 0
    said = capsys.readouterr().err
    assert said.count("changed no weight") == 1
    assert "25 iterations had no token to learn from" in said.splitlines()[-1]


def test_many_dropped_tokens_are_reported(tiny: Path, tmp_path: Path, xtuner: Command, capsys: Any) -> None:
    """Small files and long packs: how much is lost and what to do, which then works."""
    from xtuner.data.format.writer import write_bin

    for i in range(10):
        write_bin(tmp_path / "data" / "en" / f"{i}.bin", [[5] * 10] * (4 if i else 40))
    options = ["--cfg-options", f"dataset_folder={tmp_path / 'data'}", "max_length=100", "warm_up_ratio=0.5", *PLAIN]
    assert xtuner("train", tiny, "--work-dir", tmp_path / "w", "--dry-run", *options) == 0
    said = "47.4% of the tokens (360 of 760) are not trained on: the last tokens of each file fill no pack of 100 "
    said += "(9 of 10 files fill none at all)"
    shown = capsys.readouterr()
    assert said in shown.err
    assert "360 tokens (47.4%) at the ends of files" in shown.out
    assert xtuner("data", "stats", tmp_path / "data", "--max-length", "100") == 0
    shown = capsys.readouterr().out
    assert said in shown
    commands = shown[shown.index("mkdir -p joined") :].splitlines()[0].rpartition("; ")
    assert commands[2] == "xtuner data check joined --fix-meta"
    subprocess.run(commands[0], shell=True, check=True, cwd=tmp_path)
    assert xtuner(*commands[2].split()[1:3], tmp_path / "joined", "--fix-meta") == 0
    assert xtuner("data", "stats", tmp_path / "joined", "--max-length", "100") == 0
    shown = capsys.readouterr().out
    assert "dropped tails: 60 tokens (7.9%)" in shown
    assert "not trained on" not in shown


def test_refusals(tiny: Path, corpus: Path, tmp_path: Path, xtuner: Command) -> None:
    work_dir = tmp_path / "w"
    train = ("train", tiny, "--work-dir", work_dir)
    assert xtuner(*train, "--cfg-options", *PLAIN) == 0
    other = write_corpus(tmp_path / "other", 10, seed=1)
    order = tmp_path / "order.txt"
    order.write_text("en/a.bin\nen/b.bin\ncode/a.bin\ncode/b.bin\n")
    for error, words, message in (
        (
            DataError,
            ["--resume", "--cfg-options", f"dataset_folder={other}"],
            r"not what the checkpoint was trained on: files: 4 changed \(code/a\.bin, code/b\.bin, en/a\.bin, …\)",
        ),
        (DataError, ["--resume", "--cfg-options", "max_length=16"], r"not what .*: max_length: 32 → 16 \(train_data"),
        (
            DataError,
            ["--resume", "--cfg-options", f"data_order_path={order}"],
            "order of files: number 1 was code/a.bin",
        ),
        (
            DataError,
            ["--resume", "--cfg-options", "train_dataset.dataset_cfg.min_length=20"],
            r"trained on: train_dataloader\.dataset\.dataset_cfg\.min_length: 0 → 20\n",
        ),
        (
            ConfigError,
            ["--resume", "--cfg-options", "accumulative_counts=1"],
            "an iteration took 2 packs and would take 1: accumulative_counts: 2 → 1",
        ),
        (
            ConfigError,
            ["--resume", "--cfg-options", "max_epochs=5"],
            "the run had 15 iterations and would have 75: max_epochs: 1 → 5",
        ),
        (ConfigError, ["--resume", str(tmp_path / "nowhere")], "no such folder"),
        (ConfigError, ["--resume", str(corpus)], "no checkpoint there"),
        (ConfigError, ["--resume", ""], "an empty path"),
        (ConfigError, ["--cfg-options", "dataset_folder=/nowhere"], "data folder does not exist"),
        (DataError, ["--cfg-options", "max_length=100000"], "0 packs, and one iteration takes 2"),
        (DataError, ["--cfg-options", f"dataset_folder={tmp_path / 'w'}"], "no .bin file"),
        (ConfigError, ["--launcher", "slurm"], "needs SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID"),
    ):
        with pytest.raises(error, match=message):
            xtuner(*train, *words)


def test_a_damaged_checkpoint_is_passed_over(tiny: Path, tmp_path: Path, xtuner: Command) -> None:
    """One flipped byte in the newest: it is named, and the run goes on from the one before, to the same end."""
    options = ["--cfg-options", *PLAIN, "save_steps=4", "save_total_limit=-1"]
    assert xtuner("train", tiny, "--work-dir", tmp_path / "w", *options) == 0
    names = sorted((p.name for p in (tmp_path / "w").glob("iter_*")), key=lambda n: int(n[5:-4]))
    good = contents(tmp_path / "w" / names[-1])
    file = tmp_path / "w" / names[-1] / "optimizer" / "rank_00000.safetensors"
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    assert xtuner("train", tiny, "--work-dir", tmp_path / "w", "--resume", *options) == 0
    assert contents(tmp_path / "w" / names[-1]) == good
    log = sorted((tmp_path / "w").glob("*/*.log"))[-1].read_text()
    assert f"{names[-1]} is damaged" in log
    assert f"resumed from {tmp_path / 'w' / names[-2]}" in log
    file = tmp_path / "w" / names[0] / "trainer.json"
    file.write_text(file.read_text().replace("{", "[", 1))
    with pytest.raises(CheckpointError, match="altered"):
        xtuner("train", tiny, "--work-dir", tmp_path / "w", "--resume", tmp_path / "w" / names[0], *options)


def test_windows_of_packs_are_not_left_in_the_middle() -> None:
    """Of 7 iterations with 2 packs each, begun at pack 4: another size begins at a border, or is refused."""

    def start(iteration: int, balance: int, per_iteration: int = 2, packs: int = 50) -> int:
        facts = dict(balance=7, packs_per_iteration=2, windows_from=4, data=dict(num_packs=50))
        position = SimpleNamespace(packs_before=lambda _: 2 * iteration)
        found: Any = SimpleNamespace(
            facts=facts, where="iter", state=SimpleNamespace(position=position, iteration=iteration)
        )
        lengths: Any = SimpleNamespace(packs_per_epoch=50, packs_per_iteration=per_iteration, num_packs=packs)
        return find_window_start(found, balance, lengths)

    assert start(12, 7) == 4
    assert start(16, 1) == 32
    assert start(12, 1, packs=60) == 24  # other data: no pack is the same
    for balance, per_iteration in ((1, 2), (16, 2), (7, 4)):
        with pytest.raises(ConfigError, match="iteration 12 lies within 7 iterations") as raised:
            start(12, balance, per_iteration)
        assert raised.value.do.startswith("resume after iteration 9 or 16, or keep train_dataloader.balance = 7")


def test_packs_that_do_not_divide_over_groups() -> None:
    facts = dict(packs_per_iteration=1, begun_on=1, sharers=2, config={"accumulative_counts": 1})
    found: Any = SimpleNamespace(facts=facts, where="iter")
    with pytest.raises(ConfigError, match="1 packs an iteration cannot be divided over 2 ranks") as raised:
        fit_accumulative_counts(found, 1, ranks=2, sharers=1)
    assert "on 1 groups of 2 ranks that share packs" in raised.value.why
    assert raised.value.do.endswith("on 2 ranks set that to one of: 2")
    with pytest.raises(ConfigError, match="over 2 groups of 2 ranks that share packs") as raised:
        fit_accumulative_counts(found, 1, ranks=2, sharers=2)
    assert raised.value.do.endswith("on 4 ranks set that to one of: 4")
