"""Checks before a run writes anything: errors that would otherwise end it before its first iteration.

    check_settings       names, values, types and paths of the config; hooks   check-cfg, launch, dry run, train
    prepare_settings     weights, tokenizers and data that it names            check-cfg, dry run, train
    check_command_line   options, the work dir and its lock                    dry run, train

Checks that depend on the machine are in engine/strategies/select.py, engine/capacity.py and the model's source; those
that depend on a checkpoint in train/resume.py and train/plan.py. Only headers of weight files are read. Each function
collects all its findings in one error, which names the setting or file that the user wrote.
"""

import errno
import inspect
import math
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from xtuner.config.build import OPENING, build, resolve_type, type_name
from xtuner.config.check import find_mistakes
from xtuner.config.config import Config
from xtuner.config.findings import Findings, combine_errors, locate_errors
from xtuner.config.paths import data_keys, named_models
from xtuner.config.specs import walk_values
from xtuner.core import hub
from xtuner.core.errors import ConfigError, XTunerError
from xtuner.core.files import require_utf8, write_failure
from xtuner.core.log import logger
from xtuner.data.format.cache_dirs import Opening
from xtuner.data.loading.open_on_ranks import open_on_ranks
from xtuner.data.loading.sampler import InternRepoSampler
from xtuner.data.packing.document_source import as_documents
from xtuner.data.packing.pack import PackedDataset
from xtuner.data.tokenizer_template import read_template
from xtuner.dist.mesh import Mesh
from xtuner.families import read_model
from xtuner.model.adapters.base_identity import require_same_base
from xtuner.model.adapters.folder import has_adapter, open_adapter
from xtuner.model.adapters.lora import LoRA
from xtuner.model.generate import require_special_tokens
from xtuner.model.source import ModelSource, from_scratch
from xtuner.model.weights import WeightFolder, check_network, check_shapes, find_base_weights
from xtuner.optim.optim_wrapper import OptimWrapper
from xtuner.train.checkpoints import work_dir_lock
from xtuner.train.checkpoints.checkpoint import TRAINER
from xtuner.train.extensions import Extensions, build_extensions, read_priority
from xtuner.train.hooks import ValidationHook
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


def check_models_and_tokenizers(config: Config, read_only: bool = False) -> ModelSource | None:
    """Check that the weights, those of load_from and all tokenizers fit the model. Returns its source.

    None for a hub model that is not on this machine.
    """
    found = Findings(config)
    source: ModelSource | None = None
    named = [(spec, f"{spec.key}.{n}", str(spec.arguments[n]), is_tok) for spec, n, is_tok in named_models(config)]
    seen = [
        (name, is_tok) for spec, _, name, is_tok in named if read_only or not _is_used_in_training(config, spec.key)
    ]
    absent = [name for name, is_tok in seen if not hub.is_local(name, is_tok)]
    for name in dict.fromkeys(absent if read_only else ()):
        logger.info(f"{name} is not on this machine yet: it will be checked after its download")
    models = [(key, name) for _, key, name, is_tok in named if not is_tok]
    if not any(name in absent for _, name in models):
        with found.collect(next((key for key, _ in models if key.startswith("model")), "model")):
            source = build_model_source(config)
            source.require_weight_format(torch.device("meta"))  # as far as it does not depend on the machine
            if source.folder:
                stored = replace(source.config, vocab_size=source.config.vocab_size - source.added_rows)
                check_network(WeightFolder(source.folder), source.layout, stored)
    if name := config.setting("load_from"):
        with found.collect("load_from"):
            _check_initial_weights(hub.resolve_folder(name), source)
    for spec, key, name, is_tok in named:
        if is_tok and name not in absent:
            with found.collect(key):
                _check_tokenizer(build({"type": spec.kind, **spec.arguments}, spec.key), source)
    found.check()
    return source


def _is_used_in_training(config: Config, key: str) -> bool:
    """Whether a run builds the object at `key`; the top-level tokenizer is for hooks and the export."""
    used = (walk_values(root, config.get(root)) for root in ("default_hooks", "custom_hooks"))
    return key != "tokenizer" or any(value is config.values["tokenizer"] for inside in used for _, value in inside)


def build_model_source(config: Config) -> ModelSource:
    source = build(config.values["model"], "model")
    if not isinstance(source, ModelSource):
        raise ConfigError(f"{type_name(config.values['model']['type'])} makes no ModelSource", where="model")
    require_special_tokens(source.config, f"{source.folder}/config.json: " if source.folder else "model.")
    return source


def _check_initial_weights(folder: Path, source: ModelSource | None) -> None:
    if source and source.base:
        _check_initial_adapter(folder, source)
        return
    weights = find_base_weights(folder) if (folder / TRAINER).is_file() else folder
    layout, _ = read_model(weights)
    tensors = WeightFolder(weights)
    if source:
        check_network(tensors, layout, source.config, "the config's model")


def _check_initial_adapter(folder: Path, source: ModelSource) -> None:
    assert source.base
    assert isinstance(source.adapter, LoRA)
    if not has_adapter(folder):
        raise ConfigError(
            "this is not a checkpoint of a run with an adapter",
            why="with model.adapter the weights of the base model come from model.pretrained_model_name_or_path alone",
            do="give the model there, or an iter_N.pth of a run with the same adapter",
        )
    found = open_adapter(folder)
    require_same_base(found.base, source.base, "the adapter", str(folder))
    shapes = {n: tuple(shape) for n, shape in source.trained_shapes.items()}
    check_shapes(found.tensors, shapes, "model.adapter")
    if changed := found.list_differences(source.adapter, source.frozen_weights):
        logger.warning(f"load_from: not the model that this adapter was trained in: {', '.join(changed)}")


def _check_tokenizer(tokenizer: Any, source: ModelSource | None) -> None:
    if hasattr(tokenizer, "folder"):
        read_template(tokenizer)  # samples and the export need it
    ids = getattr(tokenizer, "vocab_size", 0)
    if source and ids > source.config.vocab_size:
        pretrained = source.folder is not None
        raise ConfigError(
            f"the tokenizer has {ids:,} ids, the model's vocabulary {source.config.vocab_size:,}",
            why="some ids would have no row in the embedding, and the export would fail",
            do="give the model's own tokenizer" if pretrained else f"set vocab_size to {ids} or more",
        )


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


def check_command_line(work_dir: Path, seed: int | None = None, max_minutes: float | None = None) -> None:
    """Check the command line: numbers, and that the work dir is writable and not in use. Leaves no files.

    Raises: ConfigError; BusyError for another run's work dir; CheckpointError for a disk that cannot be written.
    """
    require_utf8(work_dir, "work dir")
    if seed is not None and not 0 <= seed < 2**32:
        raise ConfigError(f"--seed {seed} is not in 0 … 2^32 - 1", where="--seed")
    if max_minutes is not None and not (math.isfinite(max_minutes) and max_minutes >= 0):
        raise ConfigError(
            f"--max-minutes {max_minutes:g} is not a number of minutes from 0 on",
            where="--max-minutes",
            do="0 stops after one iteration; omit it to train to the end",
        )
    try:
        there = work_dir.absolute()
        while not _exists(there):
            there = there.parent
        if not there.is_dir():
            raise NotADirectoryError(None, "it is a file" if there.is_file() else "it is not a folder", str(there))
        _try_to_write(there)
        if there == work_dir.absolute():
            work_dir_lock.require_dead(there / work_dir_lock.NAME, time.time())
    except ValueError as e:
        raise ConfigError(f"the work dir cannot be made: {e}", where=repr(str(work_dir))) from None
    except OSError as e:
        e.filename = None  # the name of the temporary file
        raise write_failure(e, "the work dir", work_dir, "give another one with --work-dir") from None


def _try_to_write(folder: Path) -> None:
    """Create an unnamed file, which vanishes even after a kill; a temporary folder on file systems without these.

    Raises: OSError.
    """
    try:
        os.close(os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o600))
    except OSError as e:
        if e.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
        tempfile.TemporaryDirectory(prefix=".xtuner-", dir=folder).cleanup()


def _exists(path: Path) -> bool:
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    return True


def resolve_work_dir(given: str | None, config: Config) -> Path:
    """--work-dir, else the config's, else work_dirs/CONFIG. Raises: ConfigError for an unknown ~user."""
    named = given or config.setting("work_dir")
    default = Path("work_dirs") / config.name
    try:
        return Path(named).expanduser() if isinstance(named, str) else default  # `check_settings` rejects other types
    except RuntimeError as e:
        where = "--work-dir" if given else config.where("work_dir")
        raise ConfigError(f"the work dir {named!r} cannot be found: {e}", where=where) from None
