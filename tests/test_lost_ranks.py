"""One rank is killed, stopped, hangs, fails or meets a NaN: the run ends soon, and says which rank, where and in what.

Two real processes that train; faults come from outside, by signals, or from a hook of rank 1's.
"""

import contextlib
import multiprocessing
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  once, before processes are forked
import pytest
from test_launchers import TWO, alone, config, same
from test_places import listening
from test_train import with_hook

from xtuner.cli.main import main
from xtuner.core import files
from xtuner.core.command import exit_with
from xtuner.dist import heartbeat
from xtuner.dist.environment import Place

__all__ = ["alone"]  # the fixture
HERE = re.escape(Place().host)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks look at each other often."""
    for name, seconds in (("BEAT", 0.1), ("LEAVE", 1.0), ("ASLEEP", 60.0)):
        monkeypatch.setattr(heartbeat, name, seconds)


@pytest.fixture
def impatient(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds instead of minutes until a rank counts as lost."""
    for name, seconds in (("SILENT", 3.0), ("STUCK", 4.0)):
        monkeypatch.setattr(heartbeat, name, seconds)


def started(words: list[Any], folder: Path, ranks: int = 2) -> list[Any]:
    """`xtuner train` as that many processes of a launcher; what each tells goes to `told.RANK`."""
    with contextlib.closing(listening()) as server:
        port = str(server.getsockname()[1])
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=_rank, args=(r, ranks, port, list(map(str, words)), folder)) for r in range(ranks)]
    for child in children:
        child.start()
    return children


def _rank(rank: int, ranks: int, port: str, words: list[str], folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": str(ranks)}
    told = os.open(folder / f"told.{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(told, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    try:
        exit_with(lambda: main(words))
    except SystemExit as e:
        os._exit(e.code if isinstance(e.code, int) else 1)


def ended(children: list[Any]) -> list[int]:
    """Exit codes. Processes that have not ended after a minute are killed, and their code is -9."""
    for child in children:
        child.join(60)
    for child in children:
        if child.is_alive():
            child.kill()
    for child in children:
        child.join()
    return [child.exitcode for child in children]


def told(folder: Path, rank: int) -> str:
    return (folder / f"told.{rank}").read_text()


def train(tiny: Path, folder: Path, action: str, *options: str) -> list[Any]:
    """After iteration 2 every rank notes that it is there, in `at.RANK`; rank 1 then does `action`, in a hook."""
    note = f"rank = os.environ['RANK']; open({str(folder)!r} + '/at.' + rank, 'w').close(); r, w = os.pipe()"
    config = with_hook(tiny, folder / "run.py", 2, f"{note}\n            if rank == '1':\n                {action}")
    words = ["train", config, "--work-dir", folder / "w", "--launcher", "pytorch", "--fsdp"]
    return [*words, "--cfg-options", "evaluation_inputs=[]", "save_steps=1", "max_epochs=1000", *options]


def wait(folder: Path, children: list[Any]) -> None:
    """Until both ranks are after iteration 2."""
    while not all((folder / f"at.{r}").exists() for r in range(2)):
        assert all(c.is_alive() for c in children), told(folder, 0) + told(folder, 1)
        children[0].join(0.05)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_is_killed(victim: int, quick: None, tiny: Path, tmp_path: Path) -> None:
    children = started(train(tiny, tmp_path, "pass"), tmp_path)
    wait(tmp_path, children)
    children[victim].kill()
    codes = ended(children)
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == 1
    text = told(tmp_path, 1 - victim)
    if victim:
        assert re.search(rf"rank 1 on {HERE} \(process {children[1].pid}\) was in iteration \d+, last: \w+", text), text
        assert "first pack begins" not in text.partition("rank 1 on")[2].split("where:")[0]  # its last lines, not all
    else:
        assert "rank 0, where all meet, is gone" in text
    assert "run again with --resume auto" in text or "cannot go on" in text
    whole = [p for p in (tmp_path / "w").glob("iter_*.pth") if (p / files.MANIFEST).is_file()]
    assert whole
    for folder in whole:
        files.verify(folder)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_stands_still(victim: int, impatient: None, tiny: Path, tmp_path: Path) -> None:
    """SIGSTOP closes no connection: who still runs notices the silence, and writes where it stood."""
    children = started(train(tiny, tmp_path, "pass"), tmp_path)
    wait(tmp_path, children)
    os.kill(children[victim].pid, signal.SIGSTOP)
    children[1 - victim].join(60)
    assert children[1 - victim].exitcode == 1
    children[victim].kill()
    ended(children)
    text, log = told(tmp_path, 1 - victim), max((tmp_path / "w").glob(f"*/{'2*' if victim else 'rank_00001'}.log"))
    if victim:
        assert re.search(rf"silent for 3 s:\nrank 1 on {HERE} \(process {children[1].pid}\) was in iteration \d+", text)
    else:
        assert "rank 0, where all meet, does not answer for 3 s" in text or "silent for 3 s:\nrank 0 on" in text
    assert str(log) in text
    stacks = log.read_text()
    assert "Current thread" in stacks
    assert re.search(r'File ".*trainer.py", line \d+ in loop', stacks)


def test_all_wait_for_one(impatient: None, tiny: Path, tmp_path: Path) -> None:
    """A hang: every process lives and beats, none gets on. The one that is behind is told first, with all stacks."""
    children = started(train(tiny, tmp_path, "os.read(r, 1)"), tmp_path)
    assert ended(children) == [1, 1]
    text = told(tmp_path, 0)
    behind = text.partition("no rank has got on for 4 s; first those that are behind:\n")[2].splitlines()
    assert re.match(rf"rank 1 on {HERE} \(process {children[1].pid}\) was in iteration 2, last: ", behind[0]), text
    assert any("rank 0 on" in line for line in behind)
    log = next((tmp_path / "w").glob("*/rank_00001.log")).read_text()
    assert re.search(r'File ".*run.py", line \d+ in after_iteration', log)  # the hook that hangs, by file and line


def test_a_rank_fails(quick: None, tiny: Path, tmp_path: Path) -> None:
    children = started(train(tiny, tmp_path, "raise ValueError('of rank 1')"), tmp_path)
    assert ended(children) == [1, 1]
    assert "rank 1 has failed: ValueError: of rank 1" in told(tmp_path, 0)
    assert "ValueError: of rank 1" in told(tmp_path, 1)
    assert "in after_iteration" in told(tmp_path, 1)  # the traceback is that rank's


@pytest.mark.parametrize("first", [0, 1])
def test_ctrl_c_twice(first: int, quick: None, tiny: Path, tmp_path: Path) -> None:
    """Rank `first` gets the second one before the other does: rank 0 alone says how to continue; both end with 130."""
    twice = f"if rank == '{first}': os.kill(os.getpid(), signal.SIGINT)"
    action = f"pass\n            os.kill(os.getpid(), signal.SIGINT)\n            {twice}"
    assert ended(started(train(tiny, tmp_path, action), tmp_path)) == [130, 130]
    assert "stopped without saving, after iteration 2" in told(tmp_path, 0)
    assert "to continue from it: torchrun --nproc-per-node=2 -m xtuner train" in told(tmp_path, 0)
    assert not re.search("xtuner: |rank 1: |Traceback", told(tmp_path, 1)), told(tmp_path, 1)


POISON = "next(p for n, p in run.strategy.model.named_parameters() if 'wo' in n).data.fill_(float('nan'))"


def test_a_nan_of_one_rank(quick: None, tiny: Path, tmp_path: Path) -> None:
    """Rank 1's part of a weight: all end with 65; the packs of all ranks and what to run again are told once."""
    children = started(train(tiny, tmp_path, POISON), tmp_path)
    assert ended(children) == [65, 65]
    text = told(tmp_path, 0)
    assert re.search(r"iteration 3: loss nan, gradient norm .*; the step was not applied", text)
    packs = re.search(r"packs \[(.*?)\] of ", text)
    assert packs
    assert len(packs[1].split(",")) == 4  # 2 of each rank
    assert "--resume" in text
    assert "iter_2.pth" in text
    assert "xtuner: " not in told(tmp_path, 1)


def test_too_few_packs_for_the_ranks(tiny: Path, tmp_path: Path) -> None:
    children = started(train(tiny, tmp_path, "pass", "max_length=512"), tmp_path)
    assert ended(children) == [65, 65]
    assert re.search(r"\d packs, and one iteration takes 4 on 2 ranks", told(tmp_path, 0))
    assert "or use fewer ranks" in told(tmp_path, 0)
    assert "packs, and" not in told(tmp_path, 1)


def test_a_suspended_job_goes_on(monkeypatch: pytest.MonkeyPatch, impatient: None, tiny: Path, tmp_path: Path) -> None:
    """All ranks stopped for longer than a rank may be silent, as by `scontrol suspend`: nobody is taken for lost."""
    monkeypatch.setattr(heartbeat, "ASLEEP", 0.8)
    children = started(train(tiny, tmp_path, "pass"), tmp_path)
    wait(tmp_path, children)
    for child in children:
        os.kill(child.pid, signal.SIGSTOP)
    children[0].join(3.5)  # it cannot end: this is a wait
    for child in children:
        os.kill(child.pid, signal.SIGCONT)
    children[0].join(1.0)
    assert all(c.is_alive() for c in children), told(tmp_path, 0) + told(tmp_path, 1)
    os.kill(children[0].pid, signal.SIGTERM)
    assert ended(children) == [75, 75]


def test_other_numbers_of_ranks(tiny: Path, tmp_path: Path, alone: Path) -> None:
    """2 → 1 → 4 processes by `--resume`, ZeRO-2, then one process, then FSDP: the end is that of one process."""
    path = config(tiny, tmp_path, TWO)
    with_hook(path, path, "3 or it.state.iteration == 6", "os.kill(os.getpid(), signal.SIGTERM)")
    words = ["train", path, "--work-dir", tmp_path / "w", "--resume", "auto"]

    def by(name: str) -> tuple[object, ...]:
        facts = files.read_json(tmp_path / "w" / name / "trainer.json")
        return tuple(facts[key] for key in ("strategy", "ranks", "begun_on", "packs_per_iteration"))

    together = [*words, "--launcher", "pytorch"]
    assert ended(started([*together, "--deepspeed", "deepspeed_zero2"], tmp_path)) == [75, 75], told(tmp_path, 0)
    assert by("iter_3.pth") == ("zero2", 2, 2, 4)
    assert ended(started([*together, "--fsdp"], tmp_path, ranks=3)) == [2, 2, 2]
    assert "4 packs an iteration cannot be divided over 3 ranks" in told(tmp_path, 0)
    assert "resume on one of these numbers of ranks: 1, 2, 4" in told(tmp_path, 0)
    assert main(list(map(str, words))) == 75
    assert by("iter_6.pth") == ("single", 1, 2, 4)
    assert ended(started(together, tmp_path, ranks=4)) == [0] * 4, told(tmp_path, 0)
    assert by("iter_9.pth") == ("fsdp", 4, 2, 4)
    same(path, tmp_path / "w", alone)
