"""Settings and the facts of the checkpoint to resume → the plan of a run."""

from fractions import Fraction
from typing import Any

from xtuner.config.config import Config
from xtuner.config.findings import locate_errors
from xtuner.config.paths import data_keys
from xtuner.core.errors import ConfigError, DataError
from xtuner.data.loading.loader import find_balance_obstacle, identity, list_files
from xtuner.data.loading.sampler import count_epoch_packs
from xtuner.engine.memory import USUAL_PACK
from xtuner.engine.strategies.select import choose_strategy
from xtuner.optim.schedule import Schedule
from xtuner.train.resume import ResumePoint, find_window_start, require_same_run
from xtuner.train.run import Lengths, Plan, Settings

DATASET = "train_dataloader.dataset"


def make_plan(
    settings: Settings,
    found: ResumePoint | None = None,
    allow_change: bool = False,
    deepspeed: str | None = None,
    fsdp: str | None = None,
    free: int | None = None,
    host: int = 0,
) -> Plan:
    """The plan of a run. Pure arithmetic: no messages to other ranks, no weights.

    Args:
        found: the checkpoint to resume; `settings` fit it (`preflight.with_accumulation`).
        allow_change: accept changes of settings or data that change the result.
        deepspeed, fsdp: as on the command line.
        free: bytes of GPU memory that every rank can still allocate (`memory.min_free_bytes`).
        host: bytes of host memory for each rank's activations (`long_documents.min_host_bytes`).

    Raises: ConfigError or DataError if no plan is possible, or the checkpoint is another run's.
    """
    config, optim, dp_size = settings.config, settings.optim, settings.sampler.world_size
    lengths = Lengths(
        dp_size=dp_size,
        begun_on=found.facts["begun_on"] if found else dp_size,
        accumulative_counts=optim.accumulative_counts,
        num_packs=count_epoch_packs(settings.dataset),
        max_epochs=config.get("train_cfg.max_epochs"),
    )
    require_possible_mixture(config, settings.dataset)
    _require_an_iteration(settings, lengths)
    reshuffle = config.setting("train_dataloader.reshuffle")
    balance = config.setting("train_dataloader.balance")
    if find_balance_obstacle(settings.dataset, settings.sampler, balance):
        balance = 0
    data = identity(settings.dataset, settings.sampler, reshuffle)
    origin = find_window_start(found, balance, lengths) if found else 0
    facts = {
        "version": 2,  # version 1: schedule and reshuffling were switched on by hooks
        "data": data,
        "files": list_files(settings.dataset),
        "packs_per_iteration": lengths.packs_per_iteration,
        "max_iterations": lengths.max_iterations,
        "ranks": dp_size,
        "sharers": settings.mesh.cp,
        "begun_on": lengths.begun_on,
        "balance": balance,
        "windows_from": origin,
        "config": config.resolved(),
        **({"base": settings.source.base.to_json()} if settings.source.base else {}),
    }
    if found:
        require_same_run(found, facts, allow_change)
    pack = settings.dataset.packed_length
    schedule = _schedule(config, optim.lr, lengths, pack)
    choice = choose_strategy(
        settings.source, optim, settings.device, deepspeed, fsdp, settings.mesh, pack, free,
        longest_document(settings.dataset), host,
    )  # fmt: skip
    return Plan(**vars(lengths), reshuffle=reshuffle, balance=balance, windows_from=origin, schedule=schedule,
                choice=choice, facts=facts)  # fmt: skip


def require_possible_mixture(config: Config, dataset: Any) -> None:
    """Raises: ConfigError for a schedule of shares that these iterations cannot follow."""
    with locate_errors(config, DATASET):
        if mixed := getattr(dataset, "mixture", None):
            mixed.require_possible()


def longest_document(dataset: Any) -> int:
    """Tokens of the longest document in a pack; 0 if packs are of a usual length, or it is unknown."""
    longest = find_longest_document(dataset) if dataset.packed_length > USUAL_PACK else None
    return min(longest or 0, dataset.packed_length)


def find_longest_document(dataset: Any) -> int | None:
    """Tokens of the longest document; None if it is unknown, as for a user's dataset without that method."""
    longest: int | None = dataset.longest_document() if hasattr(dataset, "longest_document") else None
    return longest


def _schedule(config: Config, lr: float, lengths: Lengths, pack: int) -> Schedule:
    per_epoch = Fraction(lengths.packs_per_epoch, lengths.packs_per_iteration)
    try:
        specs, tokens = config.setting("param_scheduler"), lengths.packs_per_iteration * pack
        return Schedule.from_config(lr, specs, per_epoch, lengths.max_iterations, tokens)
    except ConfigError as e:
        raise ConfigError(e.what, where=config.where(e.where), why=e.why, do=e.do) from None


def _require_an_iteration(settings: Settings, lengths: Lengths) -> None:
    if lengths.max_iterations:
        return
    config, data, ranks = settings.config, settings.dataset, lengths.dp_size
    documents: Any = data.documents
    takes = f"one iteration takes {lengths.packs_per_iteration}" + (f" on {ranks} ranks" if ranks > 1 else "")
    length, counts = (config.name_in_file(k) for k in (f"{DATASET}.packed_length", "optim_wrapper.accumulative_counts"))
    key, lower, kept = data_keys(config, DATASET)[0], f"{length} or {counts}", ""
    if least := getattr(documents, "min_length", 0):
        key = f"{DATASET}.dataset_cfg.min_length"
        lower, kept = f"{config.name_in_file(key)}, {lower}", f", in documents of at least {least:,}"
    raise DataError(
        f"{len(data)} packs, and {takes}",
        where=f"{documents.location}: {documents.num_tokens:,} tokens in {len(documents)} files{kept}, "
        f"by {config.where(key)}",
        why=f"a file's last tokens that do not fill a pack of {data.packed_length:,} are dropped",
        do=f"lower {lower}, or give more data" + (", or use fewer ranks" * (ranks > 1)),
    )
