"""Where weights come from: every kind of checkpoint that can be converted, and how each is recognised.

recognise(path)            what it is, in words, by the names of files alone; refuses what is none of these
recognise(path).open()     its tensors, by name; nothing but shapes has been read
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
from xtuner.model.decoder import DecoderConfig
from xtuner.model.weights import Shape, Source, WeightFolder, base_weights, join


@dataclass(frozen=True)
class Opened:
    """A source, and what is known of the network whose weights it holds."""

    source: Source
    what: str  # for people
    layout: ModelFamily  # whose names it has
    config: DecoderConfig | None = None  # None: the checkpoint does not describe its network
    network: Mapping[str, Any] = field(default_factory=dict)  # or only these fields of it
    trainer: Mapping[str, Any] | None = None  # `trainer.json` of our own checkpoints


@dataclass(frozen=True)
class Kind:
    """A recognised checkpoint that nothing has been read of."""

    path: Path
    opener: Callable[[Path], Opened]

    def open(self) -> Opened:
        """Raises: CheckpointError if it is not whole."""
        return self.opener(self.path)


class Renamed(Source):
    """A source under other names: without the wrapper's `llm.` that XTuner puts before each."""

    def __init__(self, source: Source, prefix: str) -> None:
        self.path, self._source = source.path, source
        self._names = {name.removeprefix(prefix): name for name in source}
        self._shapes = {name: source.shapes[old] for name, old in self._names.items()}

    @property
    def shapes(self) -> Mapping[str, Shape]:
        return self._shapes

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._source[self._names[name]]


def recognise(path: str | Path) -> Kind:
    """What lies at `path`. Raises: ConfigError if nothing, or nothing that is known."""
    kind = path_kinds.recognise(path)
    if opener := _OPENERS.get(kind.what):
        return Kind(kind.path, opener)
    if not kind.exists:
        what = "this is not a file" if os.path.exists(kind.path) else "there is no checkpoint"
        why = ""
        do = "give a work_dirs/CONFIG/iter_N.pth; work_dirs/CONFIG/last_checkpoint names the newest"
    elif kind.what != path_kinds.UNKNOWN:
        what, why = f"this is {kind.what}", "it cannot be converted as it is"
        do = f"give one of them, such as {kind.inner}" if kind.inner else kind.advice("convert that: {}")
    else:
        what = "no kind of checkpoint is recognised here"
        why = (
            "looked for: manifest.json with weights/ (xtuner's own), config.json (Hugging Face), *_optim_states.pt "
            "with *_model_states.pt (DeepSpeed), model_tp*_pp*.pt with model_config.pt (InternEvo), or a single file"
        )
        do = "give the folder that holds these files itself, such as iter_N.pth, or global_stepN of DeepSpeed's own"
    raise ConfigError(what, where=str(kind.path), why=why, do=do)


def read_tensor(opened: Opened, name: str) -> torch.Tensor:
    """Tensor `name` (ours) of an opened source, as stored. Raises: CheckpointError for integers (quantized weights)."""
    c = opened.config
    tensor = join(opened.source, name, opened.layout, c) if c else opened.source[name]
    if not tensor.is_floating_point():
        raise CheckpointError(
            f"{name} is {tensor.dtype}", where=str(opened.source.path), why="quantized weights are not read"
        )
    return tensor.detach()


def _open_checkpoint(path: Path) -> Opened:
    verify(path)
    weights = base_weights(path)
    layout, config = read_model(weights)
    trainer = read_json(path / "trainer.json")
    return Opened(WeightFolder(weights), "a checkpoint of xtuner", layout, config, trainer=trainer)


def _open_hf(path: Path) -> Opened:
    if os.path.isfile(path / MANIFEST):
        verify(path)
    layout, config = read_model(path)
    return Opened(WeightFolder(path), f"a Hugging Face folder ({layout.name} layout)", layout, config)


def _open_single(path: Path) -> Opened:
    source = _without_wrapper(SingleFile(path))
    return Opened(source, "a single file of torch.save", find_family_by_names(source.shapes))


def _open_zero(path: Path) -> Opened:
    zero = ZeroFolder(path)
    source = _without_wrapper(zero)
    return Opened(
        source, f"a DeepSpeed checkpoint, ZeRO-{zero.stage}, {zero.ranks} ranks", find_family_by_names(source.shapes)
    )


def _open_internevo(path: Path) -> Opened:
    source = InternEvoFolder(path)
    what = f"an InternEvo checkpoint, {source.tp} tensor × {source.pp} pipeline ranks"
    return Opened(source, what, NATIVE, network=source.network)


def _without_wrapper(source: Source) -> Source:
    names = list(source)
    adapters = [name for name in names if "lora_" in name]
    if adapters:
        raise CheckpointError(
            f"these are adapters (LoRA), no whole weights: {short(adapters[0])}",
            where=str(source.path),
            do="merge them into their model with the tool that trained them, and give that",
        )
    return Renamed(source, "llm.") if names and all(name.startswith("llm.") for name in names) else source


_OPENERS = {
    path_kinds.CHECKPOINT: _open_checkpoint,
    path_kinds.HF: _open_hf,
    path_kinds.ZERO: _open_zero,
    path_kinds.INTERNEVO: _open_internevo,
    path_kinds.SINGLE: _open_single,
    path_kinds.FILE: _open_single,  # whatever its name, it says itself what it is
}
