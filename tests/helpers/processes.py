"""Processes: the command line in one of its own; a run that is killed at a chosen write."""

import contextlib
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.runs import contents, records
from xtuner.cli.main import main
from xtuner.core import files


def shell(*words: Any, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    full = [sys.executable, "-m", "xtuner.cli.main", *map(str, words)]
    return subprocess.run(full, capture_output=True, text=True, cwd=cwd, env={**os.environ, **env})


def listening_socket() -> socket.socket:
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    server.listen()
    return server


SHORT = ["custom_hooks=[]", "max_length=128", "save_steps=1", "save_total_limit=2"]  # 3 iterations


POINTS = ("fsync", "rename", "replace", "unlink", "rmdir")  # every system call that makes a write last, or undoes one


def assert_resume_is_exact(tiny: Path, work_dir: Path, straight: Path) -> None:
    """Resume to the end; the end is the undisturbed run's."""
    assert main(["train", str(tiny), "--work-dir", str(work_dir), "--resume", "--cfg-options", *SHORT]) == 0
    assert contents(work_dir / straight.name) == contents(straight)
    assert records(work_dir) == records(straight.parent)
    assert [p for p in work_dir.iterdir() if p.name.startswith(".")] == []  # nothing is left of what was killed
    assert all((p / files.MANIFEST).is_file() for p in work_dir.glob("iter_*.pth"))


def stand_still_at(point: int, pipe: int, go: int, words: list[str]) -> None:
    """Run a command in this (forked) process; at a write point, or at all (0), tell the parent and wait for it."""
    seen = 0

    def pausing(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            seen += 1
            if point in (seen, 0):
                os.write(pipe, b"x")
                os.read(go, 1)
            return call(*args, **kwargs)

        return wrapped

    for name in POINTS:
        setattr(os, name, pausing(getattr(os, name)))
    code = main(words)
    os.write(pipe, b"e")  # the run has fewer points
    os._exit(code)


def killed_at(
    point: int,
    words: list[str],
    meanwhile: Callable[[], None] = lambda: None,
    signalled: Callable[[int], None] | None = None,
) -> int:
    """Kill a run at a write point; 0 if it ended before. With `signalled` signal it there, let it continue, and return
    its exit code. `meanwhile` is called while it waits."""
    child, read, go = _start_pausing(point, words)
    reached = os.read(read, 1) == b"x"
    if reached:
        meanwhile()
    if reached and signalled and child.pid:
        signalled(child.pid)
        os.write(go, b"x")
    else:
        child.kill()
    child.join()
    os.close(read)
    os.close(go)
    return (child.exitcode or 0) if signalled else int(reached)


def states_at_write_points(words: list[str], work_dir: Path, into: Path) -> tuple[int, list[Path]]:
    """(number of write points of a run, copies of its work dir at these points, one of each state of its checkpoints):
    what is there if the process is killed."""
    child, read, go = _start_pausing(0, words)
    count, found = 0, dict[tuple[Any, ...], Path]()
    while os.read(read, 1) == b"x":
        count += 1
        copy = into / str(count)
        while True:  # other threads continue
            with contextlib.suppress(FileNotFoundError, shutil.Error):
                if work_dir.exists():
                    shutil.copytree(work_dir, copy, symlinks=True)
                break
            shutil.rmtree(copy, ignore_errors=True)
        logs = {file.parent.parent for file in copy.glob("*/vis_data/*")}
        state = [p for p in sorted(copy.rglob("*")) if p.is_file() and not logs.intersection(p.parents)]
        found.setdefault(tuple((p.relative_to(copy), p.read_bytes()) for p in state), copy)
        os.write(go, b"x")
    child.join()
    os.close(read)
    os.close(go)
    assert child.exitcode == 0
    return count, list(found.values())


def _start_pausing(point: int, words: list[str]) -> tuple[Any, int, int]:
    """(process, pipe that it writes to, pipe that lets it continue), see `stand_still_at`."""
    read, write = os.pipe()
    wait, go = os.pipe()
    child = multiprocessing.get_context("fork").Process(target=stand_still_at, args=(point, write, wait, words))
    child.start()
    os.close(write)
    os.close(wait)
    return child, read, go
