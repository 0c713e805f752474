"""`work_dir/iter_N.pth/`: a directory that is either whole or not there.

    weights/          config.json, model.safetensors: fp32 masters, itself a Hugging Face folder (internlm2 layout)
    optimizer/        rank_00000.safetensors (absent with save_optimizer=False)
    trainer.json      position in the data, counters, what the run depends on
    manifest.json     size and sha256 of every file; written last

`work_dir/last_checkpoint` is a hint for people and scripts; the manifests are the truth.
"""

import re
from pathlib import Path
from typing import Any

from xtuner.core.errors import CheckpointError, ConfigError
from xtuner.core.files import MANIFEST, atomic_file, atomic_folder, read_json, remove_tree, verify, write_json
from xtuner.core.log import logger
from xtuner.engine.base import Strategy
from xtuner.train.state import TrainState

TRAINER = "trainer.json"


def save(
    work_dir: Path, state: TrainState, strategy: Strategy, facts: dict[str, Any], optimizer: bool = True, keep: int = -1
) -> Path:
    """Write the checkpoint of `state`, then remove all but the newest `keep` (all are kept if not positive).

    Raises: CheckpointError when the disk does not take it; older checkpoints stay.
    """
    target = work_dir / f"iter_{state.iteration}.pth"
    try:
        with atomic_folder(target, iteration=state.iteration) as folder:
            strategy.save(folder, optimizer)
            write_json(folder / TRAINER, {"state": state.to_json(), **facts})
        with atomic_file(work_dir / "last_checkpoint") as f:
            f.write(target.name + "\n")
    except OSError as e:
        raise CheckpointError(f"the checkpoint cannot be written: {e.strerror}", where=str(target)) from e
    if keep > 0:
        for _, old in _found(work_dir)[:-keep]:
            remove_tree(old)
    return target


def _found(work_dir: Path) -> list[tuple[int, Path]]:
    """Published checkpoints by iteration, oldest first."""
    found = [(re.fullmatch(r"iter_(\d+)\.pth", p.name), p) for p in work_dir.glob("iter_*.pth")]
    return sorted((int(m[1]), p) for m, p in found if m and (p / MANIFEST).is_file())


def latest(work_dir: Path) -> Path | None:
    """The newest checkpoint whose every file is as it was written. Damaged ones are named and passed over."""
    for _, folder in reversed(_found(work_dir)):
        try:
            verify(folder)
            return folder
        except CheckpointError as e:
            logger.warning(f"{folder.name} is damaged, the one before it is used: {e.what}")
    return None


def to_resume(work_dir: Path, resume: str | bool | None) -> Path | None:
    """What `--resume` means: None for a fresh start, or a checkpoint that verifies.

    "auto" and True take the newest in `work_dir`, or None if there is none: safe in scripts that start and restart.
    """
    if not resume:
        return None
    if resume is True or resume == "auto":
        return latest(work_dir)
    folder = Path(resume)
    if folder.is_dir() and _found(folder):
        found = latest(folder)
        if found:
            return found
    if not (folder / TRAINER).is_file():
        raise ConfigError(
            f"--resume {resume}: " + ("no checkpoint there" if folder.exists() else "there is no such folder"),
            where=str(folder),
            why="starting afresh instead would throw the run away unnoticed",
            do="give an iter_N.pth folder, or `--resume auto` for the newest one of the work dir",
        )
    verify(folder)
    return folder


def read_trainer(folder: Path) -> tuple[TrainState, dict[str, Any]]:
    """(state, facts) of a checkpoint."""
    facts = read_json(folder / TRAINER)
    return TrainState.from_json(facts.pop("state")), facts
