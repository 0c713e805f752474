"""What is printed, logged and drawn may be lost, the run not; and what a person at a terminal sees."""

import contextlib
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from fcntl import ioctl
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers.configs import with_hook
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from xtuner.cli.main import main
from xtuner.core import files
from xtuner.core.append_file import AppendFile
from xtuner.core.command import exit_with
from xtuner.core.log import setup
from xtuner.core.system import stdio

Command = Callable[..., int]
XTUNER = [sys.executable, "-m", "xtuner"]
PLAIN = ["--cfg-options", "evaluation_inputs=[]", "save_steps=-1"]
NOT_UTF8 = os.fsdecode(b"caf\xe9")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.system(f"mount -t tmpfs -o size=16m none {place} 2>/dev/null") != 0:
        pytest.skip("tmpfs cannot be mounted here")
    yield place
    os.system(f"umount -l {place}")


FILL = """
            junk = open(run.work_dir.parent / "junk", "wb", buffering=0)
            for size in (65536, 1):
                try:
                    while True: junk.write(b"x" * size)
                except OSError: pass
        if it.state.iteration == 30:
            (run.work_dir.parent / "junk").unlink()
        if it.state.iteration == 33:
            import shutil; shutil.copytree(run.log.parent, KEPT); shutil.rmtree(run.log.parent)
"""


@pytest.mark.processes
def test_a_full_disk_and_a_vanished_folder_cost_lines(
    tiny: Path, tmp_path: Path, small_disk: Path, xtuner: Command, capsys: Any
) -> None:
    """Full after iteration 3, free after 30; after 33 somebody removes the folder of logs and curves."""
    kept = tmp_path / "kept"
    config = with_hook(tiny, tmp_path / "full.py", 3, FILL.replace("KEPT", repr(str(kept))))
    assert xtuner("train", config, "--work-dir", small_disk / "w", *PLAIN, "max_epochs=3") == 0
    shown = capsys.readouterr().err
    (new,) = small_disk.glob("w/*/vis_data")
    (last,) = small_disk.glob("w/iter_*.pth")
    files.verify(last)
    end = int(last.stem.removeprefix("iter_"))
    for folder, of_folder in ((kept / "vis_data", set(range(1, 34))), (new, set(range(34, end + 1)))):
        board = EventAccumulator(str(folder))
        board.Reload()
        lines = (folder / "scalars.json").read_text().splitlines()
        for written in ([json.loads(line)["iter"] for line in lines], [e.step for e in board.Scalars("loss")]):
            lost = of_folder - set(written)
            assert written == sorted(of_folder - lost)
            if folder == new:
                assert not lost
            else:  # what fits into the last page of a file is still written
                assert lost, written
                assert lost <= set(range(4, 31)), written
                assert f"{len(lost)} records of {small_disk}" in shown
    for name in ("scalars.json", "events.out", ".log"):
        assert len(re.findall(rf"{name}\S* cannot be written: No space left on device", shown)) == 1, shown
    for name in ("scalars.json", "events.out", ".log", "events.json"):
        assert len(re.findall(rf"{name}\S* was deleted; a new file is started", shown)) == 1, shown
    with open(small_disk / "junk", "wb", buffering=0) as junk, contextlib.suppress(OSError):
        while True:
            junk.write(b"x" * 65536)
    board = AppendFile(small_disk / "w" / "board", lambda text: None, b"header")
    board.write(b"1")
    (small_disk / "junk").unlink()
    board.write(b"2")
    board.write(b"3")
    assert (board.lost, board.path.read_bytes()) == (1, b"header23")
    (log,) = kept.glob("*.log")
    assert (f"iter 30/{end}" in shown, f"iter 30/{end}" in log.read_text()) == (True, False)


@pytest.mark.slow
@pytest.mark.processes
def test_closed_streams(tiny: Path, tmp_path: Path) -> None:
    """As cron and daemons start programs: all three closed, and two workers. Nothing is written where it should not."""

    def close() -> None:
        for fd in (0, 1, 2):
            os.close(fd)

    words = [*XTUNER, "train", tiny, "--work-dir", tmp_path / "w", *PLAIN]
    assert subprocess.run(words, preexec_fn=close, env={**os.environ, "NPROC_PER_NODE": "2"}).returncode == 0
    (checkpoint,) = tmp_path.glob("w/iter_*.pth")
    files.verify(checkpoint)
    assert "done: " in next(tmp_path.glob("w/*/2*.log")).read_text()


@pytest.mark.processes
def test_streams_that_nobody_reads(tiny: Path, tmp_path: Path) -> None:
    """A redirection to a full disk, a reader that has gone: training prints on; a result that is lost is an error."""
    hook = "print('x' * 100_000, flush=True)"
    config = with_hook(tiny, tmp_path / "print.py", 2, hook)
    read, write = os.pipe()
    os.close(read)
    with open("/dev/full", "w") as full:
        words = [*XTUNER, "train", config, "--work-dir", tmp_path / "w", *PLAIN]
        assert subprocess.run(words, stdout=write, stderr=full).returncode == 0
        done = subprocess.run([*XTUNER, "completion", "bash"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, "No space left on device" in done.stderr) == (74, True)
    assert subprocess.run([*XTUNER, "completion", "bash"], stdout=write).returncode == 141
    os.close(write)
    (checkpoint,) = tmp_path.glob("w/iter_*.pth")
    files.verify(checkpoint)


def at_a_terminal(words: list[Any], columns: int, **environ: str) -> tuple[int, int]:
    """(process, its terminal)."""
    child, terminal = pty.fork()
    if not child:
        os.environ.pop("NO_COLOR", None)
        os.environ.update(TERM="xterm", **environ)
        os.execv(words[0], list(map(str, words)))
    ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    return child, terminal


def read_until(terminal: int, text: str, shown: str = "") -> str:
    while text not in shown:
        assert select.select([terminal], [], [], 120)[0], f"waited for {text!r} in vain: {shown}"
        try:
            shown += os.read(terminal, 65536).decode(errors="replace")
        except OSError:  # the process has ended
            break
    return shown


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.processes
def test_a_person_at_a_terminal(tiny: Path, tmp_path: Path) -> None:
    """A progress line that fits, colours, an answer to Ctrl-C, and after the second one what was kept."""
    wait = "while signal.getsignal(signal.SIGINT) is not signal.default_int_handler: pass"
    action = f"run.save(last=True)\n            {wait}\n            import threading; threading.Event().wait()"
    config = with_hook(tiny, tmp_path / "wait.py", 2, action)
    words = [*XTUNER, "train", config, "--work-dir", tmp_path / "w", *PLAIN]
    child, terminal = at_a_terminal(words, 48)
    shown = read_until(terminal, "saved ")
    os.write(terminal, b"\x03")
    shown = read_until(terminal, "without saving", shown)
    os.write(terminal, b"\x03")
    shown = read_until(terminal, "\0", shown)
    assert exit_code(child) == 130
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    lines = re.findall(r"\r\x1b\[K(iter \d+/\d+  \d+ %[^\r^]*)(?=[\r^])", plain)
    assert lines, shown
    assert all(re.fullmatch(r"iter \d+/\d+  \d+ %  loss \d\.\d{4}  ETA [\d:]+", line) for line in lines), lines
    assert "SIGINT: finishing this iteration, then saving; press Ctrl-C again" in plain
    assert "\x1b[1;31mxtuner: stopped without saving, after iteration 2\x1b[0m" in shown
    assert f"newest checkpoint: {tmp_path / 'w' / 'iter_2.pth'}" in plain
    assert f"to continue from it: xtuner train {config} --work-dir {tmp_path / 'w'} --cfg-options" in plain
    assert plain.rstrip().endswith("--resume")
    assert "Traceback" not in plain
    (log,) = tmp_path.glob("w/*/*.log")
    assert "\x1b" not in log.read_text()
    assert "\r" not in log.read_text()


LOST = """
            try:
                raise KeyboardInterrupt
            finally:
                raise RuntimeError("release unlocked lock")
"""


@pytest.mark.processes
def test_an_interrupt_that_a_lock_has_replaced(tiny: Path, tmp_path: Path, xtuner: Command, capsys: Any) -> None:
    """Python's `Condition.wait` raises this instead if a Ctrl-C comes between two of its instructions."""
    config = with_hook(tiny, tmp_path / "lost.py", 2, LOST.strip())
    for run in (lambda: xtuner("train", config, "--work-dir", tmp_path / "w", *PLAIN), _lose_interrupt):
        with pytest.raises(SystemExit) as ended:
            exit_with(run)
        assert ended.value.code == 130
    shown = capsys.readouterr().err
    assert "xtuner: stopped without saving, after iteration 2" in shown
    assert shown.endswith("xtuner: interrupted\n")
    assert "Traceback" not in shown


def _lose_interrupt() -> int:
    try:
        raise KeyboardInterrupt
    finally:
        raise RuntimeError("release unlocked lock")


@pytest.fixture
def as_without_nohup() -> Iterator[None]:
    """Also if `nohup` has started the tests: a hang-up has its usual effect."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.processes
def test_a_terminal_that_closes(tiny: Path, tmp_path: Path, as_without_nohup: None) -> None:
    """It requests a stop: 75 and a checkpoint. Without colours if so wished."""
    config = with_hook(tiny, tmp_path / "wait.py", 3, "while os.isatty(2): pass")
    words = [*XTUNER, "train", config, "--work-dir", tmp_path / "w", *PLAIN]
    child, terminal = at_a_terminal(words, 200, NO_COLOR="1")
    shown = read_until(terminal, "iter  3/")
    os.close(terminal)
    assert exit_code(child) == 75
    assert "tok/s\r" in shown
    assert not re.search(r"\x1b\[[0-9;]*m", shown)
    (checkpoint,) = tmp_path.glob("w/iter_*.pth")
    files.verify(checkpoint)
    assert "on SIGHUP; run again with --resume" in next(tmp_path.glob("w/*/*.log")).read_text()


@pytest.mark.processes
def test_other_encodings_and_paths_that_are_not_utf8(corpus: Path, tiny: Path, tmp_path: Path, xtuner: Command) -> None:
    folder = tmp_path / NOT_UTF8
    shutil.copytree(corpus, folder)
    stats = [*XTUNER, "data", "stats", folder, "--max-length", "32", "--workers", "1"]
    for encoding in ("gbk", "ascii"):
        done = subprocess.run(stats, capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding})
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(os.fsencode(folder)), "the name as it is on the disk"
        assert (b"1.0" in done.stdout, "×".encode() in done.stdout) == (True, False)
    out = io.TextIOWrapper(io.BytesIO(), encoding="gbk", errors="xtuner_output")
    out.write(f"é—中{NOT_UTF8}😀")
    out.flush()
    assert out.buffer.getvalue() == "é".encode("gbk") + b"\xa1\xaa\xd6\xd0caf\xe9\\U0001f600"  # type: ignore[attr-defined]
    assert stdio.as_text(NOT_UTF8) == "caf\N{REPLACEMENT CHARACTER}"
    order = tmp_path / f"order{NOT_UTF8}"
    assert xtuner("data", "order", "--data-folder", tmp_path, "--save-folder", order) == 0
    text = (order / "data_order.txt").read_bytes()
    assert text.startswith(b"caf\xe9/code/a.bin\n")
    shown = ("--data-order", order / "data_order.txt", "--max-length", "32")
    assert xtuner("data", "show", tmp_path, *shown) == 0
    files.write_json(tmp_path / "facts.json", {"where": NOT_UTF8, "é": 1})
    assert files.read_json(tmp_path / "facts.json") == {"where": NOT_UTF8, "é": 1}
    with pytest.raises(Exception, match="the path is not UTF-8"):
        xtuner("train", tiny, "--work-dir", tmp_path / f"w{NOT_UTF8}", *PLAIN)
    assert xtuner("train", tiny, "--work-dir", tmp_path / "w", *PLAIN, f"dataset_folder={folder}") == 0


def test_outputs_that_cannot_be_written(tiny: Path, corpus: Path, tmp_path: Path, xtuner: Command, capsys: Any) -> None:
    """The system's refusals name path and way out (74); a bug, and a fault in a user's own code, are tracebacks (1)."""
    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / "data_order.txt").mkdir(parents=True)
    run = tmp_path / "run"
    (run / "1" / "vis_data").mkdir(parents=True)
    (run / "1" / "vis_data" / "scalars.json").write_text('{"iter": 1, "loss": 2.0}\n')
    name = "internlm2_tiny_w_tokenized_dataset"
    stats = ("data", "stats", corpus, "--max-length", "32", "--workers", "1", "--html")

    def code(command: Callable[[], int]) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            exit_with(command)
        return ended.value.code, capsys.readouterr().err  # type: ignore[return-value]

    for words, where in (
        (("copy-cfg", name, tmp_path / "file"), tmp_path / "file"),
        (("copy-cfg", name, "/proc"), f"/proc/{name}_copy.py"),
        (("data", "order", "--data-folder", corpus, "--save-folder", tmp_path / "file"), tmp_path / "file"),
        (("data", "order", "--data-folder", corpus, "--save-folder", tmp_path / "folder"), "folder/data_order.txt"),
        (("launch", "--scheduler", "slurm", tiny, "--output", tmp_path / "file" / "job.sh"), "file"),
        ((*stats, tmp_path / "file" / "x.html"), "file/x.html"),
        ((*stats, tmp_path / "folder"), "folder"),
        (("data", "tokenize", tiny, "--tokenizer", "x", "--output", "/proc/x", "--format", "txt"), ""),
        (("plot-loss", run, "-o", "/proc/loss.png"), "/proc/loss.png"),
        (("plot-loss", run, "-o", tmp_path / "file" / "loss.png"), "file"),
    ):
        found, text = code(partial(main, list(map(str, words))))
        assert found in (2, 74), text
        assert (text.startswith("xtuner: "), "Traceback" in text, str(where) in text) == (True, False, True), text

    def of_user() -> int:
        return os.open(tmp_path / "nowhere", os.O_RDONLY)

    def bug() -> int:
        raise OSError("no errno, no path")

    for wrong in (of_user, bug):
        found, text = code(wrong)
        assert (found, "Traceback" in text) == (1, True)


def test_a_log_line_obeys_no_control_character(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample or file name must not move the cursor, nor rename the window."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    setup(file=tmp_path / "x.log")
    from xtuner.core.log import logger

    logger.info("a\x1b]0;title\x07b\u009bc\n\td")
    assert sys.stderr.getvalue()[10:] == "a\\x1b]0;title\\x07b\\x9bc\n\td\n"  # type: ignore[attr-defined]
    monkeypatch.undo()
    setup()


def test_signals_of_nohup(as_without_nohup: None) -> None:
    from xtuner.dist.workers import stop_signals

    assert signal.SIGHUP in stop_signals()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in stop_signals()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_colours_are_for_people() -> None:
    assert not stdio.use_colour(io.StringIO())
