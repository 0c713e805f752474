"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from xtuner.core.errors import ConfigError
from xtuner.core.files import read_json
from xtuner.core.foreign_inputs import short, short_repr
from xtuner.families import FAMILIES, read_model
from xtuner.families.base import ModelFamily
from xtuner.families.network import DecoderConfig
from xtuner.model.adapters.base_identity import BaseModel
from xtuner.model.adapters.folder import AdapterFolder
from xtuner.model.adapters.lora import TRAINABLE, build_lora, lora, name_targets, stored_rows
from xtuner.model.weights import Shape, WeightFolder, WeightSource, hf_shapes

PREFIX = "base_model.model."
IDENTITY = "xtuner_base_identity"  # key of the tensors' metadata, in folders that we have written
# Settings that the reader knows, that the tensors repeat, or that do not change what a trained adapter computes
_READ = frozenset({
    "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "bias", "base_model_name_or_path", "modules_to_save",
    "ensure_weight_tying", "init_lora_weights", "task_type", "auto_mapping", "peft_version", "revision",
    "inference_mode", "target_modules", "exclude_modules", "layers_pattern", "lora_dropout", "megatron_core",
    "qalora_group_size", "runtime_config", "eva_config", "corda_config", "lora_ga_config", "loftq_config",
})  # fmt: skip
_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")  # others change the base model's weights as well
_MERGE = "merge it with PEFT, and give the result as MODEL"


def open_peft(folder: Path, base: Path) -> AdapterFolder:
    """An adapter in PEFT's format for the model in the folder `base`. Raises: ConfigError, CheckpointError."""
    where = str(folder / "adapter_config.json")
    layout, c = read_model(base)
    layout = FAMILIES[layout.trains_as or layout.name]  # whose names exports have
    given = read_json(folder / "adapter_config.json")
    given = given if isinstance(given, dict) else {}
    tensors = WeightFolder(folder)
    names = {name: _own_name(name, layout, c) for name in tensors}
    if wrong := [name for name, own in names.items() if own is None]:
        raise ConfigError(
            f"{len(wrong)} tensors do not belong to matrices of this model that can have an adapter; the first is "
            f"{short(wrong[0])}",
            where=str(folder),
            do="give the model that it was trained on as MODEL, in the layout of these names; or merge it with PEFT, "
            "and give the result",
        )
    rank = given.get("r")
    others = [n for n in tensors if ".lora_A." in n and tensors.shapes[n][:1] != (rank,)]
    if given.get("peft_type") != "LORA" or given.get("bias", "none") != "none" or others:
        raise ConfigError(
            "this adapter is not LoRA with one rank for all modules and without biases",
            where=where,
            do=f"{_MERGE}; or give the checkpoint that it was exported from",
        )
    _require_plain(given, where)
    names = _without_tied_copy(names, tensors, given, c, where)
    owned = {own for own in names.values() if own}
    parts = {own.partition(".adapter.")[2].partition(".")[0] for own in owned if ".adapter." in own}
    kinds = {"model.tok_embeddings.weight": "embedding", "output.weight": "output"}
    train = {kinds.get(own, "norms") for own in owned if ".adapter." not in own}
    try:
        settings = lora(
            rank=rank if isinstance(rank, int) else 0,
            alpha=given.get("lora_alpha", 0),
            targets=sorted(parts),
            scaling="alpha/sqrt(rank)" if given.get("use_rslora") else "alpha/rank",
            dora=bool(given.get("use_dora")),
            train=[name for name in TRAINABLE if name in train],
        )
        adapter = build_lora(settings, c)
    except ConfigError as e:
        raise ConfigError(f"the adapter does not fit the model: {e.what}", where=where) from None
    identity, file = None, tensors.file_of[next(iter(names))]
    if file.endswith(".safetensors"):
        with safe_open(folder / file, framework="pt") as opened:
            identity = (opened.metadata() or {}).get(IDENTITY)
    known = BaseModel(str(given.get("base_model_name_or_path") or ""), identity or "")
    renamed = RenamedWeights(tensors, {own: name for name, own in names.items() if own})
    return AdapterFolder(folder, c, adapter, known, "own", renamed)


def _require_plain(given: dict[str, Any], where: str) -> None:
    """Raise ConfigError for settings by which PEFT computes something else with the same tensors."""
    starts = given.get("init_lora_weights") not in _PLAIN_STARTS
    key = "init_lora_weights" if starts else next((k for k, value in given.items() if value and k not in _READ), None)
    if key:
        raise ConfigError(
            f"{short(key)} = {short_repr(given[key])} is not supported",
            where=f"{where}: {short(key)}",
            why="with it PEFT changes the base model's own weights as well"
            if starts
            else "the same term, scale and rank in all blocks is what is computed here",
            do=_MERGE,
        )


def _without_tied_copy(
    names: dict[str, str | None], tensors: WeightFolder, given: dict[str, Any], c: DecoderConfig, where: str
) -> dict[str, str | None]:
    """`names` without PEFT's second copy of a tied weight.

    Raises: ConfigError if PEFT gives such a model an output layer of its own.
    """
    theirs = {own: name for name, own in names.items()}
    embedding, head = (theirs.get(name) for name in ("model.tok_embeddings.weight", "output.weight"))
    if not c.tie_word_embeddings or not (embedding or head):
        return names
    if not given.get("ensure_weight_tying") or not embedding or (head and not tensors[embedding].equal(tensors[head])):
        raise ConfigError(
            "the adapter trains the embedding and the output layer apart, which are one weight in the base model",
            where=f"{where}: modules_to_save, ensure_weight_tying",
            why="PEFT computes with two weights, this network has one",
            do=_MERGE,
        )
    return {name: own for name, own in names.items() if name != head}


def _own_name(name: str, layout: ModelFamily, c: DecoderConfig) -> str | None:
    """Our name of a tensor of PEFT, or None for one that is not supported."""
    module, dot, kind = name.removeprefix(PREFIX).rpartition(".lora_")
    own = _own_modules(layout, c)
    if not dot:
        return own.get(name.removeprefix(PREFIX))
    key = {"A.weight": "A", "B.weight": "B", "magnitude_vector": "magnitude"}.get(kind)
    return f"{own[module]}.{key}" if key and module in own else None


@functools.lru_cache(4)
def _own_modules(layout: ModelFamily, c: DecoderConfig) -> dict[str, str]:
    """Modules of the family → our terms on them; and names of its other tensors → our parameters."""
    (head,) = layout.stored("output.weight", c)
    found = {head.name: "output.weight"}
    targets = dict(name_targets(c)).values()
    for name in hf_shapes(c):
        matrix = name.removesuffix(".weight")
        kind = ".".join(matrix.split(".")[3:])
        for stored in layout.stored(name, c):
            found[stored.name] = name
            part = next((t.part for t in targets if t.matrix == kind and t.rows == stored_rows(stored)), None)
            if part:
                found[stored.name.removesuffix(".weight")] = f"{matrix}.adapter.{part}"
    return found


class RenamedWeights(WeightSource):
    """A source under other names. Args: names: new → old."""

    def __init__(self, source: WeightFolder, names: dict[str, str]) -> None:
        self.path, self._source, self._names = source.path, source, names

    @property
    def shapes(self) -> Mapping[str, Shape]:
        return {new: self._source.shapes[old] for new, old in self._names.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._source[self._names[name]]
