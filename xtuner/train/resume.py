"""How a run begins: from a checkpoint of its own, from weights of another model, or from nothing."""

import time
from pathlib import Path
from typing import Any

from xtuner.core import dist
from xtuner.core.errors import ConfigError, DataError
from xtuner.core.log import logger
from xtuner.core.secrets import mask
from xtuner.train import checkpoint
from xtuner.train.changes import changes
from xtuner.train.run import Run
from xtuner.train.state import TrainState

Found = tuple[Path, TrainState, dict[str, Any]]  # a checkpoint, its state, what it depends on


def find(run: Run, resume: str | bool | None, strict: bool, allow_change: bool) -> Found | None:
    """The checkpoint to go on from, or None for a fresh start. All ranks call it together.

    Makes sure that it is this run's, fits the run to it if the number of ranks is another, and moves checkpoints of
    other runs out of the way.
    """
    ranks = dist.ALL
    folder = checkpoint.to_resume(run.work_dir, resume, ranks, strict)
    ranks.on_main(lambda: checkpoint.set_aside(run.work_dir, folder))
    if folder is None:
        if resume:
            logger.info("no checkpoint in the work dir: starting afresh")
        return None
    state, facts = checkpoint.read_trainer(folder)
    _fit(run, folder, facts)
    _same_run(run, folder, facts, allow_change)
    return folder, state, facts


def take(run: Run, found: Found | None) -> None:
    """Bring the run's strategy and state to where it begins."""
    if found is None:
        if run.config.get("load_from"):
            _start_from(run, Path(run.config.values["load_from"]).expanduser())
        return
    folder, state, _ = found
    begin = time.perf_counter()
    run.strategy.load(folder)
    run.state, run.saved = state, (state.iteration, True)
    took = time.perf_counter() - begin
    logger.info(f"resumed from {folder} at iteration {state.iteration}, {state.position}; loaded in {took:.1f} s")


def _start_from(run: Run, folder: Path) -> None:
    weights = folder
    if (folder / checkpoint.TRAINER).is_file():
        checkpoint.check(folder, dist.ALL)
        weights = folder / "weights"
    run.strategy.load_weights(weights)
    logger.info(f"weights taken from {weights} (load_from); optimizer and data position are new")


def _fit(run: Run, folder: Path, facts: dict[str, Any]) -> None:
    """On another number of ranks each takes more or fewer packs, so that an iteration stays what it was."""
    before, now, packs = facts["ranks"], run.loader.dp_size, facts["packs_per_iteration"]
    if before == now:
        return
    if packs % now:
        sizes = ", ".join(str(n) for n in range(1, packs + 1) if packs % n == 0)
        raise ConfigError(
            f"{packs} packs an iteration cannot be divided over {now} ranks",
            where=str(folder / checkpoint.TRAINER),
            why=f"the run was begun with so many (on {before} ranks at the last save), and its schedule counts on them",
            do=f"resume on one of these numbers of ranks: {sizes}",
        )
    run.optim.accumulative_counts = packs // now
    run.begun_on = facts["begun_on"]
    run.plan()
    logger.info(f"{now} ranks instead of {before}: each takes {packs // now} packs an iteration ({packs} together)")


def _same_run(run: Run, folder: Path, facts: dict[str, Any], allow_change: bool) -> None:
    """Tell what has changed since the checkpoint; refuse what would make another run of it."""
    where = str(folder / checkpoint.TRAINER)
    now = run.facts()
    for key, before in facts["data"].items():
        if now["data"][key] != before and not allow_change:
            raise DataError(
                f"the data is not what the checkpoint was trained on: {key} was {before!r}, is {now['data'][key]!r}",
                where=where,
                why="the run would see some documents twice and others never",
                do="restore the data and its settings, go on with --allow-change, or start anew with load_from",
            )
    for key in ("packs_per_iteration", "max_iterations"):
        if now[key] != facts[key] and not allow_change:
            raise ConfigError(
                f"{key} was {facts[key]} and is now {now[key]}",
                where=where,
                why="the schedule and the gradient noise would be another run's",
                do="set accumulative_counts and max_epochs as they were, or go on with --allow-change",
            )
    found = changes(mask(facts["config"]), now["config"])  # older checkpoints hold a config that is not masked
    by_kind = {kind: [c for c in found if c.kind == kind] for kind in ("impossible", "changes the result", "harmless")}
    if by_kind["impossible"]:
        told = "; ".join(map(str, by_kind["impossible"]))
        why = "its weights or its optimizer state would not fit"
        raise ConfigError(f"the checkpoint is another model's or optimizer's: {told}", where=where, why=why)
    for change in by_kind["harmless"]:
        logger.info(f"changed since the checkpoint, harmless: {change}")
    if by_kind["changes the result"] and not allow_change:
        raise ConfigError(
            "changed since the checkpoint: " + "; ".join(map(str, by_kind["changes the result"])),
            where=where,
            why="the run would end differently from the one that was begun",
            do="take the changes back, or go on with --allow-change",
        )
    for change in by_kind["changes the result"]:
        logger.warning(f"changed since the checkpoint, allowed: {change}")
