"""Checks of the models and tokenizers that a config names: they exist, can be read and fit each other.

Only headers of weight files are read.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from xtuner.config.build import build, type_name
from xtuner.config.config import Config
from xtuner.config.findings import Findings
from xtuner.config.paths import named_models
from xtuner.config.specs import walk_values
from xtuner.core import hub
from xtuner.core.errors import ConfigError
from xtuner.core.log import logger
from xtuner.data.tokenizer_template import read_template
from xtuner.families import read_model
from xtuner.model.adapters.base_identity import require_same_base
from xtuner.model.adapters.folder import has_adapter, open_adapter
from xtuner.model.adapters.lora import LoRA
from xtuner.model.generate import require_special_tokens
from xtuner.model.source import ModelSource
from xtuner.model.weights import WeightFolder, check_network, check_shapes, find_base_weights
from xtuner.train.checkpoints.checkpoint import TRAINER


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
