"""A callback from outside the package, in one file: what a run calls, and when, however the run ends."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

OWN = '''
import json
from xtuner.train.hooks import Hook


class Calls(Hook):
    """Each call as a line of JSON: its name, the iteration, and what came with it."""

    def __init__(self, path, fails=()):
        self.path, self.fails = path, fails

    def note(self, name, run, *more):
        with open(self.path, "a") as f:
            f.write(json.dumps([name, run.state.iteration, *more]) + "\\n")
        if name in self.fails:
            raise OSError(f"{name} with token=abcdef0123456789")

    def before_run(self, run):
        self.note("before_run", run)

    def after_iteration(self, run, it):
        self.note("after_iteration", run)

    def after_checkpoint(self, run, folder):
        self.note("after_checkpoint", run, folder.name, (folder / "manifest.json").is_file())

    def after_run(self, run):
        self.note("after_run", run)

    def on_error(self, run, error):
        self.note("on_error", run, str(error).partition(" ")[0])

    def on_end(self, run):
        self.note("on_end", run)
'''


@pytest.mark.processes
def test_the_whole_life_of_a_callback(
    tiny: Path, tmp_path: Path, xtuner: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_callbacks.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)

    def calls(name: str, *words: str, first: tuple[str, ...] = (), second: tuple[str, ...] = ()) -> list[list[object]]:
        """What two callbacks noted, of which each fails in the calls that are named."""
        files = [str(tmp_path / f"{name}.{i}") for i in (1, 2)]
        hooks = [dict(type="my_callbacks.Calls", path=f, fails=e) for f, e in zip(files, (first, second), strict=True)]
        config = tmp_path / f"{name}.py"
        config.write_text(tiny.read_text() + f"\ncustom_hooks = {hooks!r}\n")
        small = ("accumulative_counts=8", "save_steps=1")
        code = xtuner("train", config, "--work-dir", tmp_path / name, *words, "--cfg-options", *small)
        assert code == (75 if words else 0)
        return [[json.loads(line) for line in Path(f).read_text().splitlines()] for f in files]

    mine, other = calls("good")
    assert mine == other
    assert [c for c in mine if c[0] != "after_checkpoint"] == [
        ["before_run", 0], ["after_iteration", 1], ["after_iteration", 2], ["after_iteration", 3],
        ["after_run", 3], ["on_end", 3],
    ]  # fmt: skip
    saved = [c for c in mine if c[0] == "after_checkpoint"]
    assert [c[2:] for c in saved] == [[f"iter_{n}.pth", True] for n in (1, 2, 3)]
    assert mine.index(saved[-1]) == len(mine) - 2
    # stopped: no after_run
    mine, _ = calls("stopped", "--max-minutes", "0")
    assert [c[0] for c in mine] == ["before_run", "after_iteration", "after_checkpoint", "on_end"]
    # an error is what the run ends with, whatever fails after it
    with pytest.raises(OSError, match="after_iteration"):
        calls("failed", first=("after_iteration", "on_error", "on_end"))
    mine, other = ([json.loads(line) for line in (tmp_path / f"failed.{i}").read_text().splitlines()] for i in (1, 2))
    assert mine == [["before_run", 0], ["after_iteration", 1], ["on_error", 1, "after_iteration"], ["on_end", 1]]
    assert other == [["before_run", 0], ["on_error", 1, "after_iteration"], ["on_end", 1]]
    (log,) = (tmp_path / "failed").glob("*/*.log")
    for name in ("on_error", "on_end"):
        assert f"Calls.{name} failed: OSError: {name} with token=***" in log.read_text()
    # one that never began is not ended
    with pytest.raises(OSError, match="before_run"):
        calls("begins", first=("before_run",))
    assert not (tmp_path / "begins.2").exists()
    # an end that fails does not fail the run
    mine, other = calls("ends", first=("on_end",), second=("on_end",))
    assert mine[-1] == other[-1] == ["on_end", 3]
