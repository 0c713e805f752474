"""The checkpoints that a work dir holds already: which of them a resume begins from, and what is in a new run's way."""

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
from xtuner.train.checkpoints.checkpoint import LAST, TRAINER, check, found, named


@dataclass(frozen=True)
class Chosen:
    """What a resume would begin from, when nothing has been touched yet."""

    folder: Path
    damaged: tuple[Path, ...] = ()  # newer ones in its folder that cannot be used


def to_resume(
    work_dir: Path, resume: str | bool | None, ranks: Ranks, strict: bool = False, contents: bool = True
) -> Chosen | None:
    """What `--resume` means: None for a fresh start, or a checkpoint that verifies. All ranks call it together.

    "auto" and True take the newest in `work_dir`, or None if there never was one: safe in scripts that start and
    restart. Changes nothing on the disk; `make_way` does. Without `contents` (a dry run) sizes alone are compared.

    Raises: CheckpointError if there is nothing whole to resume from although there should be, ConfigError for a path
    that leads to no checkpoint.
    """
    if resume == "":
        raise ConfigError(
            "--resume is given an empty path",
            where="--resume",
            why="starting afresh instead would throw the run away unnoticed",
            do="set the variable that should hold the path, or leave --resume out to start afresh",
        )
    if not resume:
        return None
    if resume is True or resume == "auto":
        return latest(work_dir, ranks, strict, contents)
    folder = Path(os.path.expanduser(resume))
    if ranks.run_on_main(lambda: _is_work_dir(folder)):
        return latest(folder, ranks, strict, contents)
    ranks.run_on_main(lambda: _there(folder, resume))
    check(folder, ranks, contents)
    return Chosen(folder)


def latest(work_dir: Path, ranks: Ranks, strict: bool = False, contents: bool = True) -> Chosen | None:
    """The newest checkpoint whose every file is as it was written; each rank reads its share of the files.

    A damaged one is named, and the one before is used; with `strict` it is an error instead. None if the work dir has
    never had a checkpoint. Raises: CheckpointError if it had, and none is whole.
    """
    damaged: list[Path] = []
    told = ""
    for name in ranks.broadcast([p.name for _, p in reversed(found(work_dir))] if ranks.is_main else None):
        folder = work_dir / name
        try:
            check(folder, ranks, contents)
        except CheckpointError as e:
            if strict:
                raise
            logger.warning(f"{name} is damaged: {e.what}")
            damaged.append(folder)
            told = told or f"{name} is damaged: {e.what}"
            continue
        if damaged:
            logger.warning(f"{name} is used, the newest that is whole")
        ranks.run_on_main(lambda: _report_missing(work_dir))
        return Chosen(folder, tuple(damaged))
    ranks.run_on_main(lambda: _refuse_to_start_afresh(work_dir, told))
    return None


def _last(work_dir: Path) -> Path | None:
    """What `last_checkpoint` names; mmengine writes a whole path there."""
    try:
        name = read_regular(work_dir / LAST).decode(errors="replace").strip()
    except FileNotFoundError:
        return None
    except OSError:
        return work_dir / LAST  # something that cannot be read: not nothing
    return work_dir / name[:4096] if name else None


def _report_missing(work_dir: Path) -> None:
    """Mention what looks like checkpoints and is not used."""
    if (last := _last(work_dir)) and not _exists(last):
        logger.warning(f"{LAST} names {last.name}, which is not there any more; the newest that is there is used")
    for _, folder in named(work_dir):
        if folder.is_dir() and not (folder / MANIFEST).is_file():
            logger.warning(f"{folder.name} has no {MANIFEST}: it is not whole, and not used")


def _refuse_to_start_afresh(work_dir: Path, told: str) -> None:
    """Raise CheckpointError if the work dir, in which nothing is whole, shows that a run was here."""
    last = _last(work_dir)
    others = [p.name for _, p in named(work_dir)] + [p.name for p in work_dir.glob("iter_*.pth.damaged*")]
    if not (told or last or others):
        return
    if not told and last and not _exists(last):
        told = f"{LAST} names {last.name}, which is not there"
    elif not told:
        name = last.name if last else others[-1]
        kind = path_kinds.recognise(work_dir / name)
        told = f"{name} is " + (kind.what if kind.foreign else "not a complete checkpoint")
        if kind.foreign:
            raise CheckpointError(
                f"--resume has nothing to resume from: {told}",
                where=str(work_dir / name),
                why="it has no optimizer state and data position of ours",
                do=_weights(kind),
            )
    raise CheckpointError(
        f"--resume has nothing to resume from: {told}",
        where=str(work_dir),
        why="starting afresh instead would throw the run away unnoticed",
        do="restore a checkpoint (--resume PATH takes one from elsewhere), or start afresh on purpose: another "
        "--work-dir, or this one without --resume (`resume = False` in the config), which moves what is there to "
        "before_TIME/",
    )


def _weights(kind: path_kinds.Kind) -> str:
    if kind.inner:
        return f"give one of them, such as --resume {kind.inner}, if it is of xtuner"
    return kind.advice("start from its weights, without --resume, with load_from = '{}'")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def _is_work_dir(folder: Path) -> bool:
    return os.path.isdir(folder) and not os.path.isfile(folder / TRAINER) and bool(named(folder) or _last(folder))


def _there(folder: Path, resume: str) -> None:
    if os.path.isfile(folder / TRAINER):  # False, too, for what no path can be
        return
    kind = path_kinds.recognise(folder)
    if kind.foreign:
        raise ConfigError(
            f"--resume {resume}: this is {kind.what}",
            where=str(folder),
            why="it has no optimizer state and data position of ours",
            do=_weights(kind),
        )
    partial = f"this is {kind.what}" if kind.what == path_kinds.PARTIAL else ""
    raise ConfigError(
        f"--resume {resume}: " + (partial or ("no checkpoint there" if kind.exists else "there is no such folder")),
        where=str(folder),
        why="starting afresh instead would throw the run away unnoticed",
        do="give an iter_N.pth folder, or `--resume auto` for the newest one of the work dir",
    )


def make_way(work_dir: Path, chosen: Chosen | None) -> None:
    """Move what does not lead to this run out of its way: pruning and a later `--resume` would take it for this run's.

    Damaged checkpoints become `iter_N.pth.damaged`, for a person to look at. Into `work_dir/before_TIME/` go those
    that are newer than the one resumed from; for a fresh start, or one from elsewhere, all.
    """
    ours = chosen is not None and chosen.folder.resolve().parent == work_dir.resolve()
    for folder in chosen.damaged if chosen and ours else ():
        aside = _free(folder.with_name(f"{folder.name}.damaged"))
        folder.rename(aside)
        logger.warning(f"{folder.name}, which is damaged, is kept as {aside.name}")
    if chosen and ours:
        last = int(chosen.folder.stem.removeprefix("iter_"))
        moved = [p for n, p in named(work_dir) if n > last]
    else:
        moved = [p for p in (work_dir / LAST, *sorted(work_dir.glob("iter_*.pth.damaged*"))) if os.path.lexists(p)]
        moved += [p for _, p in named(work_dir)]
    if not moved:
        return
    aside = _free(work_dir / time.strftime("before_%Y%m%d_%H%M%S"))
    aside.mkdir()
    for path in moved:
        path.rename(aside / path.name)
    names = ", ".join(p.name for p in moved if p.name != LAST) or LAST
    if chosen and ours:
        logger.warning(f"later checkpoints than {chosen.folder.name}, which is resumed, are now in {aside}: {names}")
    else:
        logger.warning(f"checkpoints of an earlier run were here; they are now in {aside}: {names}")


def _free(path: Path) -> Path:
    """`path`, or with a number behind it if there is something of that name."""
    return next(p for n in count(1) if not os.path.lexists(p := path.with_name(path.name + (f".{n}" if n > 1 else ""))))
