"""One rank is killed, stopped, hangs, fails or meets a NaN: the run ends soon, and says which rank, where and in what.

Two real processes that train; faults come from outside, by signals, or from a hook of rank 1's.
"""

import os
import re
import signal
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  once, before processes are forked
import pytest
from helpers.configs import TWO, full_config, with_hook
from helpers.ranks import exit_codes, start_ranks, stderr_of
from helpers.runs import assert_equals_one_process

from xtuner.cli.main import main
from xtuner.core import files
from xtuner.dist import heartbeat
from xtuner.dist.shipped_launchers import RankInfo

pytestmark = pytest.mark.processes

HERE = re.escape(RankInfo().host)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks look at each other often."""
    for name, seconds in (("INTERVAL", 0.1), ("GRACE", 1.0), ("SUSPENDED", 60.0)):
        monkeypatch.setattr(heartbeat, name, seconds)


@pytest.fixture
def impatient(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds instead of minutes until a rank counts as lost."""
    for name, seconds in (("SILENT", 3.0), ("STUCK", 4.0)):
        monkeypatch.setattr(heartbeat, name, seconds)


def train(tiny: Path, folder: Path, action: str, *options: str) -> list[Any]:
    """After iteration 2 every rank notes that it is there, in `at.RANK`; rank 1 then does `action`, in a hook."""
    note = f"rank = os.environ['RANK']; open({str(folder)!r} + '/at.' + rank, 'w').close(); r, w = os.pipe()"
    config = with_hook(tiny, folder / "run.py", 2, f"{note}\n            if rank == '1':\n                {action}")
    words = ["train", config, "--work-dir", folder / "w", "--launcher", "pytorch", "--fsdp"]
    return [*words, "--cfg-options", "evaluation_inputs=[]", "save_steps=1", "max_epochs=1000", *options]


def wait(folder: Path, children: list[Any]) -> None:
    """Until both ranks are after iteration 2."""
    while not all((folder / f"at.{r}").exists() for r in range(2)):
        assert all(c.is_alive() for c in children), stderr_of(folder, 0) + stderr_of(folder, 1)
        children[0].join(0.05)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_is_killed(victim: int, quick: None, tiny: Path, tmp_path: Path) -> None:
    children = start_ranks(train(tiny, tmp_path, "pass"), tmp_path)
    wait(tmp_path, children)
    children[victim].kill()
    codes = exit_codes(children)
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == 1
    text = stderr_of(tmp_path, 1 - victim)
    if victim:
        assert re.search(
            rf"rank 1 on {HERE} \(process {children[1].pid}\) was in iteration \d+, last activity: \w+", text
        ), text
        assert "first pack begins" not in text.partition("rank 1 on")[2].split("where:")[0]  # its last lines, not all
    else:
        assert "lost contact with rank 0" in text
    assert "run again with --resume auto" in text or "cannot continue" in text
    whole = [p for p in (tmp_path / "w").glob("iter_*.pth") if (p / files.MANIFEST).is_file()]
    assert whole
    for folder in whole:
        files.verify(folder)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_stands_still(victim: int, impatient: None, tiny: Path, tmp_path: Path) -> None:
    """SIGSTOP closes no connection: who still runs notices the silence, and writes where it stood."""
    children = start_ranks(train(tiny, tmp_path, "pass"), tmp_path)
    wait(tmp_path, children)
    os.kill(children[victim].pid, signal.SIGSTOP)
    children[1 - victim].join(60)
    assert children[1 - victim].exitcode == 1
    children[victim].kill()
    exit_codes(children)
    text, log = stderr_of(tmp_path, 1 - victim), max((tmp_path / "w").glob(f"*/{'2*' if victim else 'rank_00001'}.log"))
    if victim:
        assert re.search(
            rf"no heartbeat for 3 s:\nrank 1 on {HERE} \(process {children[1].pid}\) was in iteration \d+", text
        )
    else:
        assert "no reply for 3 s" in text or "no heartbeat for 3 s:\nrank 0 on" in text
    assert str(log) in text
    stacks = log.read_text()
    assert "Current thread" in stacks
    assert re.search(r'File ".*trainer.py", line \d+ in loop', stacks)


def test_all_wait_for_one(impatient: None, tiny: Path, tmp_path: Path) -> None:
    """A hang: every process lives and beats, none gets on. The one that is behind is told first, with all stacks."""
    children = start_ranks(train(tiny, tmp_path, "os.read(r, 1)"), tmp_path)
    assert exit_codes(children) == [1, 1]
    text = stderr_of(tmp_path, 0)
    behind = text.partition("no rank made progress for 4 s; those furthest behind first:\n")[2].splitlines()
    assert re.match(
        rf"rank 1 on {HERE} \(process {children[1].pid}\) was in iteration 2, last activity: ", behind[0]
    ), text
    assert any("rank 0 on" in line for line in behind)
    log = next((tmp_path / "w").glob("*/rank_00001.log")).read_text()
    assert re.search(r'File ".*run.py", line \d+ in after_iteration', log)  # the hook that hangs, by file and line


def test_a_rank_fails(quick: None, tiny: Path, tmp_path: Path) -> None:
    children = start_ranks(train(tiny, tmp_path, "raise ValueError('of rank 1')"), tmp_path)
    assert exit_codes(children) == [1, 1]
    assert "rank 1 has failed: ValueError: of rank 1" in stderr_of(tmp_path, 0)
    assert "ValueError: of rank 1" in stderr_of(tmp_path, 1)
    assert "in after_iteration" in stderr_of(tmp_path, 1)  # the traceback is that rank's


@pytest.mark.parametrize("first", [0, 1])
def test_ctrl_c_twice(first: int, quick: None, tiny: Path, tmp_path: Path) -> None:
    """Rank `first` gets the second one before the other does: rank 0 alone says how to continue; both end with 130."""
    twice = f"if rank == '{first}': os.kill(os.getpid(), signal.SIGINT)"
    action = f"pass\n            os.kill(os.getpid(), signal.SIGINT)\n            {twice}"
    assert exit_codes(start_ranks(train(tiny, tmp_path, action), tmp_path)) == [130, 130]
    assert "stopped without saving, after iteration 2" in stderr_of(tmp_path, 0)
    assert "to continue from it: torchrun --nproc-per-node=2 -m xtuner train" in stderr_of(tmp_path, 0)
    assert not re.search("xtuner: |rank 1: |Traceback", stderr_of(tmp_path, 1)), stderr_of(tmp_path, 1)


POISON = "next(p for n, p in run.strategy.model.named_parameters() if 'wo' in n).data.fill_(float('nan'))"


def test_a_nan_of_one_rank(quick: None, tiny: Path, tmp_path: Path) -> None:
    """Rank 1's part of a weight: all end with 65; the packs of all ranks and what to run again are told once."""
    children = start_ranks(train(tiny, tmp_path, POISON), tmp_path)
    assert exit_codes(children) == [65, 65]
    text = stderr_of(tmp_path, 0)
    assert re.search(r"iteration 3: loss nan, gradient norm .*; the step was not applied", text)
    packs = re.search(r"packs \[(.*?)\] of ", text)
    assert packs
    assert len(packs[1].split(",")) == 4  # 2 of each rank
    assert "--resume" in text
    assert "iter_2.pth" in text
    assert "xtuner: " not in stderr_of(tmp_path, 1)


def test_too_few_packs_for_the_ranks(tiny: Path, tmp_path: Path) -> None:
    children = start_ranks(train(tiny, tmp_path, "pass", "max_length=512"), tmp_path)
    assert exit_codes(children) == [65, 65]
    assert re.search(r"\d packs, and one iteration takes 4 on 2 ranks", stderr_of(tmp_path, 0))
    assert "or use fewer ranks" in stderr_of(tmp_path, 0)
    assert "packs, and" not in stderr_of(tmp_path, 1)


def test_a_suspended_job_goes_on(monkeypatch: pytest.MonkeyPatch, impatient: None, tiny: Path, tmp_path: Path) -> None:
    """All ranks stopped for longer than a rank may be silent, as by `scontrol suspend`: nobody is taken for lost."""
    monkeypatch.setattr(heartbeat, "SUSPENDED", 0.8)
    children = start_ranks(train(tiny, tmp_path, "pass"), tmp_path)
    wait(tmp_path, children)
    for child in children:
        os.kill(child.pid, signal.SIGSTOP)
    children[0].join(3.5)  # it cannot end: this is a wait
    for child in children:
        os.kill(child.pid, signal.SIGCONT)
    children[0].join(1.0)
    assert all(c.is_alive() for c in children), stderr_of(tmp_path, 0) + stderr_of(tmp_path, 1)
    os.kill(children[0].pid, signal.SIGTERM)
    assert exit_codes(children) == [75, 75]


def test_other_numbers_of_ranks(tiny: Path, tmp_path: Path, alone: Path) -> None:
    """2 → 1 → 4 processes by `--resume`, ZeRO-2, then one process, then FSDP: the end is that of one process."""
    path = full_config(tiny, tmp_path, TWO)
    with_hook(path, path, "3 or it.state.iteration == 6", "os.kill(os.getpid(), signal.SIGTERM)")
    words = ["train", path, "--work-dir", tmp_path / "w", "--resume", "auto"]

    def by(name: str) -> tuple[object, ...]:
        facts = files.read_json(tmp_path / "w" / name / "trainer.json")
        return tuple(facts[key] for key in ("strategy", "ranks", "begun_on", "packs_per_iteration"))

    together = [*words, "--launcher", "pytorch"]
    assert exit_codes(start_ranks([*together, "--deepspeed", "deepspeed_zero2"], tmp_path)) == [75, 75], stderr_of(
        tmp_path, 0
    )
    assert by("iter_3.pth") == ("zero2", 2, 2, 4)
    assert exit_codes(start_ranks([*together, "--fsdp"], tmp_path, ranks=3)) == [2, 2, 2]
    assert "4 packs an iteration cannot be divided over 3 ranks" in stderr_of(tmp_path, 0)
    assert "resume on one of these numbers of ranks: 1, 2, 4" in stderr_of(tmp_path, 0)
    assert main(list(map(str, words))) == 75
    assert by("iter_6.pth") == ("single", 1, 2, 4)
    assert exit_codes(start_ranks(together, tmp_path, ranks=4)) == [0] * 4, stderr_of(tmp_path, 0)
    assert by("iter_9.pth") == ("fsdp", 4, 2, 4)
    assert_equals_one_process(path, tmp_path / "w", alone)
