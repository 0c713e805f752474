"""What a start leaves in the work dir before training begins: the lock, a folder for its logs, what it continues."""

import contextlib
import logging
import os
import platform
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from xtuner.config.redact import without_secrets
from xtuner.core import log
from xtuner.core.errors import ConfigError, XTunerError
from xtuner.core.files import recover, write_failure, write_json
from xtuner.core.log import logger
from xtuner.dist import collectives
from xtuner.train.checkpoints.work_dir_lock import WorkDirLock
from xtuner.train.reporting.start_report import environment
from xtuner.train.resume import Found
from xtuner.train.run import Progress, Settings
from xtuner.train.trackers import Tracker, Trackers
from xtuner.train.trackers.json_lines import JsonLines
from xtuner.train.trackers.tensorboard import TensorBoard


class EarlyLog(logging.Handler):
    """Keeps what is logged before there is a log file, for the file."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def into_file(self) -> None:
        for handler in logger.handlers[1:]:  # the first is the terminal, which has shown them
            for record in self.records:
                handler.handle(record)


def take_work_dir(work_dir: Path, at_the_end: contextlib.ExitStack) -> None:
    """Make the work dir and lock it. A run that is refused before it writes anything leaves no folder that was new."""
    new = [folder for folder in (work_dir, *work_dir.parents) if not folder.exists()]

    def give_back() -> None:
        for folder in new:
            with contextlib.suppress(OSError):  # a run has begun in it
                folder.rmdir()

    with _writing(work_dir):
        at_the_end.callback(give_back)
        work_dir.mkdir(parents=True, exist_ok=True)
        at_the_end.callback(WorkDirLock(work_dir).release)
        recover(work_dir, "iter_*.pth")
        recover(work_dir, "last_checkpoint")


def open_log(settings: Settings) -> Path:
    """This rank's log file, in a folder for this start, with environment, config as written and resolved."""
    ranks, config = settings.mesh.ranks, settings.config
    folder = Path(ranks.run_on_main(lambda: str(_make_folder(settings))))
    ranks.run_on_all(lambda: _see(folder))
    file = folder / (f"{folder.name}.log" if ranks.is_main else f"rank_{ranks.rank:05d}.log")
    log.setup(config.setting("log_level"), file, ranks.rank)
    return file


def open_trackers(settings: Settings, trackers: list[Tracker], folder: Path) -> Trackers:
    """Ours and those of the config, on rank 0."""
    found = Trackers([JsonLines(), TensorBoard(), *trackers] if settings.mesh.is_main else [])
    found.begin(folder, settings.config.resolved())
    return found


def record_start(settings: Settings, progress: Progress, found: Found | None, folder: Path) -> None:
    """What the records of this start continue: a checkpoint of this work dir by its name, another one by its path."""
    source = None if found is None else str(found.folder.resolve())
    if found and found.folder.resolve().parent == settings.work_dir.resolve():
        source = found.folder.name
    with _writing(folder):
        write_json(folder / "start.json", {"iteration": progress.state.iteration, "resumed_from": source})


def _make_folder(settings: Settings) -> Path:
    folder = settings.work_dir / time.strftime("%Y%m%d_%H%M%S")
    copy = settings.work_dir / settings.config.path.name
    new = [path for path in (folder, copy) if not os.path.lexists(path)]
    try:
        with _writing(folder):
            folder.mkdir(exist_ok=True)
            write_json(folder / "environment.json", environment(settings.config.path))
            write_json(folder / "config.json", settings.config.resolved())
            _copy_config(settings.config.path, copy)
    except XTunerError:  # a run that has not begun leaves nothing
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
    if copy.exists() and copy.samefile(config):  # the config lies in the work dir
        return
    copy.write_bytes(without_secrets(config.read_bytes()))


def _see(folder: Path) -> None:
    if not folder.is_dir():
        raise ConfigError(
            f"rank {collectives.rank()} on {platform.node()} does not see the work dir that rank 0 has made",
            where=str(folder),
            why="all ranks write their parts of a checkpoint there",
            do="give a --work-dir on a file system that all nodes share, as an absolute path",
        )
