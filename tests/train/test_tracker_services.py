"""SwanLab and W&B themselves, without a network: what they have recorded is read back from their files."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.configs import with_hook
from helpers.paths import CACHE, EXTERNAL
from helpers.runs import records

from xtuner.compat.translate import load
from xtuner.core.errors import ConfigError
from xtuner.train.trackers import SwanLab, Wandb, group

LIBRARIES = CACHE / "trackers-2"
SMALL = ["--cfg-options", "warm_up_ratio=0.4", "accumulative_counts=5", "default_hooks.logger.interval=1"]


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Both libraries, and nobody who has logged in."""
    if not (LIBRARIES / "installed").exists():
        pytest.skip("make trackers")
    monkeypatch.setattr(sys, "path", [*sys.path, str(LIBRARIES)])  # last: it has packages of ours too
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "SWANLAB_API_KEY", "SWANLAB_MODE"):
        monkeypatch.delenv(name, raising=False)


def read_back(work_dir: Path) -> dict[str, Any]:
    path = ":".join(sys.path)
    words = [sys.executable, EXTERNAL / "read_trackers.py", work_dir]
    done = subprocess.run(words, env={"PYTHONPATH": path}, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.processes
@pytest.mark.usefixtures("libraries")
def test_a_resumed_run_continues_in_both(tiny: Path, tmp_path: Path, xtuner: Callable[..., int]) -> None:
    """Stopped after an iteration and resumed: one run of each service, with config, environment, curves and samples."""
    config, work_dir = tmp_path / "both.py", tmp_path / "w"
    text = tiny.read_text().replace("custom_hooks = [\n", "custom_hooks = [\n    SECRET_HOOK,\n")
    first = "from torch.optim import AdamW\n"
    secret = "from xtuner.train.hooks import Hook\nclass Keyed(Hook):\n    def __init__(self, api_key): ...\n"
    secret += "SECRET_HOOK = dict(type=Keyed, api_key='0123456789abcdef')\n"
    text += "\nfrom xtuner.train.trackers import Wandb\ntrackers = [dict(type=Wandb, name='own', tags=['a'])]\n"
    config.write_text(text.replace(first, first + secret))
    words = ["train", config, "--work-dir", work_dir, "--tracker", "swanlab", "--tracker", "wandb", *SMALL]
    assert xtuner(*words, "--max-minutes", 0) == 75
    assert xtuner(*words, "--resume") == 0
    assert xtuner("train", tiny, "--work-dir", tmp_path / "other", "--tracker", "swanlab", *SMALL) == 0
    found = read_back(work_dir)
    curve = {at: record["loss"] for at, record in records(work_dir).items()}
    (other,) = read_back(tmp_path / "other")["SwanLab"]
    for name, starts in found.items():
        assert len(starts) == 2, "each service once, although W&B was named twice"
        assert len({s["id"] for s in starts} | {other["id"]}) == 2
        assert {int(i): loss for s in starts for i, loss in s["losses"].items()} == pytest.approx(curve), name
        assert [len(s["losses"]) for s in starts] == [1, len(curve) - 1]
        assert [s["exit"] for s in starts] == [0, 0] if name == "Wandb" else ["RUN_STATE_FINISHED"] * 2
        assert [[at, tag] for s in starts for at, tag, _ in s["samples"]] == [
            [0, "sample/1"], [1, "sample/1"], [len(curve), "sample/1"]
        ]  # fmt: skip
        assert all("def main(" in text for s in starts for *_, text in s["samples"])
        assert {(s["project"], s["name"]) for s in starts} == {("xtuner", "own" if name == "Wandb" else "w")}
        for start in starts:
            assert start["config"]["max_length"] == 32
            assert start["config"]["environment"]["packages"]["torch"]
            assert "git" in start["config"]["environment"]
            assert start["config"]["custom_hooks"][0]["api_key"] == "***"
    assert (found["Wandb"][0]["step_metric"], found["Wandb"][0]["tags"]) == ("iter", ["a"])
    left = [file for file in work_dir.rglob("*") if file.is_file() and b"0123456789abcdef" in file.read_bytes()]
    assert left == []
    log = max(work_dir.glob("*/2*.log")).read_text()
    for place in (
        "Wandb: recorded offline; to upload it: wandb sync",
        "SwanLab: recorded offline; to upload it: swanl",
    ):
        assert log.count(place) == 1


@pytest.mark.processes
@pytest.mark.usefixtures("libraries")
def test_failures_and_modes(
    tiny: Path, tmp_path: Path, xtuner: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the run: as failed; of W&B's server: the run ends without it; SwanLab's local mode is for `swanlab watch`."""
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(group, "CLOSING", 2.0)
    config = with_hook(tiny, tmp_path / "fails.py", 2, "raise ValueError('of the hook')")
    local = "\nfrom xtuner.train.trackers import SwanLab\ntrackers = [dict(type=SwanLab, mode='local')]\n"
    config.write_text(config.read_text() + local)
    monkeypatch.setattr(group, "CLOSING_FAILED", 60.0)
    with pytest.raises(ValueError, match="of the hook"):
        xtuner("train", config, "--work-dir", tmp_path / "w", *SMALL)
    (failed,) = read_back(tmp_path / "w")["SwanLab"]
    assert (failed["exit"], len(failed["losses"])) == ("RUN_STATE_CRASHED", 2)
    assert xtuner("train", tiny, "--work-dir", tmp_path / "away", "--tracker", "wandb", *SMALL) == 0
    (log,) = (tmp_path / "away").glob("*/2*.log")
    assert log.read_text().count("Wandb did not finish within 2 s; the run ends without it") == 1
    for wrong in ("mode='of'", "tag='x'", "project=3"):
        config.write_text(tiny.read_text() + local.replace("mode='local'", wrong))
        with pytest.raises(ConfigError, match=wrong.partition("=")[0]):
            xtuner("check-cfg", config)


def test_without_the_libraries(tiny: Path, xtuner: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    from xtuner.train.trackers import service

    monkeypatch.setattr(service, "installed", lambda package: None)
    for name, package in (("wandb", "wandb"), ("swanlab", "swanlab")):
        with pytest.raises(ConfigError, match=rf"needs the package {package}, which is not installed"):
            xtuner("train", tiny, "--dry-run", "--tracker", name)
    with pytest.raises(SystemExit):
        xtuner("train", tiny, "--tracker", "mlflow")


def test_backends_of_old_configs(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They become trackers if their library is installed."""
    config = tmp_path / "old.py"
    old = (
        "\nfrom mmengine.visualization import Visualizer, WandbVisBackend, LocalVisBackend\n"
        "from swanlab.integration.mmengine import SwanlabVisBackend\n"
        "visualizer = dict(type=Visualizer, vis_backends=[dict(type=LocalVisBackend), dict(type=WandbVisBackend, "
        "commit=True, init_kwargs=dict(project='p', tags=('a',), notes='n', mode='dryrun')), "
        "dict(type=SwanlabVisBackend, init_kwargs=dict(experiment_name='e', mode='cloud'))])\n"
    )
    config.write_text(tiny.read_text() + old)
    monkeypatch.setattr("xtuner.compat.trackers.installed", lambda package: None)
    assert load(str(config)).get("trackers") is None
    monkeypatch.setattr("xtuner.compat.trackers.installed", lambda package: "1.0")
    monkeypatch.setattr("xtuner.train.trackers.service.installed", lambda package: "1.0")
    found = load(str(config))
    wandb, swanlab = found.values["trackers"]
    assert wandb == {"type": "xtuner.train.trackers.wandb.Wandb", "project": "p", "tags": ["a"], "mode": "offline",
                     "init": {"notes": "n"}}  # fmt: skip
    assert swanlab == {"type": "xtuner.train.trackers.swanlab.SwanLab", "name": "e", "mode": "cloud", "init": {}}
    assert [b["type"].__name__ for b in found.get("visualizer.vis_backends")] == ["LocalVisBackend"]
    assert "mmengine.visualization.WandbVisBackend → xtuner.train.trackers.wandb.Wandb" in map(str, found.replaced)
    assert "visualizer.vis_backends.1.commit" in found.dropped
    for kind, spec in ((Wandb, wandb), (SwanLab, swanlab)):
        kind(**{k: v for k, v in spec.items() if k != "type"})
