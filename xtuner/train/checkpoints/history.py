"""The existing checkpoints of a work dir: which one to resume from, and which to move aside for a new run."""

import os
import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from xtuner.core import path_kinds
from xtuner.core.errors import CheckpointError, ConfigError
from xtuner.core.files import MANIFEST
from xtuner.core.foreign_inputs import read_regular
from xtuner.core.log import logger
from xtuner.dist.collectives import Ranks
from xtuner.train.checkpoints.checkpoint import LAST, TRAINER, list_named, list_published, verify


@dataclass(frozen=True)
class ResumeChoice:
    """The checkpoint to resume from. Nothing on the disk has been changed yet."""

    folder: Path
    damaged: tuple[Path, ...] = ()  # newer checkpoints in the same folder that cannot be used


def select_checkpoint(
    work_dir: Path, resume: str | bool | None, ranks: Ranks, strict: bool = False, contents: bool = True
) -> ResumeChoice | None:
    """The verified checkpoint that `--resume` selects, or None for a fresh start. All ranks call it together.

    "auto" and True select the newest one in `work_dir`, or None if there never was one: safe for starts and restarts.
    Changes nothing on the disk; `set_aside_others` does. Without `contents` (a dry run), only sizes are compared.

    Raises: CheckpointError if no checkpoint is complete although there should be one, ConfigError for a path that is
    not a checkpoint.
    """
    if resume == "":
        raise ConfigError(
            "--resume is given an empty path",
            where="--resume",
            why="a fresh start instead would silently discard the run",
            do="set the variable that should contain the path, or omit --resume to start afresh",
        )
    if not resume:
        return None
    if resume is True or resume == "auto":
        return latest_checkpoint(work_dir, ranks, strict, contents)
    folder = Path(os.path.expanduser(resume))
    if ranks.run_on_main(lambda: _is_work_dir(folder)):
        return latest_checkpoint(folder, ranks, strict, contents)
    ranks.run_on_main(lambda: _require_checkpoint(folder, resume))
    verify(folder, ranks, contents)
    return ResumeChoice(folder)


def latest_checkpoint(work_dir: Path, ranks: Ranks, strict: bool = False, contents: bool = True) -> ResumeChoice | None:
    """The newest checkpoint whose files all match the manifest; each rank reads its share of the files.

    A damaged one is logged and skipped; with `strict` it is an error. None if the work dir never had a checkpoint.
    Raises: CheckpointError if it had some and none is complete.
    """
    damaged: list[Path] = []
    reason = ""
    for name in ranks.broadcast([p.name for _, p in reversed(list_published(work_dir))] if ranks.is_main else None):
        folder = work_dir / name
        try:
            verify(folder, ranks, contents)
        except CheckpointError as e:
            if strict:
                raise
            logger.warning(f"{name} is damaged: {e.what}")
            damaged.append(folder)
            reason = reason or f"{name} is damaged: {e.what}"
            continue
        if damaged:
            logger.warning(f"{name} is used: the newest complete checkpoint")
        ranks.run_on_main(lambda: _report_missing(work_dir))
        return ResumeChoice(folder, tuple(damaged))
    ranks.run_on_main(lambda: _refuse_to_start_afresh(work_dir, reason))
    return None


def _read_last(work_dir: Path) -> Path | None:
    """The path that `last_checkpoint` names; mmengine writes an absolute path there."""
    try:
        name = read_regular(work_dir / LAST).decode(errors="replace").strip()
    except FileNotFoundError:
        return None
    except OSError:
        return work_dir / LAST  # it exists, but cannot be read
    return work_dir / name[:4096] if name else None


def _report_missing(work_dir: Path) -> None:
    """Warn about files that look like checkpoints and are not used."""
    if (last := _read_last(work_dir)) and not _exists(last):
        logger.warning(f"{LAST} names {last.name}, which no longer exists; the newest existing checkpoint is used")
    for _, folder in list_named(work_dir):
        if folder.is_dir() and not (folder / MANIFEST).is_file():
            logger.warning(f"{folder.name} has no {MANIFEST}: it is incomplete and not used")


def _refuse_to_start_afresh(work_dir: Path, reason: str) -> None:
    """Raise CheckpointError if the work dir has traces of a run but no complete checkpoint."""
    last = _read_last(work_dir)
    others = [p.name for _, p in list_named(work_dir)] + [p.name for p in work_dir.glob("iter_*.pth.damaged*")]
    if not (reason or last or others):
        return
    if not reason and last and not _exists(last):
        reason = f"{LAST} names {last.name}, which does not exist"
    elif not reason:
        name = last.name if last else others[-1]
        kind = path_kinds.recognise(work_dir / name)
        reason = f"{name} is " + (kind.what if kind.foreign else "not a complete checkpoint")
        if kind.foreign:
            raise CheckpointError(
                f"--resume has nothing to resume from: {reason}",
                where=str(work_dir / name),
                why="it has no optimizer state and data position in our format",
                do=_advise_on_weights(kind),
            )
    raise CheckpointError(
        f"--resume has nothing to resume from: {reason}",
        where=str(work_dir),
        why="a fresh start instead would silently discard the run",
        do="restore a checkpoint (--resume PATH takes one from elsewhere), or start afresh on purpose: use another "
        "--work-dir, or this one without --resume (`resume = False` in the config), which moves its checkpoints to "
        "before_TIME/",
    )


def _advise_on_weights(kind: path_kinds.Kind) -> str:
    if kind.inner:
        return f"give one of them, such as --resume {kind.inner}, if xtuner wrote it"
    return kind.advice("start from its weights, without --resume, with load_from = '{}'")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def _is_work_dir(folder: Path) -> bool:
    return (
        os.path.isdir(folder)
        and not os.path.isfile(folder / TRAINER)
        and bool(list_named(folder) or _read_last(folder))
    )


def _require_checkpoint(folder: Path, resume: str) -> None:
    if os.path.isfile(folder / TRAINER):  # also False for an invalid path
        return
    kind = path_kinds.recognise(folder)
    if kind.foreign:
        raise ConfigError(
            f"--resume {resume}: this is {kind.what}",
            where=str(folder),
            why="it has no optimizer state and data position in our format",
            do=_advise_on_weights(kind),
        )
    partial = f"this is {kind.what}" if kind.what == path_kinds.PARTIAL else ""
    raise ConfigError(
        f"--resume {resume}: " + (partial or ("no checkpoint there" if kind.exists else "there is no such folder")),
        where=str(folder),
        why="a fresh start instead would silently discard the run",
        do="give an iter_N.pth folder, or `--resume auto` for the newest one in the work dir",
    )


def set_aside_others(work_dir: Path, chosen: ResumeChoice | None) -> None:
    """Move aside what this run does not continue: pruning and a later `--resume` would mistake it for this run's.

    Damaged checkpoints become `iter_N.pth.damaged`, so that a person can examine them. Checkpoints newer than the one
    resumed from move to `work_dir/before_TIME/`; all of them do for a fresh start or a resume from elsewhere.
    """
    ours = chosen is not None and chosen.folder.resolve().parent == work_dir.resolve()
    for folder in chosen.damaged if chosen and ours else ():
        aside = _unused_path(folder.with_name(f"{folder.name}.damaged"))
        folder.rename(aside)
        logger.warning(f"the damaged {folder.name} is kept as {aside.name}")
    if chosen and ours:
        last = int(chosen.folder.stem.removeprefix("iter_"))
        moved = [p for n, p in list_named(work_dir) if n > last]
    else:
        moved = [p for p in (work_dir / LAST, *sorted(work_dir.glob("iter_*.pth.damaged*"))) if os.path.lexists(p)]
        moved += [p for _, p in list_named(work_dir)]
    if not moved:
        return
    aside = _unused_path(work_dir / time.strftime("before_%Y%m%d_%H%M%S"))
    aside.mkdir()
    for path in moved:
        path.rename(aside / path.name)
    names = ", ".join(p.name for p in moved if p.name != LAST) or LAST
    if chosen and ours:
        logger.warning(f"checkpoints newer than {chosen.folder.name}, which is resumed, were moved to {aside}: {names}")
    else:
        logger.warning(f"checkpoints of an earlier run were moved to {aside}: {names}")


def _unused_path(path: Path) -> Path:
    """`path`, or `path.N` if something has that name."""
    return next(p for n in count(1) if not os.path.lexists(p := path.with_name(path.name + (f".{n}" if n > 1 else ""))))
