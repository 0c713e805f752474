"""How a run begins: from a checkpoint of its own, from weights of another model, or from nothing."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xtuner.compat.translate import apply_hook_settings
from xtuner.config.config import Config
from xtuner.core.errors import CheckpointError, ConfigError, DataError
from xtuner.core.log import logger
from xtuner.core.secrets import mask
from xtuner.dist.collectives import Ranks
from xtuner.engine.base import Strategy
from xtuner.model.weights import base_weights
from xtuner.train.checkpoints import checkpoint, history
from xtuner.train.checkpoints.history import ResumeChoice
from xtuner.train.reporting.config_changes import Change, compare_configs, describe_changed_files
from xtuner.train.run import Lengths, Progress
from xtuner.train.state import TrainState

# Where a config says what the packs are and in which order they come
SOURCE = "train_dataloader.dataset.dataset_cfg."
DATA = ("train_dataloader.dataset", "train_dataloader.sampler", "train_dataloader.reshuffle")


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to resume from, its state, and what it depends on."""

    chosen: ResumeChoice
    state: TrainState
    facts: dict[str, Any]

    @property
    def folder(self) -> Path:
        return self.chosen.folder

    @property
    def where(self) -> str:
        """For messages."""
        return str(self.folder / checkpoint.TRAINER)


def find_resume_point(
    work_dir: Path, resume: str | bool | None, ranks: Ranks, strict: bool = False, contents: bool = True
) -> ResumePoint | None:
    """The checkpoint to resume from, or None for a fresh start. All ranks call it together.

    Changes nothing on the disk: what a dry run does, too. Raises: XTunerError for one that cannot be read.
    """
    chosen = history.select_checkpoint(work_dir, resume, ranks, strict, contents)
    if chosen is None:
        if resume:
            logger.info("no checkpoint in the work dir: starting afresh")
        return None
    where = chosen.folder / checkpoint.TRAINER
    try:
        state, facts = checkpoint.read_trainer(chosen.folder)
        _check_facts(facts, where)
    except RecursionError:
        raise _too_deep(where) from None
    return ResumePoint(chosen, state, facts)


def _too_deep(where: Path) -> CheckpointError:
    return CheckpointError(f"{where.name} is nested too deeply", where=str(where))


def load_run_state(strategy: Strategy, config: Config, found: ResumePoint | None, ranks: Ranks) -> Progress:
    """Bring a strategy to where the run begins. Returns what the run has done by then."""
    begin = time.perf_counter()
    if found is None:
        if config.setting("load_from"):
            _load_initial_weights(strategy, Path(config.setting("load_from")).expanduser(), ranks)
        return Progress()
    strategy.load(found.folder)
    took = time.perf_counter() - begin
    at = f"iteration {found.state.iteration}, {found.state.position}"
    logger.info(f"resumed from {found.folder} at {at}; loaded in {took:.1f} s")
    return Progress(found.state, (found.state.iteration, True))


def _load_initial_weights(strategy: Strategy, folder: Path, ranks: Ranks) -> None:
    weights = folder
    if (folder / checkpoint.TRAINER).is_file():
        checkpoint.verify(folder, ranks)
        weights = base_weights(folder)
    strategy.load_weights(weights)
    logger.info(f"weights taken from {weights} (load_from); optimizer and data position are new")


def _check_facts(facts: dict[str, Any], where: Path) -> None:
    counts = ("packs_per_iteration", "max_iterations", "ranks", "begun_on")
    wrong = next((k for k in counts if type(facts.get(k)) is not int or facts[k] < 1), None)
    later = ("balance", "windows_from")  # absent from older checkpoints
    wrong = wrong or next((k for k in later if type(facts.get(k, 0)) is not int or facts.get(k, 0) < 0), None)
    wrong = wrong or next((k for k in ("data", "config") if not isinstance(facts.get(k), dict)), None)
    if wrong:
        raise CheckpointError(f"{where.name} is not of this version: {wrong} is missing or wrong", where=str(where))


def _written_counts(config: dict[str, Any]) -> Any:
    wrapper = config.get("optim_wrapper")
    return wrapper.get("accumulative_counts", 1) if isinstance(wrapper, dict) else None


def fit_accumulative_counts(found: ResumePoint, counts: int, ranks: int) -> int:
    """Packs that each of `ranks` takes in an iteration, so that it stays what it was on another number of ranks.

    accumulative_counts may say what it said when the run was begun or last saved, or what fits these ranks; anything
    else is a change, which `require_same_run` judges.
    """
    facts = found.facts
    packs, begun_on = facts["packs_per_iteration"], facts["begun_on"]
    if counts * ranks == packs or not (counts == _written_counts(facts["config"]) or counts * begun_on == packs):
        return counts
    if packs % ranks:
        sizes = ", ".join(str(n) for n in range(1, packs + 1) if packs % n == 0)
        raise ConfigError(
            f"{packs} packs an iteration cannot be divided over {ranks} ranks",
            where=found.where,
            why=f"the run was begun with so many (on {begun_on} ranks), and its schedule counts on them",
            do=f"resume on one of these numbers of ranks: {sizes}",
        )
    logger.info(
        f"each rank takes {packs // ranks} packs an iteration (accumulative_counts = {counts} says how many when "
        f"the run was begun, on {begun_on} ranks), {packs} together as before"
    )
    return int(packs // ranks)


def find_window_start(found: ResumePoint, balance: int, lengths: Lengths) -> int:
    """Windows of iterations whose packs are dealt together continue; of another size, they begin anew here."""
    facts = found.facts
    if not lengths.packs_per_epoch:  # changed data have fewer packs than the run was begun on ranks
        return 0
    here = found.state.position.packs_before(lengths.packs_per_epoch)
    before = max(facts.get("balance", 0), 1), facts["packs_per_iteration"], facts["data"].get("num_packs")
    same = before == (max(balance, 1), lengths.packs_per_iteration, lengths.num_packs)
    return min(facts.get("windows_from", 0), here) if same else here


def require_same_run(found: ResumePoint, now: dict[str, Any], allow_change: bool) -> None:
    """Report what has changed since the checkpoint; refuse what would make another run of it.

    Args:
        now: facts of the run that would resume, as those that are found.
    """
    try:
        _require_same_run(found.facts, now, found.where, allow_change)
    except RecursionError:
        raise _too_deep(Path(found.where)) from None


def _require_same_run(facts: dict[str, Any], now: dict[str, Any], where: str, allow_change: bool) -> None:
    before = mask(facts["config"])  # older checkpoints hold a config that is not masked
    if "version" not in facts:
        apply_hook_settings(before, absent=True)
    changed = compare_configs(before, now["config"])
    if facts["data"] == now["data"]:  # wherever a source finds them
        changed = [replace(c, kind="harmless") if c.key.startswith(SOURCE) else c for c in changed]
    if not allow_change:
        _require_same_data(facts, now, changed, where)
        _require_same_length(facts, now, changed, where)
    kinds = ("impossible", "changes the result", "harmless")
    by_kind = {kind: [c for c in changed if c.kind == kind] for kind in kinds}
    if by_kind["impossible"]:
        details = "; ".join(map(str, by_kind["impossible"]))
        why = "its weights or its optimizer state would not fit"
        raise ConfigError(f"the checkpoint is another model's or optimizer's: {details}", where=where, why=why)
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


def _require_same_data(facts: dict[str, Any], now: dict[str, Any], found: list[Change], where: str) -> None:
    """Raises: DataError, which names the settings or the files that have changed."""
    before, here = facts["data"], now["data"]
    if all(here.get(key) == value for key, value in before.items()):
        return
    details = [str(c) for c in found if c.key.startswith(DATA) and c.kind == "changes the result"]
    seen = ("data", "num_packs") if not details else tuple(before)  # what needs, or has, other words
    files = describe_changed_files(facts.get("files"), now["files"])
    if files and not any("min_length" in change for change in details):
        details.append(files)
    details += [f"{k}: {v!r} → {here.get(k)!r}" for k, v in before.items() if here.get(k) != v and k not in seen]
    if not details:  # the checkpoint does not list its files
        packs = f"{before.get('num_packs')} packs then, {here['num_packs']} now"
        details = [f"the documents of its files, or the order of files, are others ({packs})"]
    raise DataError(
        "the data is not what the checkpoint was trained on: " + "; ".join(details),
        where=where,
        why="the run would see some documents twice and others never",
        do="restore the data and its settings, give --allow-change, or begin a new run with load_from",
    )


def _require_same_length(facts: dict[str, Any], now: dict[str, Any], found: list[Change], where: str) -> None:
    for key, what, setting in (
        ("packs_per_iteration", "an iteration took {} packs and would take {}", "accumulative_counts"),
        ("max_iterations", "the run was to have {} iterations and would have {}", "max_epochs"),
    ):
        if facts[key] != now[key]:
            details = "; ".join(str(c) for c in found if c.key.endswith(f".{setting}"))
            raise ConfigError(
                what.format(facts[key], now[key]) + (f": {details}" if details else ""),
                where=where,
                why="the schedule and the gradient noise would be another run's",
                do=f"set {setting} as it was, or give --allow-change",
            )
