"""All kinds of checkpoints that can be converted, and how each is recognised.

recognise(path)            its kind, by the names of files alone; an error if it is none of these
recognise(path).open()     its tensors by name; only shapes have been read
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from xtuner.core import path_kinds
from xtuner.core.errors import CheckpointError, ConfigError
from xtuner.core.files import MANIFEST, read_json, verify
from xtuner.core.foreign_inputs import short
from xtuner.export.sources.internevo import InternEvoFolder
from xtuner.export.sources.single_file import SingleFile
from xtuner.export.sources.zero import ZeroFolder
from xtuner.families import NATIVE, find_family_by_names, read_model
from xtuner.families.base import ModelFamily
from xtuner.model.adapters.folder import MergedWeights, has_adapter, open_adapter
from xtuner.model.decoder import DecoderConfig
from xtuner.model.weights import Shape, WeightFolder, WeightSource, find_base_weights, join_from_family


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A source of weights, and what is known about its network."""

    source: WeightSource
    description: str
    layout: ModelFamily  # the family whose names it has
    config: DecoderConfig | None = None  # None: the checkpoint does not describe its network
    network: Mapping[str, Any] = field(default_factory=dict)  # or only these fields of it
    trainer: Mapping[str, Any] | None = None  # `trainer.json` of our own checkpoints


@dataclass(frozen=True)
class RecognisedCheckpoint:
    """A recognised checkpoint; its files have not been read."""

    path: Path
    opener: Callable[[Path], OpenedCheckpoint]

    def open(self, base: Path | None = None) -> OpenedCheckpoint:
        """Open the files.

        Args:
            base: the base model of a checkpoint with an adapter; None for the one that it records.

        Raises: CheckpointError if the checkpoint is incomplete or damaged.
        """
        return _open_checkpoint(self.path, base) if self.opener is _open_checkpoint else self.opener(self.path)


class RenamedSource(WeightSource):
    """A source whose names lose a prefix, such as the `llm.` of XTuner's wrapper."""

    def __init__(self, source: WeightSource, prefix: str) -> None:
        self.path, self._source = source.path, source
        self._names = {name.removeprefix(prefix): name for name in source}
        self._shapes = {name: source.shapes[old] for name, old in self._names.items()}

    @property
    def shapes(self) -> Mapping[str, Shape]:
        return self._shapes

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._source[self._names[name]]


def recognise(path: str | Path) -> RecognisedCheckpoint:
    """The kind of checkpoint at `path`. Raises: ConfigError if there is none, or none that can be converted."""
    kind = path_kinds.recognise(path)
    if opener := _OPENERS.get(kind.what):
        return RecognisedCheckpoint(kind.path, opener)
    if not kind.exists:
        what = "this is not a file" if os.path.exists(kind.path) else "there is no checkpoint"
        why = ""
        do = "give a work_dirs/CONFIG/iter_N.pth; work_dirs/CONFIG/last_checkpoint names the newest"
    elif kind.what != path_kinds.UNKNOWN:
        what, why = f"this is {kind.what}", "it cannot be converted as it is"
        do = f"give one of them, such as {kind.inner}" if kind.inner else kind.advice("convert that: {}")
    else:
        what = "this is not a checkpoint that can be recognised"
        why = (
            "looked for: manifest.json with weights/ (xtuner's own), config.json (Hugging Face), *_optim_states.pt "
            "with *_model_states.pt (DeepSpeed), model_tp*_pp*.pt with model_config.pt (InternEvo), or a single file"
        )
        do = "give the folder that contains these files, such as iter_N.pth, or DeepSpeed's global_stepN"
    raise ConfigError(what, where=str(kind.path), why=why, do=do)


def read_tensor(opened: OpenedCheckpoint, name: str) -> torch.Tensor:
    """Tensor `name` (ours) of an opened source, as stored. Raises: CheckpointError for integers (quantized weights)."""
    c = opened.config
    tensor = join_from_family(opened.source, name, opened.layout, c) if c else opened.source[name]
    if not tensor.is_floating_point():
        raise CheckpointError(
            f"{name} is {tensor.dtype}", where=str(opened.source.path), why="quantized weights are not supported"
        )
    return tensor.detach()


def _open_checkpoint(path: Path, base: Path | None = None) -> OpenedCheckpoint:
    verify(path)
    trainer = read_json(path / "trainer.json")
    if has_adapter(path):
        folder = open_adapter(path)
        base = folder.find_base(base)
        what = f"a checkpoint of xtuner, merged into {base}" + folder.describe_frozen()
        return OpenedCheckpoint(MergedWeights(folder, base), what, NATIVE, folder.config, trainer=trainer)
    weights = find_base_weights(path)
    layout, config = read_model(weights)
    return OpenedCheckpoint(WeightFolder(weights), "a checkpoint of xtuner", layout, config, trainer=trainer)


def _open_hf(path: Path) -> OpenedCheckpoint:
    if os.path.isfile(path / MANIFEST):
        verify(path)
    layout, config = read_model(path)
    return OpenedCheckpoint(WeightFolder(path), f"a Hugging Face folder ({layout.name} layout)", layout, config)


def _open_single(path: Path) -> OpenedCheckpoint:
    source = _without_wrapper(SingleFile(path))
    return OpenedCheckpoint(source, "a single file of torch.save", find_family_by_names(source.shapes))


def _open_zero(path: Path) -> OpenedCheckpoint:
    zero = ZeroFolder(path)
    source = _without_wrapper(zero)
    return OpenedCheckpoint(
        source, f"a DeepSpeed checkpoint, ZeRO-{zero.stage}, {zero.ranks} ranks", find_family_by_names(source.shapes)
    )


def _open_internevo(path: Path) -> OpenedCheckpoint:
    source = InternEvoFolder(path)
    what = f"an InternEvo checkpoint, {source.tp} tensor × {source.pp} pipeline ranks"
    return OpenedCheckpoint(source, what, NATIVE, network=source.network)


def _without_wrapper(source: WeightSource) -> WeightSource:
    names = list(source)
    adapters = [name for name in names if "lora_" in name]
    if adapters:
        raise CheckpointError(
            f"these are adapters (LoRA), not full weights: {short(adapters[0])}",
            where=str(source.path),
            do="merge them into their model with the tool that trained them, and give the result",
        )
    return RenamedSource(source, "llm.") if names and all(name.startswith("llm.") for name in names) else source


_OPENERS = {
    path_kinds.CHECKPOINT: _open_checkpoint,
    path_kinds.HF: _open_hf,
    path_kinds.ZERO: _open_zero,
    path_kinds.INTERNEVO: _open_internevo,
    path_kinds.SINGLE: _open_single,
    path_kinds.FILE: _open_single,  # any name: the contents decide
}
