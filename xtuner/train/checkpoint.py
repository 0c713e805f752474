"""`work_dir/iter_N.pth/`: a directory that is either whole or not there.

    weights/          config.json, model.safetensors: fp32 masters, itself a Hugging Face folder (internlm2 layout)
    optimizer/        rank_00000.safetensors (absent with save_optimizer=False)
    trainer.json      position in the data, counters, what the run depends on
    manifest.json     size and sha256 of every file; written last

`work_dir/last_checkpoint` is a hint for people and scripts; the manifests are the truth.
"""

import re
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from xtuner.core.dist import Ranks, attempt
from xtuner.core.errors import CheckpointError, ConfigError
from xtuner.core.files import (
    MANIFEST,
    atomic_file,
    publish,
    read_json,
    remove_tree,
    sync_folder,
    usual_permissions,
    verify,
    write_manifest,
)
from xtuner.core.log import human_bytes, logger
from xtuner.engine.snapshot import Snapshot
from xtuner.train.state import TrainState

TRAINER = "trainer.json"


def write(
    work_dir: Path, state: TrainState, snapshot: Snapshot, facts: dict[str, Any], ranks: Ranks, keep: int = -1
) -> tuple[Path, int]:
    """Write the checkpoint of `state` together with all ranks, then remove all but the newest `keep` (if positive).

    Rank 0 chooses a temporary name; every rank writes, syncs and hashes its own files there; when all have, rank 0
    alone writes the manifest and gives the directory its name. A failure of any rank is raised on all; older
    checkpoints stay.

    Returns the checkpoint and its bytes of tensors. Raises: CheckpointError.
    """
    target = work_dir / f"iter_{state.iteration}.pth"
    needed = int(ranks.sum(snapshot.nbytes))
    if ranks.is_main:
        snapshot.json[TRAINER] = {"state": state.to_json(), **facts}
    folder = _agreed(ranks, target, lambda: _begin(target, needed) if ranks.is_main else "")[0]
    try:
        reports = _agreed(ranks, target, lambda: snapshot.write(Path(folder)))
        entries = {name: entry for report in reports for name, entry in report.items()}
        if ranks.is_main:
            _agreed(ranks, target, lambda: _publish(Path(folder), target, entries, state.iteration, keep))
        else:
            _agreed(ranks, target, lambda: None)
    except CheckpointError:
        if ranks.is_main:
            remove_tree(Path(folder))
        raise
    return target, needed


def _begin(target: Path, needed: int) -> str:
    """Make the temporary folder if the disk has room."""
    _room(target.parent, needed)
    return tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent)


def _agreed(ranks: Ranks, target: Path, action: Callable[[], Any]) -> list[Any]:
    """Run `action` on every rank. Returns all JSON results, by rank, or raises on every rank what failed on any."""
    try:
        outcome, failure = attempt(action)
    except Exception as e:  # a bug in one rank's writing must not leave the others waiting
        outcome, failure = None, {"what": f"{type(e).__name__}: {e}"}
    outcomes = ranks.gather({"value": outcome[0]} if outcome else {"failure": failure})
    failures = {rank: o["failure"] for rank, o in enumerate(outcomes) if "failure" in o}
    if failures:
        told = "; ".join(f"rank {rank}: {failure['what']}" for rank, failure in failures.items())
        first = next(iter(failures.values()))
        raise CheckpointError(
            f"the checkpoint cannot be written: {told}",
            where=first.get("where") or str(target),
            why="the older checkpoints are untouched",
            do=first.get("do") or "look at the disk: space, quota, permissions",
        )
    return [o["value"] for o in outcomes]


def _publish(folder: Path, target: Path, entries: dict[str, Any], iteration: int, keep: int) -> None:
    for inner in (folder, *(p for p in folder.rglob("*") if p.is_dir())):
        usual_permissions(inner)
        sync_folder(inner)
    write_manifest(folder, entries, kind="checkpoint", iteration=iteration)
    publish(folder, target)
    with atomic_file(target.parent / "last_checkpoint") as f:
        f.write(target.name + "\n")
    for _, old in _found(target.parent)[:-keep] if keep > 0 else ():
        remove_tree(old)


def _room(work_dir: Path, needed: int) -> None:
    """Raise CheckpointError if the disk has no room for `needed` bytes and a little more."""
    free = shutil.disk_usage(work_dir).free
    if free < needed * 1.01 + 2**20:
        raise CheckpointError(
            f"a checkpoint needs {human_bytes(needed)} ({needed:,} bytes), the disk has {human_bytes(free)} ({free:,})",
            where=str(work_dir),
            why="nothing was written; the older checkpoints are untouched",
            do="free some space, keep fewer checkpoints (save_total_limit), or save_optimizer = False",
        )


def _found(work_dir: Path) -> list[tuple[int, Path]]:
    """Published checkpoints by iteration, oldest first."""
    found = [(re.fullmatch(r"iter_(\d+)\.pth", p.name), p) for p in work_dir.glob("iter_*.pth")]
    return sorted((int(m[1]), p) for m, p in found if m and (p / MANIFEST).is_file() and not _is_export(p))


def _is_export(folder: Path) -> bool:
    try:
        return bool(read_json(folder / MANIFEST).get("kind") == "export")
    except (CheckpointError, AttributeError):
        return False  # damaged, which whoever reads it will say


def set_aside(work_dir: Path, resumed: Path | None) -> None:
    """Move checkpoints that do not lead to this run out of its way, into `work_dir/before_TIME/`.

    That is all of them for a fresh start or a start from elsewhere, else those newer than the one resumed from.
    Otherwise pruning and a later `--resume` would take them for this run's.
    """
    ours = resumed is not None and resumed.resolve().parent == work_dir.resolve()
    last = int(resumed.stem.removeprefix("iter_")) if ours and resumed else -1
    others = [folder for iteration, folder in _found(work_dir) if iteration > last]
    if not others:
        return
    aside = work_dir / time.strftime("before_%Y%m%d_%H%M%S")
    aside.mkdir(exist_ok=True)
    for folder in others:
        folder.rename(aside / folder.name)
    logger.warning(f"{len(others)} checkpoints of another run were here; they are now in {aside}")


def latest(work_dir: Path, ranks: Ranks, strict: bool = False) -> Path | None:
    """The newest checkpoint whose every file is as it was written; each rank reads its share of the files.

    A damaged one is named and set aside as `iter_N.pth.damaged`, so that nothing takes it for whole and a person can
    look at it; the one before is used. With `strict` it is an error instead.
    """
    for name in ranks.from_main([p.name for _, p in reversed(_found(work_dir))] if ranks.is_main else None):
        folder = work_dir / name
        try:
            check(folder, ranks)
            return folder
        except CheckpointError as e:
            if strict:
                raise
            damage = e.what
        ranks.on_main(partial(_set_aside_damaged, folder))
        logger.warning(f"{name} is damaged, the one before it is used; it is kept as {name}.damaged: {damage}")
    return None


def check(folder: Path, ranks: Ranks) -> None:
    """Raise CheckpointError on all ranks if a file is not as the manifest says."""
    begin = time.perf_counter()
    manifest = ranks.together(lambda: verify(folder, ranks.rank, ranks.size))
    size, took = sum(entry["bytes"] for entry in manifest["files"].values()), time.perf_counter() - begin
    logger.info(f"{folder} is whole: {human_bytes(size)} read in {took:.1f} s ({human_bytes(size / took)}/s)")


def _set_aside_damaged(folder: Path) -> None:
    aside = folder.with_name(f"{folder.name}.damaged")
    remove_tree(aside)
    folder.rename(aside)


def to_resume(work_dir: Path, resume: str | bool | None, ranks: Ranks, strict: bool = False) -> Path | None:
    """What `--resume` means: None for a fresh start, or a checkpoint that verifies. All ranks call it together.

    "auto" and True take the newest in `work_dir`, or None if there is none: safe in scripts that start and restart.
    """
    if not resume:
        return None
    if resume is True or resume == "auto":
        return latest(work_dir, ranks, strict)
    folder = Path(resume).expanduser()
    if ranks.on_main(lambda: folder.is_dir() and bool(_found(folder))):
        found = latest(folder, ranks, strict)
        if found:
            return found
    ranks.on_main(lambda: _there(folder, resume))
    check(folder, ranks)
    return folder


def _there(folder: Path, resume: str) -> None:
    if not (folder / TRAINER).is_file():
        raise ConfigError(
            f"--resume {resume}: " + ("no checkpoint there" if folder.exists() else "there is no such folder"),
            where=str(folder),
            why="starting afresh instead would throw the run away unnoticed",
            do="give an iter_N.pth folder, or `--resume auto` for the newest one of the work dir",
        )


def read_trainer(folder: Path) -> tuple[TrainState, dict[str, Any]]:
    """(state, facts) of a checkpoint."""
    facts = read_json(folder / TRAINER)
    try:
        return TrainState.from_json(facts.pop("state")), facts
    except (AttributeError, KeyError, TypeError) as e:
        raise CheckpointError(f"{TRAINER} is not of this version: {e!r}", where=str(folder / TRAINER)) from None
