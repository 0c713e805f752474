"""Weights on disk → the network, one tensor at a time: safetensors, or foreign `.bin` by the restricted reader.

`Source` is what every reader of weights looks like, those of other tools' checkpoints in `export/sources` included.
"""

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from xtuner.core.errors import CheckpointError
from xtuner.core.foreign_inputs import check_regular, short, short_repr
from xtuner.core.hub import INDEX, indexed_files
from xtuner.core.log import progress
from xtuner.families import NATIVE
from xtuner.families.base import ModelFamily
from xtuner.model.decoder import CausalLM, DecoderConfig

Shape = tuple[int, ...]


class Source(ABC):
    """Named tensors that lie on disk. Their shapes are known at once, their contents are read when asked for."""

    path: Path  # for messages

    @property
    @abstractmethod
    def shapes(self) -> Mapping[str, Shape]:
        """Tensor name → shape, in the order of the files."""

    @abstractmethod
    def __getitem__(self, name: str) -> torch.Tensor:
        """A tensor, to be read and not to be changed: it may be a view of the file."""

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)


class WeightFolder(Source):
    """All tensors of a folder by name, read when asked for.

    Takes `model.safetensors.index.json` with its shards, else `*.safetensors`, else `pytorch_model*.bin`.
    Raises: CheckpointError if there are none, or the index names files that are not there.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder)
        self._open: dict[str, Any] = {}
        names = self._indexed() or sorted(p.name for p in self.path.glob("*.safetensors"))
        self._files = names or sorted(p.name for p in self.path.glob("pytorch_model*.bin"))
        if not self._files:
            raise CheckpointError(
                "no weights in the folder",
                where=str(self.path),
                do="it should hold model.safetensors, or shards with model.safetensors.index.json",
            )

    def _indexed(self) -> list[str]:
        index = self.path / INDEX
        if not os.path.exists(index):
            return []
        names = indexed_files(index)
        for name in names:
            shown = short(name)
            if name != Path(name).name:
                raise CheckpointError(f"the index names a file outside its folder: {shown!r}", where=str(index))
            if not os.path.isfile(self.path / name):
                raise CheckpointError(f"the index names {shown}, which is missing", where=str(index))
        return names

    @cached_property
    def file_of(self) -> dict[str, str]:
        """Tensor name → file name."""
        return {tensor: file for file in self._files for tensor in self._handle(file).keys()}  # noqa: SIM118

    @cached_property
    def shapes(self) -> Mapping[str, Shape]:
        return {name: self._shape(self._handle(file), name) for name, file in self.file_of.items()}

    @staticmethod
    def _shape(handle: Any, name: str) -> Shape:
        return tuple(handle[name].shape if isinstance(handle, dict) else handle.get_slice(name).get_shape())

    def __getitem__(self, name: str) -> torch.Tensor:
        handle = self._handle(self.file_of[name])
        tensor: torch.Tensor = handle[name] if isinstance(handle, dict) else handle.get_tensor(name)
        return tensor

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            path = self.path / file
            try:
                check_regular(path)
                if file.endswith(".safetensors"):
                    self._open[file] = safe_open(path, framework="pt")
                else:
                    from xtuner.core.pickles import load_tensors

                    self._open[file] = tensors_of(load_tensors(path), path)
            except (SafetensorError, OSError) as e:
                what = f"{file} cannot be read as safetensors: {getattr(e, 'strerror', None) or e}"
                raise CheckpointError(what, where=str(path)) from None
        return self._open[file]


def tensors_of(value: Any, path: Path) -> dict[str, torch.Tensor]:
    """`value`, if it is tensors by their names. Raises: CheckpointError."""
    if isinstance(value, dict) and value and all(isinstance(name, str) for name in value):
        other = next((name for name, tensor in value.items() if not isinstance(tensor, torch.Tensor)), None)
        if other is None:
            return value
        what = f"{path.name} holds no weights alone: {short_repr(other)} is no tensor"
    else:
        what = f"{path.name} holds no tensors by name"
    raise CheckpointError(
        what,
        where=str(path),
        why="a checkpoint in one file is {'state_dict': {name: tensor}} or {name: tensor}",
        do="give the file of the weights",
    )


def base_weights(checkpoint: Path) -> Path:
    """The weights of a checkpoint. Raises: CheckpointError for one whose adapter would be lost."""
    if (checkpoint / "adapter").is_dir():
        raise CheckpointError(
            "the checkpoint has an adapter, which cannot be merged into its weights yet",
            where=str(checkpoint / "adapter"),
            why="without it the weights are those of the model that the adapter was trained on",
            do=f"give {checkpoint / 'weights'} if that is what you want",
        )
    return checkpoint / "weights"


@dataclass(frozen=True)
class Part:
    """Elements [begin, begin + len(values)) of a flattened parameter: what one process holds of it."""

    values: torch.Tensor  # [n], a view: writing to it changes the parameter
    begin: int = 0

    @classmethod
    def whole(cls, parameter: torch.Tensor) -> "Part":
        return cls(parameter.data.view(-1))

    def read(self) -> torch.Tensor:
        """The fp32 values [n]."""
        return self.values.float()

    @torch.no_grad()
    def take(self, full: torch.Tensor) -> None:
        """Copy this part out of the full parameter, casting to its dtype."""
        self.values.copy_(full.reshape(-1)[self.begin : self.begin + len(self.values)])


def split(name: str, tensor: torch.Tensor, family: ModelFamily, c: DecoderConfig) -> dict[str, torch.Tensor]:
    """Our tensor as the family's files keep it, by their names."""
    stored, tail = family.stored(name, c), tensor.shape[1:]
    if len(stored) == 1:
        return {stored[0].name: tensor}
    grouped = ((r, tensor.reshape(r.groups, -1, *tail)) for r in stored)
    return {r.name: rows[:, r.begin : r.end].reshape(-1, *tail) for r, rows in grouped}


def join(parts: Mapping[str, torch.Tensor] | Source, name: str, family: ModelFamily, c: DecoderConfig) -> torch.Tensor:
    """The inverse of `split`: our tensor `name` from tensors by the names of the family's files."""
    tensors = [(r, parts[r.name]) for r in family.stored(name, c)]
    if len(tensors) == 1:
        return tensors[0][1]
    tail = tensors[0][1].shape[1:]
    return torch.cat([t.reshape(r.groups, -1, *tail) for r, t in tensors], dim=1).reshape(-1, *tail)


def hf_shapes(c: DecoderConfig, family: ModelFamily = NATIVE) -> dict[str, Shape]:
    """The tensors of the network `c` in a family's files, by default under our own names: name → shape."""
    with torch.device("meta"):
        parameters = dict(CausalLM(c).named_parameters())
    parts = [split(name, p, family, c) for name, p in parameters.items()]
    shapes = {name: tuple(tensor.shape) for part in parts for name, tensor in part.items()}
    held, numbers = sum(map(math.prod, shapes.values())), sum(p.numel() for p in parameters.values())
    assert held == numbers, f"{family.name}: {held:,} of {numbers:,} numbers have a place in its files"
    return shapes


def check(source: Source, wanted: Mapping[str, Shape], by: str = "config.json") -> None:
    """Compare names and shapes with those that `by` asks for; reads no contents.

    Raises: CheckpointError for tensors that are missing, of another shape, or that the model has no place for.
    """
    unknown = [n for n in source if n not in wanted and not n.endswith("rotary_emb.inv_freq")]
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} tensors have no place in the model; the first is {short(unknown[0])}",
            where=str(source.path),
            why=f"{by} describes another network than the weights",
        )
    for name, shape in wanted.items():
        if name not in source:
            raise CheckpointError(
                f"tensor {name} is missing",
                where=str(source.path),
                why="the model would start with a part at random",
                do=f"check that all files have arrived and that {by} belongs to them",
            )
        if source.shapes[name] != shape:
            raise CheckpointError(
                f"{name} is {list(source.shapes[name])} on disk and {list(shape)} by {by}",
                where=str(source.path),
                why=f"{by} describes another network than the weights",
            )


def stream(
    folder: str | Path,
    family: ModelFamily,
    c: DecoderConfig,
    what: str = "reading weights",
    only: Collection[str] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The network's tensors by our names, in its order, one at a time.

    Args:
        family: whose names the folder has.
        what: shown as progress.
        only: which of them to read; None for all.

    Raises: CheckpointError as `check`.
    """
    weights = WeightFolder(folder)
    check(weights, hf_shapes(c, family))
    names = [n for n in hf_shapes(c) if only is None or n in only]
    for name in progress(names, what):
        yield name, join(weights, name, family, c)


def fill(parts: Mapping[str, Part], folder: str | Path, family: ModelFamily, c: DecoderConfig) -> None:
    """Copy weights into this process's `parts` (ours by name), as `stream` reads them."""
    for name, tensor in stream(folder, family, c, only=parts):
        parts[name].take(tensor)
