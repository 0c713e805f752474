"""What a start creates in the work dir before training: the lock, a folder for its logs, a record of its origin."""

import contextlib
import logging
import os
import platform
import re
import secrets
import shutil
import string
import time
from collections.abc import Iterator
from pathlib import Path

from xtuner.config.redact import without_secrets
from xtuner.core import log
from xtuner.core.errors import CheckpointError, ConfigError, XTunerError
from xtuner.core.files import read_json, recover, write_failure, write_json
from xtuner.core.log import logger
from xtuner.dist import collectives
from xtuner.train.checkpoints.work_dir_lock import WorkDirLock
from xtuner.train.reporting.start_report import describe_environment
from xtuner.train.resume import ResumePoint
from xtuner.train.run import Progress, Settings
from xtuner.train.trackers import Tracker
from xtuner.train.trackers.group import Trackers
from xtuner.train.trackers.json_lines import JsonLines
from xtuner.train.trackers.tensorboard import TensorBoard

START = "start.json"
RUN_ID = re.compile("[a-z0-9]{21}")  # what all services accept


class EarlyLog(logging.Handler):
    """Buffers log records until the log file exists."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def write_to_file(self) -> None:
        for handler in logger.handlers[1:]:  # the first is the terminal, which has shown them already
            for record in self.records:
                handler.handle(record)


def acquire_work_dir(work_dir: Path, cleanup: contextlib.ExitStack) -> None:
    """Create the work dir and lock it. If the run fails before it writes anything, new folders are removed."""
    new = [folder for folder in (work_dir, *work_dir.parents) if not folder.exists()]

    def remove_new_folders() -> None:
        for folder in new:
            with contextlib.suppress(OSError):  # not empty: the run has written files
                folder.rmdir()

    with _writing(work_dir):
        cleanup.callback(remove_new_folders)
        work_dir.mkdir(parents=True, exist_ok=True)
        cleanup.callback(WorkDirLock(work_dir).release)
        recover(work_dir, "iter_*.pth")
        recover(work_dir, "last_checkpoint")


def open_log(settings: Settings) -> Path:
    """Create the folder of this start, with environment and configs; returns this rank's log file in it."""
    ranks, config = settings.mesh.ranks, settings.config
    folder = Path(ranks.run_on_main(lambda: str(_make_folder(settings))))
    ranks.run_on_all(lambda: _require_visible(folder))
    file = folder / (f"{folder.name}.log" if ranks.is_main else f"rank_{ranks.rank:05d}.log")
    log.setup(config.setting("log_level"), file, ranks.rank)
    return file


def open_trackers(settings: Settings, trackers: list[Tracker], folder: Path, found: ResumePoint | None) -> Trackers:
    """The built-in trackers and those of the config, on rank 0."""
    if not settings.mesh.is_main:
        return Trackers([])
    run_id = _last_run_id(settings.work_dir) if _is_own(settings, found) else None
    opened = Trackers([JsonLines(), TensorBoard()], trackers, run_id or _make_run_id())
    opened.begin(folder, settings.config.resolved())
    return opened


def record_start(settings: Settings, progress: Progress, found: ResumePoint | None, folder: Path, run_id: str) -> None:
    """Write start.json: the resumed checkpoint, by name if it is in this work dir, else by path; the run's identity."""
    source = None if found is None else str(found.folder.resolve())
    if found and _is_own(settings, found):
        source = found.folder.name
    facts = {"iteration": progress.state.iteration, "resumed_from": source, "run_id": run_id}
    with _writing(folder):
        write_json(folder / START, facts)


def _is_own(settings: Settings, found: ResumePoint | None) -> bool:
    """Whether a start continues a run of this work dir."""
    return found is not None and found.folder.resolve().parent == settings.work_dir.resolve()


def _last_run_id(work_dir: Path) -> str | None:
    """The identity that the newest start has recorded. A new run moves the checkpoints of older ones aside."""
    for file in sorted(work_dir.glob(f"*/{START}"), reverse=True):
        with contextlib.suppress(CheckpointError, TypeError, KeyError):  # of an older version, or damaged
            if RUN_ID.fullmatch(run_id := read_json(file)["run_id"]):
                return str(run_id)
    return None


def _make_run_id() -> str:
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(21))


def _make_folder(settings: Settings) -> Path:
    folder = settings.work_dir / time.strftime("%Y%m%d_%H%M%S")
    copy = settings.work_dir / settings.config.path.name
    new = [path for path in (folder, copy) if not os.path.lexists(path)]
    try:
        with _writing(folder):
            folder.mkdir(exist_ok=True)
            write_json(folder / "environment.json", describe_environment(settings.config.path))
            write_json(folder / "config.json", settings.config.resolved())
            _copy_config(settings.config.path, copy)
    except XTunerError:  # a run that has not started leaves no files
        if folder in new:
            shutil.rmtree(folder, ignore_errors=True)
        if copy in new:
            copy.unlink(missing_ok=True)
        raise
    return folder


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise write_failure(e, "the work dir", folder, "give another one with --work-dir") from None


def _copy_config(config: Path, copy: Path) -> None:
    if copy.exists() and copy.samefile(config):  # the config is the copy in the work dir
        return
    copy.write_bytes(without_secrets(config.read_bytes()))


def _require_visible(folder: Path) -> None:
    if not folder.is_dir():
        raise ConfigError(
            f"rank {collectives.rank()} on {platform.node()} does not see the work dir that rank 0 created",
            where=str(folder),
            why="all ranks write their parts of a checkpoint there",
            do="give a --work-dir on a file system that all nodes share, as an absolute path",
        )
