"""A place for figures that the package does not know: one class in a user's file, named in a config. Whatever it does,
the run neither waits nor ends."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.configs import with_hook

from xtuner.core.errors import ConfigError
from xtuner.train.trackers import group

OWN = '''
import json
from xtuner.train.trackers import Tracker
class ToFile(Tracker):
    """Each call as a line of JSON."""
    def __init__(self, path, fails_at=0):
        self.path, self.fails_at = path, fails_at
    def write(self, *words):
        with open(self.path, "a") as f:
            f.write(json.dumps(words) + "\\n")
    def begin(self, folder, config):
        self.write("begin", str(folder), config["max_length"])
    def log(self, record):
        if record["iter"] == self.fails_at:
            raise OSError("the service with token=abcdef0123456789 is away")
        self.write("log", record)
    def text(self, tag, value, iteration):
        self.write("text", tag, value, iteration)
    def close(self):
        self.write("close")
class Away(Tracker):
    def begin(self, folder, config):
        raise ConnectionError("no route")
class Plain: pass
'''


@pytest.mark.processes
def test_trackers_of_a_config(tiny: Path, tmp_path: Path, xtuner: Callable[..., int]) -> None:
    first = "from torch.optim import AdamW\n"
    good, bad, config = tmp_path / "good", tmp_path / "bad", tmp_path / "own.py"
    listed = (
        f"[dict(type=ToFile, path={str(good)!r}), dict(type=ToFile, path={str(bad)!r}, fails_at=2), dict(type=Away)]"
    )
    config.write_text(tiny.read_text().replace(first, f"{first}{OWN}") + f"\ntrackers = {listed}\n")
    small = ["--cfg-options", "custom_hooks=[]", "default_hooks.logger.interval=1", "accumulative_counts=8"]
    assert xtuner("check-cfg", config) == 0
    assert not good.exists()
    assert xtuner("train", config, "--work-dir", tmp_path / "w", *small) == 0
    (scalars,) = (tmp_path / "w").glob("*/vis_data/scalars.json")
    begin, *logged, end = [json.loads(line) for line in good.read_text().splitlines()]
    assert begin == ["begin", str(scalars.parent.parent), 32]
    assert [record for _, record in logged] == [json.loads(line) for line in scalars.read_text().splitlines()]
    assert {"iter", "loss", "lr", "grad_norm"} <= logged[0][1].keys()
    assert end == ["close"]
    assert [json.loads(line)[0] for line in bad.read_text().splitlines()] == ["begin", "log"]
    (log,) = scalars.parent.parent.glob("*.log")
    left_out = [line for line in log.read_text().splitlines() if "is no longer used" in line]
    assert len(left_out) == 2
    assert left_out[0].endswith("Away failed and is no longer used; the run continues: ConnectionError: no route")
    assert "token=***" in left_out[1]
    for wrong, message in (
        ("trackers=[dict(type=Plain)]", "Plain is not a tracker"),
        ("trackers=[dict(type=ToFile)]", "path"),
        ("trackers=dict(type=Away)", "is not a list"),
        ("trackers=[3]", "expected dict"),
    ):
        config.write_text(tiny.read_text().replace(first, f"{first}{OWN}") + f"\n{wrong}\n")
        for command in ("check-cfg", "train"):
            with pytest.raises(ConfigError, match=message):
                xtuner(command, config, *(["--work-dir", tmp_path / "none"] if command == "train" else []))
    assert not (tmp_path / "none").exists()


APART = """
import os, sys
from dataclasses import dataclass
from xtuner.train.trackers import Tracker
@dataclass
class Apart(Tracker):
    path: str
    crashes_at: int = 0
    own_process = True
    def begin(self, folder, config):
        print("printed by the library")
        sys.exit = None
        return f"at {os.getpid()} of {os.getppid()}"
    def log(self, record):
        if record["iter"] == self.crashes_at:
            os._exit(3)
        with open(self.path, "a") as f:
            print(record["iter"], self.run_id, file=f)
    def close(self):
        with open(self.path, "a") as f:
            print("closed", file=f)
"""
STUCK = """
import threading
from xtuner.train.trackers import Tracker
class Stuck(Tracker):
    def log(self, record):
        threading.Event().wait()
"""


@pytest.mark.processes
def test_a_run_does_not_wait_for_a_tracker(
    tiny: Path, tmp_path: Path, xtuner: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is stuck, one in a process of its own, and one whose process ends."""
    first = "from torch.optim import AdamW\n"
    (tmp_path / "apart_tracker.py").write_text(APART)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(group, "MOST_WAITING", 3)
    monkeypatch.setattr(group, "CLOSING", 2.0)
    good, bad, config = tmp_path / "good", tmp_path / "bad", tmp_path / "own.py"
    listed = f"[dict(type=Stuck), dict(type=Apart, path={str(good)!r}), dict(type=Apart, path={str(bad)!r}, "
    text = tiny.read_text().replace(first, f"{first}from apart_tracker import Apart\n{STUCK}")
    config.write_text(f"{text}\ntrackers = {listed}crashes_at=2)]\n")
    small = ["--cfg-options", "default_hooks.logger.interval=1", "accumulative_counts=8", "evaluation_inputs=[]"]
    monkeypatch.setattr(group.Background, "_add", wait_for_others(group.Background._add))
    assert xtuner("train", config, "--work-dir", tmp_path / "w", *small) == 0
    (log,) = (tmp_path / "w").glob("*/2*.log")
    text = log.read_text()
    assert text.count("Stuck is slow: 3 records wait for it") == 1
    assert text.count("Stuck did not finish within 2 s; the run ends without it") == 1
    crash = "Apart failed and is no longer used; the run continues: RuntimeError: its process ended with code 3; see"
    assert text.count(crash) == 1
    assert text.count("Apart: at ") == 2
    *lines, last = good.read_text().splitlines()
    (start,) = (tmp_path / "w").glob("*/start.json")
    assert lines == [f"{number} {json.loads(start.read_text())['run_id']}" for number in (1, 2, 3)]
    assert last == "closed"
    assert [line.split()[0] for line in bad.read_text().splitlines()] == ["1"]
    assert "printed by the library" in (log.parent / "apart.log").read_text()


def wait_for_others(add: Callable[..., None]) -> Callable[..., None]:
    """Give a call, unless to the tracker that is stuck, and wait until it was received: the queue is short here."""

    def call(self: group.Background, *words: object) -> None:
        add(self, *words)
        while self._name != "Stuck" and self._thread.is_alive() and not self._calls.empty():
            pass

    return call


@pytest.mark.processes
def test_a_command_at_the_end(tiny: Path, tmp_path: Path, xtuner: Callable[..., int], capsys: Any) -> None:
    """`on_event`: once for each way to end, with whatever the error says as one argument; its failure is reported."""
    got, hostile = tmp_path / "got", '\'; touch "$(pwd)/x" `id` ${HOME} \\n {json}'
    command = f"sh -c 'printf %s \"$1\" >> {got}; cat >> {got}' sh {{json}}"
    small = ["--cfg-options", "default_hooks.logger.interval=1", "accumulative_counts=5", "evaluation_inputs=[]"]
    config = with_hook(tiny, tmp_path / "fails.py", 2, f"raise ValueError({hostile!r})")
    for path in (tiny, config):
        text = path.read_text()
        path = tmp_path / f"{path.stem}_event.py"
        path.write_text(f"{text}\non_event = {command!r}\n")
    assert xtuner("train", tmp_path / "tiny_event.py", "--work-dir", tmp_path / "w", *small, "--max-minutes", "0") == 75
    assert xtuner("train", tmp_path / "tiny_event.py", "--work-dir", tmp_path / "w", *small, "--resume") == 0
    with pytest.raises(ValueError, match="touch"):
        xtuner("train", tmp_path / "fails_event.py", "--work-dir", tmp_path / "f", *small)
    pairs = got.read_text().replace("}{", "}\n{").splitlines()
    events = [json.loads(line) for line in pairs]
    assert [e["event"] for e in events] == ["stop", "stop", "end", "end", "failure", "failure"]
    assert [e["iter"] for e in events[::2]] == [1, 6, 2]
    assert (events[0]["reason"], events[4]["error"]) == ("--max-minutes", f"ValueError: {hostile}")
    assert events[4]["work_dir"] == str(tmp_path / "f")
    capsys.readouterr()
    failing = "on_event=sh -c 'echo it said >&2; exit 9'"
    assert xtuner("train", tiny, "--work-dir", tmp_path / "e", *small, failing) == 0
    why = "on_event failed and is no longer used; the run continues: RuntimeError: sh ended with code 9 at the event"
    assert f"{why} 'end': it said" in capsys.readouterr().err
    for wrong, message in (("no-such-program {json}", "does not name a program"), ("sh 'x", "split"), (" ", "empty")):
        with pytest.raises(ConfigError, match=message) as error:
            xtuner("check-cfg", tiny, "--cfg-options", f"on_event={wrong}")
        assert "on_event" in str(error.value)
