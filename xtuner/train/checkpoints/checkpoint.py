"""`work_dir/iter_N.pth/`: a directory that is either complete or absent.

    weights/          config.json, model.safetensors: the fp32 masters, as a Hugging Face folder (internlm2 layout)
    adapter/          in place of weights/ under LoRA: what is trained, and which model it belongs to
    optimizer/        rank_00000.safetensors (absent with save_optimizer=False)
    trainer.json      position in the data, counters, the facts that a resume compares
    manifest.json     size and sha256 of every file; written last

`work_dir/last_checkpoint` is a hint for people and scripts; the manifests are authoritative.
"""

import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xtuner.core import files
from xtuner.core.errors import CheckpointError
from xtuner.core.log import human_bytes, logger
from xtuner.dist.collectives import Ranks, attempt
from xtuner.engine.state.snapshot import Snapshot
from xtuner.train.state import TrainState

TRAINER = "trainer.json"
LAST = "last_checkpoint"


def write(
    work_dir: Path, state: TrainState, snapshot: Snapshot, facts: dict[str, Any], ranks: Ranks, keep: int = -1
) -> tuple[Path, int]:
    """Write the checkpoint of `state` together with all ranks, then remove all but the newest `keep` (if positive).

    Rank 0 creates a temporary directory; every rank writes, syncs and hashes its own files there; then rank 0 writes
    the manifest and renames the directory. A failure on any rank is raised on all; older checkpoints stay.

    Returns the checkpoint and the size of its tensors in bytes. Raises: CheckpointError.
    """
    target = work_dir / f"iter_{state.iteration}.pth"
    needed = int(ranks.sum(snapshot.nbytes))
    if ranks.is_main:
        snapshot.json[TRAINER] = {"state": state.to_json(), **facts}
    folder = _run_on_all_ranks(ranks, target, lambda: _make_temporary_folder(target, needed) if ranks.is_main else "")[
        0
    ]
    try:
        reports = _run_on_all_ranks(ranks, target, lambda: snapshot.write(Path(folder)))
        entries = {name: entry for report in reports for name, entry in report.items()}
        if ranks.is_main:
            _run_on_all_ranks(ranks, target, lambda: _publish(Path(folder), target, entries, state.iteration, keep))
        else:
            _run_on_all_ranks(ranks, target, lambda: None)
    except CheckpointError:
        if ranks.is_main:
            files.remove_tree(Path(folder))
        raise
    return target, needed


def _make_temporary_folder(target: Path, needed: int) -> str:
    """Create the temporary folder. Raises: CheckpointError if the disk has no room for `needed` bytes plus a margin."""
    free = shutil.disk_usage(target.parent).free
    if free < needed * 1.01 + 2**20:
        raise CheckpointError(
            f"a checkpoint needs {human_bytes(needed)} ({needed:,} bytes), the disk has {human_bytes(free)} ({free:,})",
            where=str(target.parent),
            why="nothing was written; the older checkpoints are untouched",
            do="free some space, keep fewer checkpoints (save_total_limit), or save_optimizer = False",
        )
    return str(files.temporary_folder(target))


def _run_on_all_ranks(ranks: Ranks, target: Path, action: Callable[[], Any]) -> list[Any]:
    """Run `action` on every rank. Returns the JSON results by rank; if it fails on any rank, raises on all."""
    try:
        outcome, failure = attempt(action)
    except Exception as e:  # also a bug: the other ranks must not wait for this one
        outcome, failure = None, {"what": f"{type(e).__name__}: {e}"}
    outcomes = ranks.gather({"value": outcome[0]} if outcome else {"failure": failure})
    failures = {rank: o["failure"] for rank, o in enumerate(outcomes) if "failure" in o}
    if failures:
        details = "; ".join(f"rank {rank}: {failure['what']}" for rank, failure in failures.items())
        first = next(iter(failures.values()))
        raise CheckpointError(
            f"the checkpoint cannot be written: {details}",
            where=first.get("where") or str(target),
            why="the older checkpoints are untouched",
            do=first.get("do") or "check the disk: space, quota, permissions",
        )
    return [o["value"] for o in outcomes]


def _publish(folder: Path, target: Path, entries: dict[str, Any], iteration: int, keep: int) -> None:
    for inner in (folder, *(p for p in folder.rglob("*") if p.is_dir())):
        files.set_default_permissions(inner)
        files.sync_folder(inner)
    files.write_manifest(folder, entries, kind="checkpoint", iteration=iteration)
    files.publish(folder, target)
    with files.atomic_file(target.parent / LAST) as f:
        f.write(target.name + "\n")
    for _, old in list_published(target.parent)[:-keep] if keep > 0 else ():
        files.discard(old)


def list_named(work_dir: Path) -> list[tuple[int, Path]]:
    """Everything named `iter_N.pth` except exports, complete or not: (N, path), smallest N first."""
    numbered = [(re.fullmatch(r"iter_(\d{1,15})\.pth", p.name), p) for p in work_dir.glob("iter_*.pth")]
    return sorted((int(m[1]), p) for m, p in numbered if m and not _is_export(p))


def list_published(work_dir: Path) -> list[tuple[int, Path]]:
    """Checkpoints that have a manifest: (iteration, path), oldest first."""
    return [(n, p) for n, p in list_named(work_dir) if (p / files.MANIFEST).is_file()]


def _is_export(folder: Path) -> bool:
    try:
        return bool(files.read_manifest(folder).get("kind") == "export")
    except CheckpointError:
        return False  # no manifest, or a damaged one, which its reader reports


def verify(folder: Path, ranks: Ranks, contents: bool = True) -> None:
    """Raise CheckpointError on all ranks if a file differs from the manifest, or the manifest is another checkpoint's.

    Args:
        contents: compare sha256 sums; else only sizes, which is instant.
    """
    begin = time.perf_counter()
    manifest = ranks.run_on_all(lambda: _verify_share(folder, ranks, contents))
    if not contents:
        logger.info(f"{folder}: all files are there with the right sizes; contents are checked when a run starts")
        return
    size, took = sum(entry["bytes"] for entry in manifest["files"].values()), time.perf_counter() - begin
    logger.info(f"{folder} is complete: {human_bytes(size)} read in {took:.1f} s ({human_bytes(size / took)}/s)")


def _verify_share(folder: Path, ranks: Ranks, contents: bool) -> dict[str, Any]:
    manifest = files.verify(folder, ranks.rank, ranks.size, contents)
    saved = read_trainer(folder)[0].iteration
    if (manifest.get("kind"), manifest.get("iteration")) != ("checkpoint", saved):
        raise CheckpointError(
            f"the manifest was altered: it is for {manifest.get('kind')!r} {manifest.get('iteration')!r}, "
            f"{TRAINER} for iteration {saved}",
            where=str(folder / files.MANIFEST),
        )
    return manifest


def read_trainer(folder: Path) -> tuple[TrainState, dict[str, Any]]:
    """(state, facts) of a checkpoint. Raises: CheckpointError."""
    facts = files.read_json(folder / TRAINER)
    try:
        return TrainState.from_json(facts.pop("state")), facts
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise CheckpointError(
            f"{TRAINER} does not have the format of this version: {e!r}", where=str(folder / TRAINER)
        ) from None
