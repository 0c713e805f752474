"""Checks before a run writes anything: errors that would otherwise end it before its first iteration.

    check_settings      names, values, types and paths of the config; hooks   check-cfg, launch, dry run, train
    prepare_settings    weights, tokenizers and data that it names            check-cfg, dry run, train

Those of weights and tokenizers are in `model_checks`, of options and the work dir in `command_line`. Checks that depend
on the machine are in engine/strategies/select.py, engine/capacity.py and the model's source; those that depend on a
checkpoint in train/resume.py and train/plan.py. Each function collects all its findings in one error, which names the
setting or file that the user wrote.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from xtuner.config.build import OPENING, build, resolve_type
from xtuner.config.check import find_mistakes
from xtuner.config.config import Config
from xtuner.config.findings import Findings, combine_errors, locate_errors
from xtuner.config.paths import data_keys
from xtuner.core.errors import ConfigError, XTunerError
from xtuner.core.log import logger
from xtuner.data.format.cache_dirs import Opening
from xtuner.data.loading.open_on_ranks import open_on_ranks
from xtuner.data.loading.sampler import InternRepoSampler
from xtuner.data.packing.document_source import as_documents
from xtuner.data.packing.pack import PackedDataset
from xtuner.dist.mesh import Mesh
from xtuner.model.source import ModelSource, from_scratch
from xtuner.optim.optim_wrapper import OptimWrapper
from xtuner.train.extensions import Extensions, build_extensions, read_priority
from xtuner.train.hooks import ValidationHook
from xtuner.train.model_checks import check_models_and_tokenizers
from xtuner.train.run import Hook, Settings

PACKS_EXAMINED = 64  # for long documents: evenly spaced packs
DATASET, SAMPLER = "train_dataloader.dataset", "train_dataloader.sampler"
REQUIRED_ATTRIBUTES = {  # also of a user's own classes
    DATASET: ("__len__", "__getitem__", "documents", "fingerprint", "label_rule", "locate", "packed_length",
              "packs_per_file", "raw", "seed", "tail_tokens_per_file"),
    SAMPLER: ("describe", "set_epoch", "share", "world_size"),
}  # fmt: skip


def check_settings(config: Config, paths: bool = True) -> Extensions:
    """Check the config itself, and build its hooks and trackers: their constructors may raise errors, too.

    Args:
        paths: also check that the folders and files that it names exist.
    """
    if wrong := find_mistakes(config, paths):
        raise combine_errors(wrong)
    found = Findings(config)
    extensions = build_extensions(config, found)
    found.check()
    return extensions


def prepare_settings(
    config: Config, hooks: Sequence[Hook], work_dir: Path, device: torch.device, seed: int | None, mesh: Mesh,
    opening: Opening = Opening(),  # noqa: B008
) -> Settings:  # fmt: skip
    """Build everything that a checked config describes, except weights. All ranks call it together.

    Args:
        seed: for random weights; None for the config's.
        opening: how to open the data. Read-only: also download nothing, and skip what is not on this machine.
    """
    source = mesh.ranks.run_on_all(lambda: check_models_and_tokenizers(config, opening.read_only))
    dataset = open_on_ranks(lambda known: open_dataset(config, replace(opening, known=known)), mesh.ranks)
    return mesh.ranks.run_on_all(
        lambda: assemble_settings(config, dataset, source, hooks, work_dir, device, seed, mesh, opening)
    )


def arrange_ranks(settings: Settings, config: Config, mesh: Mesh) -> Settings:
    """The same settings with the ranks in another arrangement.

    Args:
        config: the same with the number of ranks that share a pack.
    """
    _, optim = build(config.values["optim_wrapper"], "optim_wrapper").fit_to(settings.source)
    changed = replace(settings, config=config, mesh=mesh, optim=optim)
    return with_accumulation(changed, optim.accumulative_counts)


def with_accumulation(settings: Settings, counts: int) -> Settings:
    """The same settings with this number of packs per rank and iteration."""
    config, mesh = settings.config, settings.mesh
    dataset = count_iterations(config, settings.dataset, counts * mesh.dp_size)
    sampler = _build_sampler(config.get(SAMPLER), dataset, mesh)
    optim = settings.optim.with_accumulation(counts)
    return replace(settings, optim=optim, dataset=dataset, sampler=sampler)


def count_iterations(config: Config, dataset: PackedDataset, packs: int) -> PackedDataset:
    """The same dataset for iterations of `packs` packs. Raises: ConfigError for a schedule of several epochs."""
    if not isinstance(dataset, PackedDataset) or not dataset.is_scheduled:
        return dataset
    if (epochs := config.get("train_cfg.max_epochs")) != 1:
        raise ConfigError(
            f"max_epochs = {epochs} with a schedule of the mixture",
            where=config.where("train_cfg.max_epochs"),
            why="a schedule counts the iterations of one epoch",
            do="set it to 1, and give max_repeats to the sources that the run should visit more than once",
        )
    return dataset.with_packs_per_iteration(packs)


def open_dataset(config: Config, opening: Opening) -> PackedDataset:
    """The training data. Raises: ConfigError and DataError of the folder, its files and their order."""
    with locate_errors(config, DATASET, *data_keys(config, DATASET)):
        return _require_attributes(
            config, DATASET, build(_insert_opening(opening, config.get(DATASET), DATASET), DATASET)
        )


def _insert_opening(opening: Opening, spec: Any, key: str) -> Any:
    """The spec with this argument inserted wherever a constructor accepts it, at any depth."""
    if isinstance(spec, list | tuple):
        return [_insert_opening(opening, value, f"{key}.{i}") for i, value in enumerate(spec)]
    if not isinstance(spec, Mapping):
        return spec
    inside = {name: _insert_opening(opening, value, f"{key}.{name}") for name, value in spec.items()}
    if "type" in spec and OPENING in inspect.signature(resolve_type(spec["type"], key)).parameters:
        inside[OPENING] = opening
    return inside


def _require_attributes(config: Config, key: str, part: Any) -> Any:
    """Return `part` if it has the attributes that the loader needs. Raises: ConfigError."""
    if lacks := [name for name in REQUIRED_ATTRIBUTES[key] if not hasattr(part, name)]:
        ours = {DATASET: PackedDataset, SAMPLER: InternRepoSampler}[key]
        raise ConfigError(
            f"{type(part).__name__} has no {', '.join(lacks)}",
            where=key,
            why="the loader reads packs, their order and their identity from it",
            do=f"derive it from {ours.__module__}.{ours.__name__}, or give it the same attributes",
        )
    return part


def assemble_settings(
    config: Config, dataset: PackedDataset, source: ModelSource | None, hooks: Sequence[Hook], work_dir: Path,
    device: torch.device, seed: int | None, mesh: Mesh, opening: Opening,
) -> Settings:  # fmt: skip
    """Combine checked parts into Settings. Raises: ConfigError, DataError.

    Args:
        source: None for a model that is not known: the run can be planned, but not trained.
    """
    seed = seed if seed is not None else (config.setting("randomness.seed") or 0)
    known = source is not None
    if source is None:
        source = from_scratch(vocab_size=4, hidden_size=2, intermediate_size=1, num_hidden_layers=1,
                              num_attention_heads=1)  # fmt: skip
    elif isinstance(dataset, PackedDataset):  # a user's own dataset checks its ids itself
        dataset = dataset.with_vocab_size(source.config.vocab_size)
    source = source.with_seed(seed)
    optim: OptimWrapper = build(config.values["optim_wrapper"], "optim_wrapper")
    if known:
        with locate_errors(config, "optim_wrapper.parameter_groups"):
            source, optim = optim.fit_to(source)
    if not (config.with_sharers and mesh.size > 1):  # else `arrange_ranks` does
        dataset = count_iterations(config, dataset, optim.accumulative_counts * mesh.dp_size)
    with locate_errors(config, SAMPLER):
        sampler = _require_attributes(config, SAMPLER, _build_sampler(config.get(SAMPLER), dataset, mesh))
    held_out: list[Hook] = []
    if config.get("val_dataset"):
        with locate_errors(config, "val_dataset", *data_keys(config, "val_dataset")):
            spec = _insert_opening(opening, config.get("val_dataset"), "val_dataset")
            try:
                documents = as_documents(build(spec, "val_dataset"))
            except XTunerError as e:  # a mixture locates its errors as if it were the training data
                where = e.where.replace(f"{DATASET}.dataset_cfg", "val_dataset", 1)
                raise type(e)(e.what, where=where, why=e.why, do=e.do) from None
        held_out.append(ValidationHook(documents, config.setting("val_interval"), dataset.packed_length))
    ordered = tuple(sorted([*hooks, *held_out], key=read_priority))
    if len(dataset):
        _check_first_pack(config, dataset)
        if known and isinstance(dataset, PackedDataset):
            _report_unseen_positions(source, dataset)
    return Settings(config, work_dir, device, mesh, source, optim, dataset, sampler, ordered)


def _check_first_pack(config: Config, dataset: PackedDataset) -> None:
    """Read the first pack, of each source, as training does, to detect ids beyond the vocabulary. Raises: DataError."""
    plan = getattr(dataset, "mixture", None)
    with locate_errors(config, DATASET, *data_keys(config, DATASET)):
        for pack in plan.first_pack[1:-1] if plan else ():
            dataset[pack]
        first = dataset[0]
    if not (first["targets"] >= 0).any():
        counts = f": `xtuner data stats {folder}` counts" if (folder := dataset.documents.folder) else ""
        logger.warning(
            "the first pack has no token to learn from: negative ones are context only. If this is true of all packs, "
            f"training ends with exit code 65{counts}"
        )


def _report_unseen_positions(source: ModelSource, dataset: PackedDataset) -> None:
    """Log a warning if documents are longer than the model's context and nothing scales its positions."""
    context = source.config.max_position_embeddings
    if source.config.rope_scaling or dataset.packed_length <= context:
        return
    examined = PACKS_EXAMINED if dataset.indexed else 1
    packs = range(0, len(dataset), -(-len(dataset) // examined))
    longest = max(map(dataset.longest_fragment, packs))
    if longest <= context:
        return
    if source.folder is None:
        logger.warning(
            f"there are documents of {longest:,} tokens, more than model.max_position_embeddings = {context:,}: the "
            "exported config.json will limit serving tools to that. Set it to max_length"
        )
        return
    logger.warning(
        f"there are documents of {longest:,} tokens, and {source.folder}/config.json has max_position_embeddings = "
        f"{context:,} without rope_scaling: the model has not been trained at later positions, so its loss on them "
        "begins high, and the export keeps that limit for serving tools. To extend the context, set "
        f'max_position_embeddings = {longest} and a larger rope_theta there, or rope_scaling = {{"type": "dynamic", '
        f'"factor": …}}; else set max_length = {context}'
    )


def _build_sampler(spec: Mapping[str, Any], dataset: PackedDataset, mesh: Mesh) -> Any:
    """The sampler of this data-parallel rank."""
    own = {"rank": mesh.dp_rank, "world_size": mesh.dp_size}
    takes = inspect.signature(resolve_type(spec.get("type"), SAMPLER)).parameters
    return build(spec, SAMPLER, dataset=dataset, **{k: v for k, v in own.items() if k in takes})
