"""The picture of a run: starts joined to one curve, smoothed without a lag, a title, tokens above, one legend."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from xtuner.core.errors import ConfigError
from xtuner.tools.loss_plot import curve, read_runs, smooth


def write_start(work_dir: Path, name: str, iterations: range, **values: float) -> None:
    file = work_dir / name / "vis_data" / "scalars.json"
    file.parent.mkdir(parents=True)
    records = [{"iter": i, "loss": 3.0, "lr": 0.1, "grad_norm": 1.0, "tokens": i * 64, **values} for i in iterations]
    file.write_text("".join(json.dumps(r) + "\n" for r in records))


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
    (above,) = loss.child_axes
    assert above.get_xlim() == pytest.approx([64 * x for x in loss.get_xlim()])
    for words, message in (
        (("-o", tmp_path / "a.xyz"), "not a kind of picture"),
        (("-o", tmp_path / "loss"), "not a kind of picture"),
        (("--smoothing", "-1"), "--smoothing -1"),
        (("--smoothing", "nan"), "--smoothing nan"),
    ):
        with pytest.raises(ConfigError, match=message):
            xtuner("plot-loss", work_dir, *words)
