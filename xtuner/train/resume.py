"""How a run starts: from its own checkpoint, from the weights of another model, or from scratch."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xtuner.compat.translate import apply_hook_settings
from xtuner.config.config import Config
from xtuner.core.errors import CheckpointError, ConfigError, DataError
from xtuner.core.hub import resolve_folder
from xtuner.core.log import logger
from xtuner.core.secrets import mask
from xtuner.dist.collectives import Ranks
from xtuner.engine.base import Strategy
from xtuner.model.adapters.base_identity import read_base, require_same_base
from xtuner.model.adapters.folder import ADAPTER
from xtuner.model.weights import find_base_weights
from xtuner.train.checkpoints import checkpoint, history
from xtuner.train.checkpoints.history import ResumeChoice
from xtuner.train.reporting.config_changes import Change, compare_configs, describe_changed_files
from xtuner.train.run import Lengths, Progress
from xtuner.train.state import TrainState

# Config keys that determine the packs and their order
SOURCE = "train_dataloader.dataset.dataset_cfg."
DATA = ("train_dataloader.dataset", "train_dataloader.sampler", "train_dataloader.reshuffle")


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to resume from, its state, and the facts that the resumed run must match."""

    chosen: ResumeChoice
    state: TrainState
    facts: dict[str, Any]

    @property
    def folder(self) -> Path:
        return self.chosen.folder

    @property
    def where(self) -> str:
        """The file that messages name."""
        return str(self.folder / checkpoint.TRAINER)


def find_resume_point(
    work_dir: Path, resume: str | bool | None, ranks: Ranks, strict: bool = False, contents: bool = True
) -> ResumePoint | None:
    """The checkpoint to resume from, or None for a fresh start. All ranks call it together.

    Changes nothing on the disk, so that a dry run can call it. Raises: XTunerError for one that cannot be read.
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


def load_run_state(
    strategy: Strategy, config: Config, found: ResumePoint | None, ranks: Ranks, has_adapter: bool = False
) -> Progress:
    """Load the weights and optimizer state that the run starts from. Returns its progress so far.

    Args:
        has_adapter: whether the run trains an adapter.
    """
    begin = time.perf_counter()
    if found is None:
        if config.setting("load_from"):
            _load_initial_weights(strategy, resolve_folder(config.setting("load_from")), ranks, has_adapter)
        return Progress()
    strategy.load(found.folder)
    took = time.perf_counter() - begin
    at = f"iteration {found.state.iteration}, {found.state.position}"
    logger.info(f"resumed from {found.folder} at {at}; loaded in {took:.1f} s")
    return Progress(found.state, (found.state.iteration, True))


def _load_initial_weights(strategy: Strategy, folder: Path, ranks: Ranks, has_adapter: bool) -> None:
    weights = folder
    if (folder / checkpoint.TRAINER).is_file():
        checkpoint.verify(folder, ranks)
        weights = folder / ADAPTER if has_adapter else find_base_weights(folder)
    strategy.load_weights(weights)
    logger.info(f"weights loaded from {weights} (load_from); optimizer and data position start anew")


def _check_facts(facts: dict[str, Any], where: Path) -> None:
    counts = ("packs_per_iteration", "max_iterations", "ranks", "begun_on")
    wrong = next((k for k in counts if type(facts.get(k)) is not int or facts[k] < 1), None)
    later = ("balance", "windows_from")  # absent from older checkpoints
    wrong = wrong or next((k for k in later if type(facts.get(k, 0)) is not int or facts.get(k, 0) < 0), None)
    wrong = wrong or next((k for k in ("data", "config") if not isinstance(facts.get(k), dict)), None)
    if wrong:
        raise CheckpointError(
            f"{where.name} does not have the format of this version: {wrong} is missing or wrong", where=str(where)
        )


def _written_counts(config: dict[str, Any]) -> Any:
    wrapper = config.get("optim_wrapper")
    return wrapper.get("accumulative_counts", 1) if isinstance(wrapper, dict) else None


def fit_accumulative_counts(found: ResumePoint, counts: int, ranks: int, sharers: int = 1) -> int:
    """Packs per rank and iteration that keep the packs per iteration on another number of ranks.

    accumulative_counts may be unchanged since the run was started or last saved, be the number that fits these ranks,
    or have changed with the ranks that share a pack, as in configs that multiply by `sequence_parallel_size`; any other
    value is a change, which `require_same_run` handles.

    Args:
        ranks: data-parallel ones.
        sharers: ranks that share a pack.
    """
    facts = found.facts
    packs, begun_on = facts["packs_per_iteration"], facts["begun_on"]
    written = _written_counts(facts["config"])
    multiplied = isinstance(written, int) and counts * facts.get("sharers", 1) == written * sharers
    if counts * ranks == packs or not (counts == written or multiplied or counts * begun_on == packs):
        return counts
    if packs % ranks:
        raise _indivisible(found, packs, ranks, sharers)
    logger.info(
        f"each rank takes {packs // ranks} packs an iteration, {packs} in total as before (accumulative_counts = "
        f"{counts} was for {begun_on} ranks)"
    )
    return int(packs // ranks)


def _indivisible(found: ResumePoint, packs: int, ranks: int, sharers: int) -> ConfigError:
    def groups(count: int, size: int) -> str:
        return f"{count} groups of {size} ranks that share packs" if size > 1 else f"{count} ranks"

    divisors, before = [n for n in range(1, packs + 1) if packs % n == 0], found.facts.get("sharers", 1)
    do = f"resume on one of these numbers of ranks: {', '.join(map(str, divisors))}"
    if sharers > 1 or before > 1:
        fitting = ", ".join(str(ranks * sharers // n) for n in reversed(divisors) if ranks * sharers % n == 0)
        do += f", each times sequence_parallel_size; on {ranks * sharers} ranks set that to one of: {fitting}"
    return ConfigError(
        f"{packs} packs an iteration cannot be divided over {groups(ranks, sharers)}",
        where=found.where,
        why=f"the run was started with {packs} (on {groups(found.facts['begun_on'], before)}), and its schedule "
        "depends on it",
        do=do,
    )


def find_window_start(found: ResumePoint, balance: int, lengths: Lengths) -> int:
    """The pack at which windows of iterations, whose packs are assigned together, start: here if their size changed.

    Raises: ConfigError if that is within such a window of the same data.
    """
    facts = found.facts
    if not lengths.packs_per_epoch:  # changed data with fewer packs than ranks at the start of the run
        return 0
    here = found.state.position.packs_before(lengths.packs_per_epoch)
    before = max(facts.get("balance", 0), 1), facts["packs_per_iteration"], facts["data"].get("num_packs")
    same = before == (max(balance, 1), lengths.packs_per_iteration, lengths.num_packs)
    begun = min(facts.get("windows_from", 0), here)
    if same:
        return begun
    window, per_iteration, packs = before
    within = (here - begun) // per_iteration % window
    if within and packs == lengths.num_packs:
        iteration = found.state.iteration
        raise ConfigError(
            f"iteration {iteration} lies within {window} iterations whose packs were dealt together",
            where=found.where,
            why="with another train_dataloader.balance or number of packs an iteration, some of these packs would be "
            "seen twice and others never",
            do=f"resume after iteration {iteration - within} or {iteration - within + window}, or keep "
            f"train_dataloader.balance = {window} and the packs of an iteration",
        )
    return here


def require_same_run(found: ResumePoint, now: dict[str, Any], allow_change: bool) -> None:
    """Log changes since the checkpoint; raise ConfigError or DataError for those that would make it another run.

    Args:
        now: facts of the resuming run, in the form of `found.facts`.
    """
    try:
        _require_same_run(found.facts, now, found.where, allow_change)
    except RecursionError:
        raise _too_deep(Path(found.where)) from None


def _require_same_run(facts: dict[str, Any], now: dict[str, Any], where: str, allow_change: bool) -> None:
    before = mask(facts["config"])  # older checkpoints contain an unmasked config
    if "version" not in facts:
        apply_hook_settings(before, absent=True)
    if facts.get("base") and now.get("base"):
        trained_on, here = (read_base(f["base"], where) for f in (facts, now))
        require_same_base(trained_on, here, "the checkpoint's adapter", where)
    changed = compare_configs(before, now["config"])
    if facts["data"] == now["data"]:  # the same documents, whatever their source's settings
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
            why="the result would differ from that of the original run",
            do="undo the changes, or give --allow-change",
        )
    for change in by_kind["changes the result"]:
        logger.warning(f"changed since the checkpoint, allowed: {change}")


def _require_same_data(facts: dict[str, Any], now: dict[str, Any], found: list[Change], where: str) -> None:
    """Raises: DataError that names the changed settings or files."""
    before, here = facts["data"], now["data"]
    if all(here.get(key) == value for key, value in before.items()):
        return
    details = [str(c) for c in found if c.key.startswith(DATA) and c.kind == "changes the result"]
    seen = ("data", "num_packs") if not details else tuple(before)  # facts that the message states otherwise
    files = describe_changed_files(facts.get("files"), now["files"])
    if files and not any("min_length" in change for change in details):
        details.append(files)
    details += [f"{k}: {v!r} → {here.get(k)!r}" for k, v in before.items() if here.get(k) != v and k not in seen]
    if not details:  # the checkpoint does not list its files
        packs = f"{before.get('num_packs')} packs then, {here['num_packs']} now"
        details = [f"the documents of its files, or the order of files, have changed ({packs})"]
    raise DataError(
        "the data is not what the checkpoint was trained on: " + "; ".join(details),
        where=where,
        why="the run would see some documents twice and others never, or learn other labels",
        do="restore the data and its settings, give --allow-change, or start a new run with load_from",
    )


def _require_same_length(facts: dict[str, Any], now: dict[str, Any], found: list[Change], where: str) -> None:
    for key, what, setting in (
        ("packs_per_iteration", "an iteration took {} packs and would take {}", "accumulative_counts"),
        ("max_iterations", "the run had {} iterations and would have {}", "max_epochs"),
    ):
        if facts[key] != now[key]:
            details = "; ".join(str(c) for c in found if c.key.endswith(f".{setting}"))
            raise ConfigError(
                what.format(facts[key], now[key]) + (f": {details}" if details else ""),
                where=where,
                why="the learning rate schedule and the gradient noise would change",
                do=f"restore {setting}, or give --allow-change",
            )
