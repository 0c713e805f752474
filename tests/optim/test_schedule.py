"""Learning rates: equal to those of mmengine 0.10.7 itself, and a pure function of the iteration."""

import json
import math
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from helpers.paths import CACHE, EXTERNAL

from xtuner.core.errors import ConfigError
from xtuner.engine import (
    ConstantLR,
    CosineAnnealingLR,
    CosineRestartLR,
    LinearLR,
    MultiStepLR,
    WarmupStableDecayLR,
)
from xtuner.optim.schedule import Schedule

Command = Callable[..., int]
MMENGINE = CACHE / "mmengine-0.10.7"
COMBINATIONS = 500
KINDS = [
    "LinearLR", "LinearLR", "CosineAnnealingLR", "CosineAnnealingLR", "ConstantLR", "MultiStepLR", "CosineRestartLR",
]  # fmt: skip


def ours(case: dict[str, Any]) -> Schedule:
    """As `param_scheduler` of an old config is built. Raises: ConfigError."""
    specs = [{**s, "type": f"xtuner.legacy.engine.{s['type']}"} for s in case["schedulers"]]
    return Schedule.from_config(case["lr"], specs, case["epoch_length"], case["epochs"] * case["epoch_length"])


def combination(random: random.Random) -> dict[str, Any]:
    """One to four schedulers one after another, with gaps, or over each other; some are wrong."""
    length, epochs = random.choice([7, 20, 33, 100]), random.randint(1, 3)
    total = length * epochs
    case: dict[str, Any] = {"lr": random.choice([1.0, 4e-5, 0.3]), "epochs": epochs, "epoch_length": length}
    case["schedulers"] = schedulers = []
    at, count = 0, random.choice([1, 2, 2, 3, 3, 4])
    for i in range(count):
        by_epoch = random.random() < 0.6
        unit = length if by_epoch else 1
        begin = at if random.random() < 0.6 else max(0, at + random.choice([-20, -3, -1, 1, 2, 15]))
        begin = begin if begin < total or random.random() < 0.1 else random.randrange(total)
        lasts = random.choice([1, 2, 3, total // 7, total // 3, total // count, max(total - begin, 1), 2 * total])
        at = begin + (lasts if random.random() < 0.97 else random.choice([0, -1]))
        spec: dict[str, Any] = {"by_epoch": by_epoch, "begin": begin / unit, "end": at / unit}
        if by_epoch:
            spec["convert_to_iter_based"] = True
            if random.random() < 0.2:  # no whole iterations
                spec["begin"], spec["end"] = spec["begin"] + random.random() / unit, spec["end"] + 0.7 / unit
        else:
            spec["begin"], spec["end"] = begin, at
            if random.random() < 0.05:
                spec["end"] += 0.5
        if begin == 0 and random.random() < 0.5:
            del spec["begin"]
        if i == count - 1 and random.random() < 0.5:
            del spec["end"]
        spec["type"] = random.choice(KINDS)
        schedulers.append(spec | settings(spec["type"], random, case["lr"], unit, total))
        if random.random() < 0.02:
            spec = schedulers[-1]
            spec["convert_to_iter_based"] = True
            spec["by_epoch"] = not by_epoch
    return case


def settings(kind: str, random: random.Random, lr: float, unit: int, total: int) -> dict[str, Any]:
    if kind == "LinearLR":
        return {
            "start_factor": random.choice(
                [1 / 40, 0.1, 1 / 3, 1.0, 1.0, 1.5, 0.0][: 7 if random.random() < 0.1 else 5]
            ),
            "end_factor": random.choice([1.0, 1.0, 0.5, 0.1, 0.0, 1.2][: 6 if random.random() < 0.1 else 5]),
        }
    if kind == "ConstantLR":
        return {"factor": random.choice([0.1, 1 / 3, 1.0, 0.0, 2.0][: 5 if random.random() < 0.1 else 3])}
    if kind == "MultiStepLR":
        milestones = [random.randint(0, total) / unit for _ in range(random.randint(0, 4))]
        return {
            "milestones": milestones + random.choice([[], milestones, [1.5], [3 * total], [-1]]),
            "gamma": random.choice([0.1, 0.5, 1.0, 2.0, 0.0]),
        }
    cosine: dict[str, Any] = {}
    if kind == "CosineRestartLR":
        count = random.randint(1, 3)
        cosine["periods"] = [random.randint(1, total // unit) for _ in range(count)]
        cosine["restart_weights"] = [random.choice([1, 0.5, 2]) for _ in range(count + (random.random() < 0.05))]
    elif random.random() < 0.6:
        whole = random.choice([1, 2, 3, 10, total // 3 + 1, total, 2 * total])
        cosine["T_max"] = whole if unit == 1 else whole / unit
    choices = ["none", "eta_min", "eta_min", "ratio", "ratio", "both"][: 6 if random.random() < 0.1 else 5]
    lowest = random.choice(choices[kind == "CosineRestartLR" :])
    if lowest in ("eta_min", "both"):
        cosine["eta_min"] = random.choice([0.0, 0.15 * lr, lr, 2 * lr])
    if lowest in ("ratio", "both"):
        cosine["eta_min_ratio"] = random.choice([0.0, 0.1, 1.0])
    return cosine


@pytest.mark.processes
def test_equal_to_mmengine() -> None:
    """500 random combinations: the rate of every iteration, and what is rejected."""
    if not (MMENGINE / "installed").is_file():
        pytest.skip(f"mmengine 0.10.7 is not in {MMENGINE}: `make mmengine` fetches it (1 MB)")
    generator = random.Random(1024)
    cases = [combination(generator) for _ in range(COMBINATIONS)]
    env = {**os.environ, "PYTHONPATH": str(MMENGINE), "OMP_NUM_THREADS": "1"}
    lines = "".join(json.dumps(case) + "\n" for case in cases)
    done = subprocess.run(
        [sys.executable, EXTERNAL / "mmengine_rates.py"], input=lines, env=env, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    seen = {"equal": 0, "rejected": 0, "overlapping": 0}
    for case, line in zip(cases, done.stdout.splitlines(), strict=True):
        theirs = json.loads(line)
        # they divide by these factors in the course of the run, at the latest; a run of one iteration would not
        divides = any(s.get("start_factor") == 0 or s.get("factor") == 0 for s in case["schedulers"])
        if divides or (theirs["error"] and not theirs["rates"]):
            with pytest.raises(ConfigError):
                ours(case)
            seen["rejected"] += 1
            continue
        schedule = ours(case)
        wanted = [max(rate, 0.0) for rate in theirs["rates"]]
        assert [schedule(i) for i in range(len(wanted))] == pytest.approx(wanted, rel=1e-12, abs=1e-12 * case["lr"]), (
            case
        )
        assert not theirs["error"], case
        seen["equal"] += 1
        seen["overlapping"] += any(len(active) > 1 for active in schedule._active)
        for i in random.Random(0).choices(range(len(wanted)), k=5):  # the same from anywhere, as after a resume
            assert ours(case)(i) == schedule(i)
    assert min(seen["equal"] - 400, seen["rejected"] - 50, seen["overlapping"] - 150) > 0, seen


def test_rates() -> None:
    """Values of mmengine 0.10.7's LinearLR and CosineAnnealingLR with convert_to_iter_based, 20 iterations an epoch."""
    warm = LinearLR(start_factor=1 / 40, begin=0, end=0.25, convert_to_iter_based=True)
    cosine = CosineAnnealingLR(eta_min=0.15, begin=0.25, end=1, convert_to_iter_based=True)
    schedule = Schedule(1.0, [warm, cosine], 20)
    expected = [0.025, 0.26875, 0.5125, 0.75625, 1.0, 1.0, 0.990713, 0.963257, 0.918832, 0.859381, 0.7875]
    expected += [0.706332, 0.619425, 0.530575, 0.443668, 0.3625, 0.290619, 0.231168, 0.186743, 0.159287]
    assert [schedule(i) for i in range(20)] == pytest.approx(expected, abs=1e-6)
    assert schedule(20) == schedule(10**8) == schedule(19)  # it stays where it ended
    assert Schedule(3.0)(7) == 3.0

    by_iteration = {"by_epoch": False}
    rises = CosineAnnealingLR(T_max=4, **by_iteration)  # without end: to the end of the run
    assert [Schedule(1.0, [rises], last=20)(i) for i in (0, 4, 8, 12, 16)] == pytest.approx([1, 0, 1, 0, 1])
    short = LinearLR(start_factor=0.25, end=1, **by_iteration)
    assert [Schedule(1.0, [short], last=20)(i) for i in (0, 1, 19)] == [0.25, 0.25, 0.25]
    steps = MultiStepLR(milestones=[1, 2, 2.5], gamma=0.5, convert_to_iter_based=True)
    halves = Schedule(1.0, [steps], Fraction(5, 2), 7)  # two packs an iteration, five an epoch: its border lies within
    assert [halves(i) for i in range(7)] == [1, 1, 0.5, 0.5, 0.5, 0.25, 0.125]
    factor = ConstantLR(factor=0.5, begin=1, end=4, **by_iteration)
    assert [Schedule(1.0, [factor], last=9)(i) for i in range(6)] == [1, 0.5, 0.5, 1, 1, 1]
    # from any iteration without those before it; T_max that fits no iteration divides by no zero
    far = Schedule(1.0, [LinearLR(end=10**6, **by_iteration), CosineAnnealingLR(begin=10**6, **by_iteration)], 1, 10**7)
    assert [far(10**6), far(5_500_000), far(10**7 - 1)] == pytest.approx([1, 0.5, 0])
    for odd in (97.00000000000001, 4 / 3, 0.3):
        whole = Schedule(1.0, [CosineAnnealingLR(T_max=odd, eta_min=0.1, **by_iteration)], last=400)
        assert all(0.1 - 1e-9 <= whole(i) <= 1 + 1e-9 for i in range(400))


def test_warm_up_stable_decay() -> None:
    """By its closed formulas, in each unit; the same from anywhere."""
    for shape, share in (("linear", lambda x: x), ("1-sqrt", math.sqrt)):
        wsd = WarmupStableDecayLR(warmup=100, decay=200, decay_shape=shape, end_factor=0.1, unit="iterations")
        schedule = Schedule(3.0, [wsd], last=1000)
        points = {i: (i + 1) / 100 for i in (0, 49, 99)} | dict.fromkeys((100, 500, 800), 1.0)
        points |= {800 + i: 1 - 0.9 * share(i / 200) for i in (1, 50, 199)}
        for i, value in points.items():
            assert schedule(i) == pytest.approx(3.0 * value, rel=1e-12)
            assert Schedule(3.0, [wsd], last=1000)(i) == schedule(i)
        # 8 iterations an epoch of 1,000 tokens each
        in_epochs = WarmupStableDecayLR(warmup=12.5, decay=25, decay_shape=shape, end_factor=0.1, unit="epochs")
        tokens = dict(warmup=100_999, decay=200_999, end=1_000_000)
        in_tokens = WarmupStableDecayLR(**tokens, decay_shape=shape, end_factor=0.1, unit="tokens")
        for other in (in_epochs, in_tokens):
            same = Schedule(3.0, [other], 8, 1000, tokens=1000)
            assert [same(i) for i in range(1000)] == [schedule(i) for i in range(1000)]
    after = LinearLR(begin=1_000_000, start_factor=1, end_factor=0.5, unit="tokens")
    assert Schedule(1.0, [after], 1, 2001, tokens=1000)(1500) == pytest.approx(0.75)
    steps = MultiStepLR(milestones=[2500, 4000], gamma=0.5, unit="tokens")
    assert [Schedule(1.0, [steps], 1, 6, tokens=1000)(i) for i in range(6)] == [1, 1, 0.5, 0.5, 0.25, 0.25]
    restarts = CosineRestartLR(periods=[4000, 8000], restart_weights=[1, 0.5], eta_min=0.2, unit="tokens")
    again = Schedule(1.0, [restarts], 1, 20, tokens=1000)
    points = {0: 1, 2: 0.6, 4: 0.5, 8: 0.35, 11: 0.2 + 0.15 * (1 + math.cos(math.pi * 7 / 8))}
    points |= {12: points[11], 19: points[11]}
    assert [again(i) for i in points] == pytest.approx(list(points.values()))
    assert list(again.remarks(20)) == [
        "param_scheduler.0 (CosineRestartLR) its periods end at iteration 12; after it the rate stays"
    ]


def test_what_is_rejected_and_remarked(tiny: Path, xtuner: Command, capsys: Any) -> None:
    """Single schedulers by check-cfg; those that are too short for the data by the dry run, with the line."""
    other = "param_scheduler=[{'by_epoch':False,'type':'xtuner.engine."
    wsd = "param_scheduler=[{'unit':'iterations','type':'xtuner.engine.WarmupStableDecayLR'"
    for option, words in (
        ("param_scheduler.0.start_factor=0", "start_factor = 0 is not above 0 and at most 1"),
        ("param_scheduler.0.end_factor=1.5", "end_factor = 1.5 is not at least 0 and at most 1"),
        ("warm_up_ratio=0", "ends (end = 0) where it begins (begin = 0 epochs)"),
        ("param_scheduler.0.begin=-1", "begin = -1 is before the start of the run"),
        ("param_scheduler.0.end=1e999", "end = inf is not at least 0"),
        ("param_scheduler.1.eta_min=-1", "eta_min = -1 is not at least 0"),
        ("param_scheduler.1.eta_min_ratio=0.1", "eta_min and eta_min_ratio are both given"),
        ("param_scheduler.1.T_max=-3", "T_max = -3 is not at least 0"),
        ("param_scheduler.1.by_epoch=False", "there are no epochs to convert"),
        (f"{other}ConstantLR','factor':2}}]", "factor = 2 is not above 0 and at most 1"),
        (f"{other}MultiStepLR','milestones':3}}]", "milestones = 3 is not a list of numbers"),
        (f"{other}MultiStepLR','milestones':[],'gamma':-1}}]", "gamma = -1 is not at least 0"),
        (f"{other}MultiStepLR'}}]", "MultiStepLR needs milestones"),
        ("param_scheduler.1.unit=tokens", "unit and convert_to_iter_based are both given"),
        (f"{wsd},'decay':5}}]".replace("iterations", "token"), "unit = 'token' is not one of"),
        (f"{wsd},'decay':0}}]", "decay = 0 is not above 0"),
        (
            f"{wsd},'decay':5,'end':6,'warmup':2}}]",
            "warmup = 2 and decay = 5 are longer than the schedule",
        ),
        (f"{wsd},'decay':5,'decay_shape':'1-sqr'}}]", "decay_shape = '1-sqr' is not one of"),
        (f"{other}CosineRestartLR','periods':[0]}}]", "periods = [0] are not whole numbers of at least 1"),
        (f"{other}CosineRestartLR','periods':[3,4]}}]", "1 restart_weights for 2 periods"),
    ):
        with pytest.raises(ConfigError) as error:
            xtuner("check-cfg", tiny, "--cfg-options", option)
        assert words in str(error.value)
        assert "param_scheduler" in str(error.value)
    with pytest.raises(ConfigError) as error:
        xtuner("train", tiny, "--dry-run", "--cfg-options", "warm_up_ratio=0.001")
    assert "has no iteration: begin = 0 and end = 0.001 in epochs are iterations 0 and 0" in str(error.value)
    assert re.search(r"tiny\.py:[0-9]+ param_scheduler\.0\.end", str(error.value))
    assert xtuner("train", tiny, "--dry-run", "--cfg-options", "param_scheduler.1.T_max=0.5") == 0
    assert "(CosineAnnealingLR) T_max ends at iteration" in capsys.readouterr().err
