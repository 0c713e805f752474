"""How a run begins: from a checkpoint of its own, from weights of another model, or from nothing."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xtuner.core.errors import CheckpointError, ConfigError, DataError
from xtuner.core.log import logger
from xtuner.core.secrets import mask
from xtuner.engine.state.slices import SavedStates
from xtuner.model.weights import base_weights
from xtuner.train import checkpoint, history
from xtuner.train.changes import Change, changed_files, changes
from xtuner.train.history import Chosen
from xtuner.train.run import Run
from xtuner.train.state import TrainState

# Where a config says what the packs are and in which order they come
SOURCE = "train_dataloader.dataset.dataset_cfg."
DATA = ("train_dataloader.dataset", "train_dataloader.sampler", "default_hooks.sampler_seed")


@dataclass(frozen=True)
class Found:
    """A checkpoint to resume from, its state, and what it depends on."""

    chosen: Chosen
    state: TrainState
    facts: dict[str, Any]

    @property
    def folder(self) -> Path:
        return self.chosen.folder


def find(run: Run, resume: str | bool | None, strict: bool, allow_change: bool, contents: bool = True) -> Found | None:
    """The checkpoint to resume from, or None for a fresh start. All ranks call it together.

    Makes sure that it is this run's, and fits the run to it if the number of ranks is another. Changes nothing on the
    disk: what a dry run does, too. Raises: XTunerError for whatever speaks against the resume.
    """
    chosen = history.to_resume(run.work_dir, resume, run.mesh.ranks, strict, contents)
    if chosen is None:
        if resume:
            logger.info("no checkpoint in the work dir: starting afresh")
        return None
    where = chosen.folder / checkpoint.TRAINER
    try:
        state, facts = checkpoint.read_trainer(chosen.folder)
        _check_facts(facts, where)
        _fit(run, str(where), facts)
        _same_run(run, str(where), facts, allow_change)
        _count_windows(run, state, facts)
    except RecursionError:
        raise CheckpointError(f"{where.name} is nested too deeply", where=str(where)) from None
    run.mesh.ranks.on_main(lambda: SavedStates(chosen.folder) and None)
    return Found(chosen, state, facts)


def take(run: Run, found: Found | None) -> None:
    """Bring the run's strategy and state to where it begins, and move what does not lead there out of the way."""
    begin = time.perf_counter()
    if found is None:
        if run.config.get("load_from"):
            _start_from(run, Path(run.config.values["load_from"]).expanduser())
    else:
        run.strategy.load(found.folder)
        run.state, run.saved = found.state, (found.state.iteration, True)
        took = time.perf_counter() - begin
        at = f"iteration {found.state.iteration}, {found.state.position}"
        logger.info(f"resumed from {found.folder} at {at}; loaded in {took:.1f} s")
    run.mesh.ranks.on_main(lambda: history.make_way(run.work_dir, found.chosen if found else None))


def _start_from(run: Run, folder: Path) -> None:
    weights = folder
    if (folder / checkpoint.TRAINER).is_file():
        checkpoint.check(folder, run.mesh.ranks)
        weights = base_weights(folder)
    run.strategy.load_weights(weights)
    logger.info(f"weights taken from {weights} (load_from); optimizer and data position are new")


def _check_facts(facts: dict[str, Any], where: Path) -> None:
    counts = ("packs_per_iteration", "max_iterations", "ranks", "begun_on")
    wrong = next((k for k in counts if type(facts.get(k)) is not int or facts[k] < 1), None)
    later = ("balance", "windows_from")  # absent from older checkpoints
    wrong = wrong or next((k for k in later if type(facts.get(k, 0)) is not int or facts.get(k, 0) < 0), None)
    wrong = wrong or next((k for k in ("data", "config") if not isinstance(facts.get(k), dict)), None)
    if wrong:
        raise CheckpointError(f"{where.name} is not of this version: {wrong} is missing or wrong", where=str(where))


def _counts(config: dict[str, Any]) -> Any:
    wrapper = config.get("optim_wrapper")
    return wrapper.get("accumulative_counts", 1) if isinstance(wrapper, dict) else None


def _fit(run: Run, where: str, facts: dict[str, Any]) -> None:
    """On another number of ranks each takes more or fewer packs, so that an iteration stays what it was.

    accumulative_counts may say what it said when the run was begun or last saved, or what fits these ranks; anything
    else is a change, which `_same_run` judges.
    """
    packs, ranks, begun_on = facts["packs_per_iteration"], run.loader.dp_size, facts["begun_on"]
    run.loader.begun_on = begun_on
    counts = run.optim.accumulative_counts
    if counts * ranks != packs and (counts == _counts(facts["config"]) or counts * begun_on == packs):
        if packs % ranks:
            sizes = ", ".join(str(n) for n in range(1, packs + 1) if packs % n == 0)
            raise ConfigError(
                f"{packs} packs an iteration cannot be divided over {ranks} ranks",
                where=where,
                why=f"the run was begun with so many (on {begun_on} ranks), and its schedule counts on them",
                do=f"resume on one of these numbers of ranks: {sizes}",
            )
        run.optim.accumulative_counts = packs // ranks
        logger.info(
            f"each rank takes {packs // ranks} packs an iteration (accumulative_counts = {counts} says how many when "
            f"the run was begun, on {begun_on} ranks), {packs} together as before"
        )
    run.plan()


def _count_windows(run: Run, state: TrainState, facts: dict[str, Any]) -> None:
    """Windows of iterations whose packs are dealt together continue; of another size, they begin anew here."""
    loader = run.loader
    if not loader.packs_per_epoch:  # changed data have fewer packs than the run was begun on ranks
        return
    here = loader.packs_before(state.position)
    before = max(facts.get("balance", 0), 1), facts["packs_per_iteration"], facts["data"].get("num_packs")
    same = before == (max(loader.balance, 1), run.packs_per_iteration, loader.num_packs)
    loader.windows_from = min(facts.get("windows_from", 0), here) if same else here


def _same_run(run: Run, where: str, facts: dict[str, Any], allow_change: bool) -> None:
    """Report what has changed since the checkpoint; refuse what would make another run of it."""
    now = run.facts()
    found = changes(mask(facts["config"]), now["config"])  # older checkpoints hold a config that is not masked
    if facts["data"] == now["data"]:  # wherever a source finds them
        found = [replace(c, kind="harmless") if c.key.startswith(SOURCE) else c for c in found]
    if not allow_change:
        _same_data(facts, now, found, where)
        _same_length(facts, now, found, where)
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
            do="take the changes back, or give --allow-change",
        )
    for change in by_kind["changes the result"]:
        logger.warning(f"changed since the checkpoint, allowed: {change}")


def _same_data(facts: dict[str, Any], now: dict[str, Any], found: list[Change], where: str) -> None:
    """Raises: DataError, which names the settings or the files that have changed."""
    before, here = facts["data"], now["data"]
    if all(here.get(key) == value for key, value in before.items()):
        return
    told = [str(c) for c in found if c.key.startswith(DATA) and c.kind == "changes the result"]
    seen = ("data", "num_packs") if not told else tuple(before)  # what needs, or has, other words
    files = changed_files(facts.get("files"), now["files"])
    if files and not any("min_length" in change for change in told):
        told.append(files)
    told += [f"{k}: {v!r} → {here.get(k)!r}" for k, v in before.items() if here.get(k) != v and k not in seen]
    if not told:  # the checkpoint does not list its files
        packs = f"{before.get('num_packs')} packs then, {here['num_packs']} now"
        told = [f"the documents of its files, or the order of files, are others ({packs})"]
    raise DataError(
        "the data is not what the checkpoint was trained on: " + "; ".join(told),
        where=where,
        why="the run would see some documents twice and others never",
        do="restore the data and its settings, give --allow-change, or begin a new run with load_from",
    )


def _same_length(facts: dict[str, Any], now: dict[str, Any], found: list[Change], where: str) -> None:
    for key, what, setting in (
        ("packs_per_iteration", "an iteration took {} packs and would take {}", "accumulative_counts"),
        ("max_iterations", "the run was to have {} iterations and would have {}", "max_epochs"),
    ):
        if facts[key] != now[key]:
            told = "; ".join(str(c) for c in found if c.key.endswith(f".{setting}"))
            raise ConfigError(
                what.format(facts[key], now[key]) + (f": {told}" if told else ""),
                where=where,
                why="the schedule and the gradient noise would be another run's",
                do=f"set {setting} as it was, or give --allow-change",
            )
