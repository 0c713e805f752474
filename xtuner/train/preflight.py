"""Everything that would end a run before its first iteration, found before anything is written.

    settings       names, values, types and paths of the config; hooks   check-cfg, launch, dry run, train
    prepare        weights, tokenizers and data that it names            check-cfg, dry run, train
    command_line   options, the work dir and its lock                    dry run, train

What depends on the machine is asked of engine/strategies/select.py, engine/capacity.py and the model's source; what
depends on a checkpoint, of train/resume.py and train/plan.py. Of weights only the headers are read. Each function
raises one error for all that it finds, and names the setting or file that the user wrote.
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

from xtuner.config.build import build, resolve_type, type_name
from xtuner.config.check import find_mistakes
from xtuner.config.config import Config
from xtuner.config.findings import Findings, combine_errors, locate_errors
from xtuner.config.paths import data_keys, named_models
from xtuner.config.specs import walk_values
from xtuner.core import hub
from xtuner.core.errors import ConfigError
from xtuner.core.files import require_utf8, write_failure
from xtuner.core.log import logger
from xtuner.data.format.cache_dirs import Opening
from xtuner.data.loading.open_on_ranks import open_on_ranks
from xtuner.data.loading.sampler import InternRepoSampler
from xtuner.data.packing.document_source import as_documents
from xtuner.data.packing.pack import PackedDataset
from xtuner.dist.mesh import Mesh
from xtuner.families import read_model
from xtuner.model.source import ModelSource, from_scratch, require_marks
from xtuner.model.weights import WeightFolder, base_weights, hf_shapes
from xtuner.model.weights import check as check_weights
from xtuner.optim.optim_wrapper import OptimWrapper
from xtuner.optim.parameter_groups import require_matches
from xtuner.train.checkpoints import work_dir_lock
from xtuner.train.checkpoints.checkpoint import TRAINER
from xtuner.train.hooks import ValidationHook
from xtuner.train.parts import Parts, build_parts, priority_of
from xtuner.train.run import Hook, Settings

DATASET, SAMPLER = "train_dataloader.dataset", "train_dataloader.sampler"
NEEDED = {  # what a user's own must have, too
    DATASET: ("__len__", "__getitem__", "documents", "fingerprint", "label_rule", "locate", "packed_length",
              "packs_per_file", "raw", "seed", "tail_tokens_per_file"),
    SAMPLER: ("describe", "set_epoch", "share", "world_size"),
}  # fmt: skip


def settings(config: Config, paths: bool = True) -> Parts:
    """Check the config alone, and build its hooks and trackers: their constructors may refuse, too.

    Args:
        paths: look, too, whether the folders and files that it names are there.
    """
    if wrong := find_mistakes(config, paths):
        raise combine_errors(wrong)
    found = Findings(config)
    parts = build_parts(config, found)
    found.check()
    return parts


def prepare(
    config: Config, hooks: Sequence[Hook], work_dir: Path, device: torch.device, seed: int | None, mesh: Mesh,
    opening: Opening = Opening(),  # noqa: B008
) -> Settings:  # fmt: skip
    """Build what a config that `settings` has passed describes, but for weights. All ranks call it together.

    Args:
        seed: of random weights; None for the config's.
        opening: of its data. Read-only: fetch nothing of a hub, too; what is not on this machine is not looked at.
    """
    source = mesh.ranks.run_on_all(lambda: start(config, opening.read_only))
    dataset = open_on_ranks(lambda known: open_data(config, replace(opening, known=known)), mesh.ranks)
    return mesh.ranks.run_on_all(
        lambda: assemble(config, dataset, source, hooks, work_dir, device, seed, mesh, opening)
    )


def start(config: Config, only_look: bool = False) -> ModelSource | None:
    """The model, when its weights, those of load_from, and all tokenizers have been seen to fit it.

    None for a model of a hub that is not on this machine.
    """
    found = Findings(config)
    source: ModelSource | None = None
    named = [(spec, f"{spec.key}.{n}", str(spec.arguments[n]), is_tok) for spec, n, is_tok in named_models(config)]
    seen = [(name, is_tok) for spec, _, name, is_tok in named if only_look or not _is_built(config, spec.key)]
    absent = [name for name, is_tok in seen if not hub.is_local(name, is_tok)]
    for name in dict.fromkeys(absent if only_look else ()):
        logger.info(f"{name} is not on this machine yet: whether it fits is seen when it has been downloaded")
    models = [(key, name) for _, key, name, is_tok in named if not is_tok]
    if not any(name in absent for _, name in models):
        with found.collect(next((key for key, _ in models if key.startswith("model")), "model")):
            source = _model(config)
            if source.folder:
                check_weights(WeightFolder(source.folder), hf_shapes(source.config, source.layout))
    if name := config.setting("load_from"):
        with found.collect("load_from"):
            _weights_to_start_from(Path(name).expanduser(), source)
    for spec, key, name, is_tok in named:
        if is_tok and name not in absent:
            with found.collect(key):
                _tokenizer(build({"type": spec.kind, **spec.arguments}, spec.key), source)
    found.check()
    return source


def _is_built(config: Config, key: str) -> bool:
    """Whether a run makes what is described at `key`; the tokenizer at the top level is for hooks and the export."""
    used = (walk_values(root, config.get(root)) for root in ("default_hooks", "custom_hooks"))
    return key != "tokenizer" or any(value is config.values["tokenizer"] for inside in used for _, value in inside)


def _model(config: Config) -> ModelSource:
    source = build(config.values["model"], "model")
    if not isinstance(source, ModelSource):
        raise ConfigError(f"{type_name(config.values['model']['type'])} makes no ModelSource", where="model")
    require_marks(source.config, f"{source.folder}/config.json: " if source.folder else "model.")
    return source


def _weights_to_start_from(folder: Path, source: ModelSource | None) -> None:
    weights = base_weights(folder) if (folder / TRAINER).is_file() else folder
    layout, _ = read_model(weights)
    tensors = WeightFolder(weights)
    if source:
        check_weights(tensors, hf_shapes(source.config, layout), by="the config's model")


def _tokenizer(tokenizer: Any, source: ModelSource | None) -> None:
    ids = getattr(tokenizer, "vocab_size", 0)
    if source and ids > source.config.vocab_size:
        pretrained = source.folder is not None
        raise ConfigError(
            f"the tokenizer has {ids:,} ids, the model's vocabulary {source.config.vocab_size:,}",
            why="text would become ids that have no row in the embedding, and the export would be refused",
            do="give the model's own tokenizer" if pretrained else f"set vocab_size to {ids} or more",
        )


def open_data(config: Config, opening: Opening) -> PackedDataset:
    """The training data. Raises: ConfigError and DataError of the folder, its files and their order."""
    with locate_errors(config, DATASET, *data_keys(config, DATASET)):
        return _with_all(config, DATASET, build(_opened_by(opening, config.get(DATASET), DATASET), DATASET))


def _opened_by(opening: Opening, spec: Any, key: str) -> Any:
    """A spec with `opening` for what takes it, at any depth."""
    if not isinstance(spec, Mapping):
        return spec
    inside = {name: _opened_by(opening, value, f"{key}.{name}") for name, value in spec.items()}
    if "type" in spec and "opening" in inspect.signature(resolve_type(spec["type"], key)).parameters:
        inside["opening"] = opening
    return inside


def _with_all(config: Config, key: str, part: Any) -> Any:
    """A part that the loader works with, when it has what the loader needs."""
    if lacks := [name for name in NEEDED[key] if not hasattr(part, name)]:
        ours = {DATASET: PackedDataset, SAMPLER: InternRepoSampler}[key]
        raise ConfigError(
            f"{type(part).__name__} has no {', '.join(lacks)}",
            where=key,
            why="the loader reads packs, their order and their identity from it",
            do=f"derive it from {ours.__module__}.{ours.__name__}, or give it the same attributes",
        )
    return part


def assemble(
    config: Config, dataset: PackedDataset, source: ModelSource | None, hooks: Sequence[Hook], work_dir: Path,
    device: torch.device, seed: int | None, mesh: Mesh, opening: Opening,
) -> Settings:  # fmt: skip
    """Settings of parts that have been checked. Raises: ConfigError, DataError.

    Args:
        source: None for a model that is not known: the run can be planned, not trained.
    """
    seed = seed if seed is not None else (config.setting("randomness.seed") or 0)
    known = source is not None
    if source is None:
        source = from_scratch(vocab_size=4, hidden_size=2, intermediate_size=1, num_hidden_layers=1,
                              num_attention_heads=1)  # fmt: skip
    elif isinstance(dataset, PackedDataset):  # one of a user's own answers for its ids itself
        dataset = dataset.with_vocab_size(source.config.vocab_size)
    if source.seed is None:
        source = replace(source, seed=seed)
    optim: OptimWrapper = build(config.values["optim_wrapper"], "optim_wrapper")
    if known:
        with locate_errors(config, "optim_wrapper.parameter_groups"):
            require_matches(source.trained_names(), optim.parameter_groups)
    with locate_errors(config, SAMPLER):
        sampler = _with_all(config, SAMPLER, _sampler(config.get(SAMPLER), dataset, mesh))
    held_out: list[Hook] = []
    if config.get("val_dataset"):
        with locate_errors(config, "val_dataset", *data_keys(config, "val_dataset")):
            spec = _opened_by(opening, config.get("val_dataset"), "val_dataset")
            documents = as_documents(build(spec, "val_dataset"))
        held_out.append(ValidationHook(documents, config.setting("val_interval"), dataset.packed_length))
    ordered = tuple(sorted([*hooks, *held_out], key=priority_of))
    if len(dataset):
        _look_at_first_pack(config, dataset)
    return Settings(config, work_dir, device, mesh, source, optim, dataset, sampler, ordered)


def _look_at_first_pack(config: Config, dataset: PackedDataset) -> None:
    """Read it as training reads it: ids beyond the vocabulary are seen before a run has begun. Raises: DataError."""
    with locate_errors(config, DATASET, *data_keys(config, DATASET)):
        first = dataset[0]
    if not (first["targets"] >= 0).any():
        counts = f": `xtuner data stats {folder}` counts" if (folder := dataset.documents.folder) else ""
        logger.warning(
            "the first pack has no token to learn from: negative ones are context only. If all packs are like it, "
            f"training ends with exit code 65{counts}"
        )


def _sampler(spec: Mapping[str, Any], dataset: PackedDataset, mesh: Mesh) -> Any:
    """The sampler, for this data-parallel rank unless the config says which."""
    own = {"rank": mesh.dp_rank, "world_size": mesh.dp_size}
    takes = inspect.signature(resolve_type(spec.get("type"), SAMPLER)).parameters
    return build(spec, SAMPLER, dataset=dataset, **{k: v for k, v in own.items() if k in takes and k not in spec})


def command_line(work_dir: Path, seed: int | None = None, max_minutes: float | None = None) -> None:
    """Check what the command line says: numbers, and that the work dir can be written and is nobody's. Leaves nothing.

    Raises: ConfigError; BusyError for another run's work dir; CheckpointError for a disk that takes nothing.
    """
    require_utf8(work_dir, "work dir")
    if seed is not None and not 0 <= seed < 2**32:
        raise ConfigError(f"--seed {seed} is not in 0 … 2^32 - 1", where="--seed")
    if max_minutes is not None and not (math.isfinite(max_minutes) and max_minutes >= 0):
        raise ConfigError(
            f"--max-minutes {max_minutes:g} is not a number of minutes from 0 on",
            where="--max-minutes",
            do="0 stops after one iteration; leave it out to train to the end",
        )
    try:
        there = work_dir.absolute()
        while not _exists(there):
            there = there.parent
        if not there.is_dir():
            raise NotADirectoryError(None, "it is a file" if there.is_file() else "it is no folder", str(there))
        _try_to_write(there)
        if there == work_dir.absolute():
            work_dir_lock.require_dead(there / work_dir_lock.NAME, time.time())
    except ValueError as e:
        raise ConfigError(f"the work dir cannot be made: {e}", where=repr(str(work_dir))) from None
    except OSError as e:
        e.filename = None  # of what was made to try
        raise write_failure(e, "the work dir", work_dir, "give another one with --work-dir") from None


def _try_to_write(folder: Path) -> None:
    """Make a file without a name, of which a kill leaves nothing; where the file system has none, a folder.

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


def work_dir_of(given: str | None, config: Config) -> Path:
    """--work-dir, else the config's, else work_dirs/CONFIG. Raises: ConfigError for a ~user that is not known."""
    named = given or config.setting("work_dir")
    default = Path("work_dirs") / config.name
    try:
        return Path(named).expanduser() if isinstance(named, str) else default  # `settings` refuses other types
    except RuntimeError as e:
        where = "--work-dir" if given else config.where("work_dir")
        raise ConfigError(f"the work dir {named!r} cannot be found: {e}", where=where) from None
