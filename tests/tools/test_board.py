"""The board: what it reads, what it serves, and the page in a real browser; `xtuner status`."""

import json
import math
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.browser import Browser
from helpers.processes import SHORT

from xtuner.cli.status import describe_work_dir
from xtuner.core.errors import ConfigError
from xtuner.tools import loss_plot
from xtuner.tools.board.curves import reduce_points, smooth
from xtuner.tools.board.server import Server, write_report
from xtuner.tools.board.snapshot import Snapshots
from xtuner.tools.board.work_dirs import Board
from xtuner.train.checkpoints.work_dir_lock import WorkDirLock

EVIL = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"


def add_lines(file: Path, *lines: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as f:
        f.writelines(json.dumps(line) + "\n" for line in lines)


def write_start(
    work_dir: Path, name: str, iterations: range, resumed: int = 0, loss: float = 3.0, **config: Any
) -> Path:
    folder = work_dir / name
    add_lines(
        folder / "vis_data" / "scalars.json",
        *({"iter": i, "loss": loss + math.sin(i), "loss_smoothed": loss, "lr": 1e-4, "time": 0.5, "tokens": 64 * i,
           "loss/web": loss, "loss/code": loss - 1, "epoch/web": i / 50, "epoch/code": i / 99,
           "rank_slowest": 0.5, "rank_median": 0.4}
          for i in iterations),
    )  # fmt: skip
    source = f"iter_{resumed}.pth" if resumed else None
    (folder / "start.json").write_text(json.dumps({"iteration": resumed, "resumed_from": source}))
    (folder / "config.json").write_text(json.dumps({"model": {"bias": False}, **config}))
    return folder


@pytest.fixture
def snapshots(tmp_path: Path) -> Snapshots:
    """Two work dirs of one name, one of them with a resume; and folders without runs."""
    first = write_start(tmp_path / "a" / "same", "20260101_000000", range(1, 61), lr=math.inf)
    add_lines(first / "events.json", *(
        {"event": "sample", "iter": i, "time": 0, "text": EVIL} for i in (0, 55)
    ), {"event": "stop", "iter": 60, "time": 0, "reason": EVIL})  # fmt: skip
    write_start(tmp_path / "a" / "same", "20260102_000000", range(51, 101), resumed=50, loss=2.0, lr=2)
    write_start(tmp_path / "b" / "same", "20260101_000000", range(1, 101), lr=3, clip=math.inf)
    (tmp_path / "c" / "iter_3.pth").mkdir(parents=True)
    return Snapshots(Board([tmp_path], describe_work_dir))


@pytest.fixture
def server(snapshots: Snapshots) -> Iterator[Server]:
    with Server(snapshots, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_what_is_read(snapshots: Snapshots, tmp_path: Path) -> None:
    """Resumed iterations count once; new lines are added, incomplete and damaged ones are not; names differ."""
    runs = snapshots.list_runs()["runs"]
    assert [(r["name"], r["iteration"], r["starts"]) for r in runs] == [("a/same", 100, 2), ("b/same", 100, 1)]
    shown = snapshots.show_run("0.0")
    assert shown is not None
    iterations, losses = shown["curves"]["loss_smoothed"]
    assert iterations == [*range(1, 101)]
    assert losses == [3.0] * 50 + [2.0] * 50
    assert [m["iter"] for m in shown["marks"]["resume"]] == [50]
    assert shown["axes"]["hours"][-1] == pytest.approx(100 * 0.5 / 3600)
    assert shown["axes"]["tokens"][-1] == 6400
    details = snapshots.show_details("0.0")
    assert details is not None
    assert [s["iter"] for s in details["samples"]] == [0], "the sample at 55 was lost by the resume from 50"
    assert details["config"] == {"model.bias": False, "lr": 2}
    file = tmp_path / "b" / "same" / "20260101_000000" / "vis_data" / "scalars.json"
    with file.open("ab") as f:
        f.write(b'{"iter": 101, "loss": NaN, "tokens": Infinity}\nrubbish\n{"iter": 102, "lo')
    (_, run) = snapshots.list_runs()["runs"]
    assert (run["iteration"], run["damaged"], run["loss"]) == (101, 1, None)
    with file.open("ab") as f:
        f.write(b'ss": 7}\n')
    (_, run) = snapshots.list_runs()["runs"]
    assert (run["iteration"], run["damaged"], run["loss"]) == (102, 1, 7.0)
    shown = snapshots.show_run("1.0", 99, 200)
    assert shown is not None
    assert shown["curves"]["loss"][0][-3:] == [100, 101, 102]
    assert shown["curves"]["loss"][1][-2:] == [None, 7.0]
    assert snapshots.show_run("9.9") is None


def test_reduction_keeps_spikes_and_gaps() -> None:
    values = np.sin(np.arange(100_000) / 5000)
    values[77_777], values[123] = 50, math.nan
    iterations, kept = reduce_points(np.arange(100_000), values, 500)
    assert len(kept) < 1100
    assert (iterations[0], iterations[-1]) == (0, 99_999)
    assert kept[iterations.index(77_777)] == 50
    assert kept[iterations.index(123)] is None
    some = [*values[:300]]
    for window in (0, 1, 10, 51):
        assert smooth(np.array(some), window) == pytest.approx(loss_plot.smooth(some, window), nan_ok=True)


def test_requests(server: Server) -> None:
    def get(path: str, **headers: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(urllib.request.Request(server.url + path, headers=headers)) as answer:
                assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as e:
            return e.code, ""

    assert len(json.loads(get("api/runs")[1])["runs"]) == 2
    assert get("api/run?id=0.0&buckets=-1&from=nan&to=x")[0] == 200
    for path in ("api/run?id=x", "api/", "../../etc/passwd", "page/board.js"):
        assert get(path)[0] == 404
    assert get("api/runs", Host="evil.example")[0] == 403
    with pytest.raises(ConfigError, match=r"use a free port: --port \d+"):
        Server(server.snapshots, "127.0.0.1", server.server_address[1])
    with pytest.raises(ConfigError, match="omit --host"):
        Server(server.snapshots, "203.0.113.1", 0)


def test_wrong_folders(tmp_path: Path, xtuner: Any) -> None:
    for words, message in (
        (("board", tmp_path / "x"), "not a folder"),
        (("board", tmp_path, "--export", tmp_path / "r.html"), "no run to export"),
        (("status", tmp_path), "no run here"),
        (("status", tmp_path / "x"), "no run here"),
    ):
        with pytest.raises(ConfigError, match=message):
            xtuner(*words)


@pytest.mark.processes
def test_the_page(server: Server, snapshots: Snapshots, tmp_path: Path) -> None:
    """Values under the mouse, zoom, comparison, a run that advances, 100,000 iterations, languages; a report alone."""
    browser = Browser(tmp_path / "profile")
    try:
        browser.prefer("dark")
        browser.open(server.url)
        browser.wait_for("document.querySelectorAll('canvas').length >= 3")
        assert browser.ask("document.documentElement.dataset.theme") == "dark"
        table = browser.ask("document.querySelector('#differences table').innerText")
        assert [row.split("\t") for row in table.splitlines()] == [
            ["setting", "a/same", "b/same"],
            ["clip", "–", "inf"],
            ["lr", "2", "3"],
        ]
        parts = [{"tail": n, "seed": 1, "dataset_cfg.folder": f"/{n}"} for n in (8, 9)]
        found = browser.ask(
            f"findDifferences({json.dumps(parts)}.map(d => Object.fromEntries(['loader.dataset', 'dataset', 'hooks.0']"
            ".flatMap(name => Object.entries({...d, ...(name == 'hooks.0' && {seed: d.tail})})"
            ".map(([k, v]) => [`${name}.${k}`, v])))))"
        )
        assert found == [
            ["dataset.dataset_cfg.folder", ["/8", "/9"]], ["dataset.tail", ["8", "9"]],
            ["hooks.0.seed", ["8", "9"]], ["hooks.0.tail", ["8", "9"]],
        ], "what is written once and used twice differs once"  # fmt: skip
        left, top, width, height = browser.ask(
            "(r => [r.left, r.top, r.width, r.height])(document.querySelector('#chart-loss .u-over')"
            ".getBoundingClientRect())"
        )
        middle = top + height / 2
        browser.mouse("Moved", left + width * 0.75, middle)
        tip = browser.wait_for("document.querySelector('#chart-loss .tip:not([hidden])')?.innerText")
        assert "iteration 75" in tip
        assert "a/same · smoothed" in tip
        assert "2.0000" in tip
        limits = "(s => [s.min, s.max])(board.charts.get('loss').plot.scales.x)"
        browser.drag(left + width * 0.2, middle, left + width * 0.4)
        browser.wait_for(f"{limits}[1] < 50")
        assert browser.ask("board.charts.get('sources').names.map(n => [n.run.id, n.line.name, !!n.dash])") == [
            ["0.0", "code", False], ["0.0", "web", True], ["1.0", "code", False], ["1.0", "web", True],
        ], "of several runs, colours are the runs' and dashes the sources'"  # fmt: skip
        assert browser.ask("(s => [s.min, s.max])(board.charts.get('lr').plot.scales.x)") == pytest.approx(
            [20, 40], abs=1
        )
        browser.ask("document.querySelector('#chart-loss .plot').focus()")
        browser.press("0")
        browser.wait_for(f"{limits}[1] == 100")
        browser.press("+")
        browser.wait_for(f"{limits}[1] < 100")
        browser.press("Escape")
        browser.wait_for(f"{limits}[1] == 100")
        b = tmp_path / "b" / "same" / "20260101_000000" / "vis_data" / "scalars.json"
        add_lines(b, {"iter": 140, "loss": 1.5, "tokens": 64 * 140})
        browser.wait_for(f"{limits}[1] == 140")
        browser.ask("document.querySelector('#runs input').click()")
        browser.wait_for("document.querySelector('#differences').hidden")
        browser.wait_for("!busy && board.shown().length == 1")
        for chart, lines in ("sources", "code web"), ("group-epoch/…", "code web"), ("rank_times", "slowest median"):
            legend = f"document.getElementById('chart-{chart}').querySelectorAll('.legend span')"
            assert browser.ask(f"[...{legend}].map(s => s.textContent).join(' ')") == lines
            colours = browser.ask(f"board.charts.get('{chart}').names.map(n => n.colour)")
            assert len(set(colours)) == 2, "of one run each line has its own colour"
        browser.ask("document.querySelector('#axis button:nth-child(2)').click()")
        browser.wait_for(f"{limits}[1] == {64 * 140}")
        browser.ask("find('language').click()")
        assert browser.wait_for("document.querySelector('#chart-loss h2').innerText") in ("损失", "Loss")

        long = write_start(tmp_path / ("long" * 20), "20260101_000000", range(1, 100_001))
        add_lines(long / "events.json", {"event": "sample", "iter": 9, "time": 0, "text": "x" * 200})
        (long / f"{long.name}.log").write_text(f"2026-01-01 00:00:00,000 WARNING {'w' * 200}\n")
        browser.wait_for("board.runs.length == 3 && board.runs[2].data")
        browser.wait_for("!busy")
        took = browser.ask(
            "(async () => { const t = performance.now(); await refresh(true); return performance.now() - t; })()"
        )
        print(f"100,000 iterations in {took:.0f} ms")
        points = browser.ask("board.runs[2].data.curves.loss[0].length")
        assert 500 < points < 6000, "reduced to what the screen shows"
        warning = browser.ask("document.querySelector('#runs .warning').textContent")
        assert warning == browser.ask("WORDS[language].warned") + "w" * 160 + "…"

        browser.open(server.url, 390, 844)
        browser.wait_for("document.querySelectorAll('canvas').length >= 3")
        assert browser.ask("document.documentElement.scrollWidth") == 390
        report = tmp_path / "report.html"
        server.shutdown()
        assert write_report(snapshots, report) == 3
        browser.open(report.as_uri())
        browser.wait_for("document.querySelectorAll('canvas').length >= 3")
        assert EVIL in browser.wait_for("document.querySelector('#sample-texts')?.textContent")
        assert browser.ask("document.querySelectorAll('img').length") == 0
        assert not re.search(r"(src|href)=\"?https?:", report.read_text())
        assert browser.errors == []
    finally:
        browser.close()


@pytest.mark.processes
def test_status_of_a_run(tmp_path: Path, tiny: Path, xtuner: Any, capsys: Any) -> None:
    """A real run that is stopped, then continued; it is running while its lock is held."""
    work_dir = tmp_path / "w"
    train = ("train", tiny, "--work-dir", work_dir, "--cfg-options", *SHORT)
    assert xtuner(*train[:4], "--max-minutes", "0", *train[4:]) == 75
    assert xtuner("status", work_dir) == 75
    lock = WorkDirLock(work_dir)
    assert xtuner("status", work_dir) == 73
    lock.release()
    assert "running, process" in capsys.readouterr().out
    assert xtuner(*train[:4], "--resume", *train[4:]) == 0
    capsys.readouterr()
    assert xtuner("status", work_dir, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    last = found["iteration"]
    assert (found["state"], found["max_iterations"], found["last_save"]) == ("finished", last, f"iter_{last}.pth")
    assert found["loss"] > 0
    files = sorted(work_dir.glob("2*/events.json"))  # one if both starts were in one second
    events = [json.loads(line)["event"] for file in files for line in file.read_text().splitlines()]
    assert events == ["start", "save", "stop", "start", *["save"] * (last - 1), "end"]
    assert xtuner("board", work_dir, "--export", tmp_path / "r.html") == 0
    assert "1 run" in capsys.readouterr().out
    add_lines(files[-1], {"event": "start", "iter": last, "time": 0})
    add_lines(files[-1].parent / "vis_data" / "scalars.json", {"iter": last, "loss": math.inf, "eta": math.inf})
    assert xtuner("status", work_dir) == 1, "without an end it is taken for killed"
