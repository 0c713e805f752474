"""The picture of a run: starts joined to one curve, smoothed without a lag, a title, tokens above, one legend."""

import json
import math
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest

from xtuner.core.errors import CheckpointError, ConfigError
from xtuner.tools.loss_plot import curve, draw, smooth
from xtuner.tools.run_metrics import read_runs


def write_start(work_dir: Path, name: str, iterations: range, facts: Any = None, **values: float) -> None:
    file = work_dir / name / "vis_data" / "scalars.json"
    file.parent.mkdir(parents=True)
    records = [{"iter": i, "loss": 3.0, "lr": 0.1, "grad_norm": 1.0, "tokens": i * 64, **values} for i in iterations]
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    if facts is not None:
        (work_dir / name / "start.json").write_text(json.dumps(facts))


def test_starts_of_a_run_are_one_curve(tmp_path: Path) -> None:
    """A resume replaces what was lost; a fresh start in the same folder is another run; empty starts are not there."""
    write_start(tmp_path, "20260101_000000", range(10, 60, 10))
    write_start(tmp_path, "20260102_000000", range(0))
    write_start(tmp_path, "20260103_000000", range(40, 80, 10), loss=2.0)  # resumed from 30 or later
    write_start(tmp_path, "20260104_000000", range(80, 90, 10), loss=1.0)
    assert [curve(run, "loss") for run in read_runs(tmp_path)] == [
        ([10, 20, 30, 40, 50, 60, 70, 80], [3.0, 3.0, 3.0, 2.0, 2.0, 2.0, 2.0, 1.0])
    ]
    write_start(tmp_path, "20260105_000000", range(10, 30, 10))
    assert [len(run) for run in read_runs(tmp_path)] == [8, 2]


@pytest.mark.processes
def test_starts_that_record_what_they_continue(tmp_path: Path, tiny: Path, xtuner: Any) -> None:
    """A fresh start that logs more rarely is another run, as is one from elsewhere, also if it has logged nothing."""
    train = ("train", tiny, "--work-dir", tmp_path / "w", "--max-minutes", "0")
    for words in ((), ("--resume",), ("--resume", tmp_path / "elsewhere" / "iter_1.pth")):
        if words[1:]:
            shutil.copytree(tmp_path / "w" / "iter_1.pth", words[1])
        assert xtuner(*train, *words, "--cfg-options", "custom_hooks=[]") == 75
        (folder,) = tmp_path.glob("w/2*")
        facts = json.loads((folder / "start.json").read_text())
        shutil.move(folder, tmp_path / f"{len(words)}" / folder.name)
        at = {
            "iteration": len(words[:1]),
            "resumed_from": str(words[-1]) if words[1:] else "iter_1.pth" if words else None,
        }
        assert facts.pop("run_id")
        assert facts == at
    fresh, elsewhere = {"iteration": 0, "resumed_from": None}, {"iteration": 30, "resumed_from": "/other/iter_30.pth"}
    write_start(tmp_path, "20260101_000000", range(1, 10), fresh)
    write_start(tmp_path, "20260102_000000", range(10, 30, 10), fresh)
    write_start(tmp_path, "20260103_000000", range(20, 40, 10), {"iteration": 15, "resumed_from": "iter_15.pth"})
    write_start(tmp_path, "20260104_000000", range(40, 50, 10), elsewhere)
    write_start(tmp_path, "20260105_000000", range(0), fresh)
    write_start(tmp_path, "20260106_000000", range(60, 70, 10), {"iteration": 50, "resumed_from": "iter_50.pth"})
    write_start(tmp_path, "20260107_000000", range(70, 80, 10), {"resumed_from": 1})  # damaged: judged by its records
    assert [[r["iter"] for r in run] for run in read_runs(tmp_path)] == [
        [*range(1, 10)],
        [10, 20, 30],
        [40],
        [60, 70],
    ]


def test_damaged_records(tmp_path: Path, xtuner: Any, capsys: Any) -> None:
    write_start(tmp_path, "20260101_000000", range(1, 3))
    file = tmp_path / "20260101_000000" / "vis_data" / "scalars.json"
    whole = file.read_bytes()
    lines = [bytes(40), whole[:20], b'{"iter": 3, "loss": "\xff"}', b"[1,2]", b'{"iter":"a","loss":null}', b"[" * 10**5]
    lines += [
        b'{"iter": 3, "loss": "2"}',
        b'{"iter": 1' + 400 * b"0" + b"}",
        b'{"iter": 3, "loss": true}',
        b'{"loss": 1}',
    ]
    file.write_bytes(whole + b"\n".join(lines) + b'\n{"iter": 3, "loss": 1e999, "tokens": 1e999}\n{"it')
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "20260102_000000" / "vis_data").mkdir(parents=True)
    shutil.move(tmp_path / "pipe", tmp_path / "20260102_000000" / "vis_data" / "scalars.json")
    assert xtuner("plot-loss", tmp_path) == 0
    shown = capsys.readouterr().err
    assert f"{file}: 10 of 13 lines are damaged and were skipped" in shown
    assert "scalars.json cannot be read: it is a named pipe, not a file" in shown
    file.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(CheckpointError, match="10 of 10 lines are damaged"):
        xtuner("plot-loss", tmp_path)


def test_smoothing() -> None:
    line = [5.0 - 0.1 * i for i in range(50)]
    smoothed = smooth(line, 11)
    assert smoothed[:45] == pytest.approx(line[:45])  # no lag, no bias at the start
    assert smoothed[-1] == pytest.approx(sum(line[-6:]) / 6)
    assert smooth([1.0, math.nan, 3.0], 3) == [1.0, 2.0, 3.0]
    assert math.isnan(smooth([math.nan], 3)[0])


def test_the_picture(tmp_path: Path, xtuner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (drawn.append(figure), save(figure, *a, **k)))
    work_dir = tmp_path / "my_config"
    write_start(work_dir, "20260101_000000", range(1, 90))
    write_start(work_dir, "20260102_000000", range(81, 201), val_loss=2.5)
    (work_dir / "20260102_000000" / "vis_data" / "scalars.json").open("a").write('{"iter": 201, "loss": 900}\n{"it')
    for name in ("a.png", "a.svg", "a.PDF"):
        assert xtuner("plot-loss", work_dir, "-o", tmp_path / name) == 0
        assert (tmp_path / name).stat().st_size > 10_000
    loss, rate, norm = drawn[0].axes
    assert loss.get_title("left") == "my_config"
    assert [t.get_text() for t in loss.get_legend().get_texts()] == ["training, mean of 10 iterations", "validation"]
    training = [line for line in loss.lines if len(line.get_xdata()) == 201]
    assert len({line.get_color() for line in training}) == 1, "one run, one colour"
    assert loss.get_ylim()[1] < 10, "one spike does not flatten the curve"
    assert (rate.get_ylabel(), norm.get_ylabel(), norm.get_xlabel()) == ("learning rate", "gradient norm", "iteration")
    for name, title in (("50$\\frac$ 中文", "50$\\frac$ 中文"), ("a\nb\U0010fffd", "a\\nb\\U0010fffd")):
        with warnings.catch_warnings(action="error"):
            draw(read_runs(work_dir), name, tmp_path / "a.png")
        assert drawn[-1].axes[0].get_title("left") in (title, title.replace("中文", r"\u4e2d\u6587"))
    (above,) = loss.child_axes
    assert above.get_xlim() == pytest.approx([64 * x for x in loss.get_xlim()])
    for words, message in (
        (("-o", tmp_path / "a.xyz"), "not an image format"),
        (("-o", tmp_path / "loss"), "not an image format"),
        (("--smoothing", "-1"), "--smoothing -1"),
        (("--smoothing", "nan"), "--smoothing nan"),
    ):
        with pytest.raises(ConfigError, match=message):
            xtuner("plot-loss", work_dir, *words)
