"""A rank that makes the others wait is named, with its host and the likely part."""

import json
import platform
from pathlib import Path

import pytest
import torch
from helpers.configs import TWO
from helpers.ranks import exit_codes, start_ranks, stderr_of

from xtuner.dist.collectives import Ranks
from xtuner.train.reporting import rank_times
from xtuner.train.reporting.rank_times import RankClock, RankTimes, SlowRanks, find_slow

USUAL = RankTimes(data=0.01, work=1.9, wait=0.1, product=0.0002)


def others(rank: int, mine: RankTimes, size: int = 8, product: float = 0.0002) -> list[RankTimes]:
    """All others wait for `rank` in each message: an iteration takes as long on all."""
    whole = mine.work + mine.wait
    found = [RankTimes(0.01, 1.5, whole - 1.5, product)] * size
    found[rank] = mine
    return found


@pytest.mark.parametrize(
    ("times", "shortest", "rank", "part"),
    [
        ([USUAL] * 8, 2.0, None, ""),
        (others(3, USUAL._replace(data=0.4, work=2.0, wait=0.0)), 2.0, 3, "data"),
        (others(5, USUAL._replace(work=2.0, wait=0.0)), 2.0, 5, "host"),
        (others(5, USUAL._replace(work=2.0, wait=0.0, product=0.00035)), 2.0, 5, "GPU clocks"),
        ([*[USUAL] * 7, USUAL._replace(product=0.0003)], 2.0, 7, "GPU clocks"),  # kernels wait, hosts do not
        ([USUAL._replace(work=2.9)] * 8, 2.0, -1, "network"),
        ([USUAL._replace(work=2.9, data=1.0)] * 8, 2.0, None, ""),  # all wait for the same file system
        ([USUAL._replace(product=0.0)] * 8, 2.0, None, ""),  # before the first product
        (others(0, USUAL._replace(work=1.98, wait=0.02), size=2), 2.0, 0, "host"),
        ([USUAL, USUAL._replace(work=1.95, wait=0.05)], 2.0, None, ""),  # less than 5 %
    ],
)
def test_who_and_why(times: list[RankTimes], shortest: float, rank: int | None, part: str) -> None:
    found = find_slow(times, shortest)
    assert (found.rank if found else None, found.part if found else "") == (rank, part)


def test_only_what_lasts_is_reported_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_times, "FOR_LONG", 0.0)
    slow = SlowRanks([f"node{i // 4}" for i in range(8)])

    def add(times: list[RankTimes]) -> str:
        found = slow.add(list(times))
        return found[0].splitlines()[0] if found else ""

    late = others(5, USUAL._replace(work=2.0, wait=0.0))
    assert [add(late) for _ in range(4)] == [""] * 4
    assert add([USUAL] * 8) == "", "begins anew"
    logged = [add(late) for _ in range(9)]
    assert logged[:4] + logged[5:] == [""] * 8
    assert logged[4].startswith("rank 5 on node1 is slow, probably its host: the others wait 0.500 s of 2.000 s for it")
    read = others(5, USUAL._replace(data=0.6, work=2.0, wait=0.0))
    assert [bool(add(read)) for _ in range(6)] == [False] * 4 + [True, False], "another part of the same rank"
    all_slow = [USUAL._replace(work=2.9)] * 8
    assert "1.50 times as long as the shortest so far" in [add(all_slow) for _ in range(5)][4]
    monkeypatch.setattr(rank_times, "FOR_LONG", 3600.0)
    patient = SlowRanks(["a"] * 8)
    assert not any(patient.add(list(late)) for _ in range(100))


def test_a_single_process_measures_nothing() -> None:
    clock = RankClock(Ranks(), torch.device("cpu"))
    for _ in range(30):
        assert clock.arrive(1.0) == []
        clock.leave([])
    assert clock.all == ()


SLOW_READER = """
import os
import torch
from xtuner.data.packing.pack import PackedDataset
from xtuner.train.reporting import rank_times
rank_times.EVERY, rank_times.REPORTS, rank_times.FOR_LONG = 2, 3, 0.0
read = PackedDataset.raw
def slowly(self, pack):
    if os.environ["RANK"] == "1":
        for _ in range(300):
            torch.ones(300, 300) @ torch.ones(300, 300)
    return read(self, pack)
PackedDataset.raw = slowly
"""


@pytest.mark.processes
def test_a_rank_with_slow_data(tiny: Path, tmp_path: Path) -> None:
    """In a run of two: the log names it, events.json has its times, the metrics those of all ranks."""
    text, config = tiny.read_text(), tmp_path / "slow.py"
    for old, new in {
        **TWO,
        "max_epochs = 1": "max_epochs = 2",
        "import AdamW\n": f"import AdamW\n{SLOW_READER}",
    }.items():
        assert old in text
        text = text.replace(old, new, 1)
    config.write_text(text)
    words = ["train", config, "--work-dir", tmp_path / "w", "--launcher", "pytorch"]
    options = ["--cfg-options", "evaluation_inputs=[]", "save_steps=-1", "default_hooks.logger.interval=1"]
    assert exit_codes(start_ranks([*words, *options], tmp_path)) == [0, 0], stderr_of(tmp_path, 0)
    logged = [line for line in stderr_of(tmp_path, 0).splitlines() if "is slow, probably its" in line]
    assert len(logged) == 1, logged
    assert f"rank 1 on {platform.node()} is slow, probably its data: the others wait " in logged[0]
    (events,) = (tmp_path / "w").glob("*/events.json")
    (event,) = [e for line in events.read_text().splitlines() if (e := json.loads(line))["event"] == "slow rank"]
    assert (event["rank"], event["part"], event["host"]) == (1, "data", platform.node())
    assert 0 < event["data"] <= event["work"]
    (scalars,) = (tmp_path / "w").glob("*/vis_data/scalars.json")
    records = [json.loads(line) for line in scalars.read_text().splitlines()]
    last = records[-1]
    assert 0 < last["rank_median"] < last["rank_slowest"] < 60
    assert last["rank_product"] >= 1
    assert "rank_median" not in records[0]
