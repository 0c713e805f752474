"""Weights on disk → the network, one tensor at a time: safetensors, or foreign `.bin` by the restricted reader."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from xtuner.core.errors import CheckpointError
from xtuner.core.files import read_json
from xtuner.core.log import progress
from xtuner.model.decoder import DecoderConfig
from xtuner.model.families import hf_names, join

INDEX = "model.safetensors.index.json"


class WeightFolder:
    """All tensors of a folder by name, read when asked for.

    Takes `model.safetensors.index.json` with its shards, else `*.safetensors`, else `pytorch_model*.bin`.
    Raises: CheckpointError if there are none, or the index names files that are not there.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._open: dict[str, Any] = {}
        names = self._indexed() or sorted(p.name for p in self.folder.glob("*.safetensors"))
        self._files = names or sorted(p.name for p in self.folder.glob("pytorch_model*.bin"))
        if not self._files:
            raise CheckpointError(
                "no weights in the folder",
                where=str(self.folder),
                do="it should hold model.safetensors, or shards with model.safetensors.index.json",
            )

    def _indexed(self) -> list[str]:
        index = self.folder / INDEX
        if not index.is_file():
            return []
        names = sorted(set(read_json(index)["weight_map"].values()))
        for name in names:
            if name != Path(name).name:
                raise CheckpointError(f"the index names a file outside its folder: {name!r}", where=str(index))
            if not (self.folder / name).is_file():
                raise CheckpointError(f"the index names {name}, which is missing", where=str(index))
        return names

    @cached_property
    def file_of(self) -> dict[str, str]:
        """Tensor name → file name."""
        return {tensor: file for file in self._files for tensor in self._handle(file).keys()}  # noqa: SIM118

    def __contains__(self, name: str) -> bool:
        return name in self.file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self.file_of)

    def __getitem__(self, name: str) -> torch.Tensor:
        handle = self._handle(self.file_of[name])
        tensor = handle[name] if isinstance(handle, dict) else handle.get_tensor(name)
        return tensor

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            path = self.folder / file
            try:
                if file.endswith(".safetensors"):
                    self._open[file] = safe_open(path, framework="pt")
                else:
                    from xtuner.core.pickles import load_tensors

                    self._open[file] = load_tensors(path)
            except (SafetensorError, OSError) as e:
                raise CheckpointError(f"{file} cannot be read as safetensors: {e}", where=str(path)) from None
        return self._open[file]


@dataclass(frozen=True)
class Part:
    """Elements [begin, begin + len(values)) of a flattened parameter: what one process holds of it."""

    values: torch.Tensor  # [n], a view: writing to it changes the parameter
    begin: int = 0

    @classmethod
    def whole(cls, parameter: torch.Tensor) -> "Part":
        return cls(parameter.data.view(-1))

    @torch.no_grad()
    def take(self, full: torch.Tensor) -> None:
        """Copy this part out of the full parameter, casting to its dtype."""
        self.values.copy_(full.reshape(-1)[self.begin : self.begin + len(self.values)])


def ours(weights: WeightFolder, name: str, layout: str, c: DecoderConfig) -> torch.Tensor:
    """Our tensor `name`, put together from a folder in the given layout."""
    names = hf_names(name, layout)
    absent = [n for n in names if n not in weights]
    if absent:
        raise CheckpointError(
            f"tensor {absent[0]} is missing",
            where=str(weights.folder),
            why="the model would start with a part at random",
            do="check that all shards have arrived and that config.json belongs to them",
        )
    return join([weights[n] for n in names], c)


def stream(
    folder: str | Path,
    shapes: Mapping[str, torch.Size],
    layout: str,
    c: DecoderConfig,
    what: str = "reading weights",
    only: Collection[str] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Our tensors by name, in the order of `shapes`, one at a time.

    Args:
        shapes: of all parameters of the model.
        only: which of them to read; None for all.

    Raises: CheckpointError for tensors that are missing, of another shape, or that the model has no place for.
    """
    weights = WeightFolder(folder)
    known = {n for name in shapes for n in hf_names(name, layout)}
    unknown = [n for n in weights if n not in known and not n.endswith("rotary_emb.inv_freq")]
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} tensors have no place in the model; the first is {unknown[0]}",
            where=str(folder),
            why="config.json describes another network than the weights",
        )
    wanted = {n: s for n, s in shapes.items() if only is None or n in only}
    for name, shape in progress(wanted.items(), what, total=len(wanted)):
        tensor = ours(weights, name, layout, c)
        if tensor.shape != shape:
            raise CheckpointError(
                f"{name} is {list(tensor.shape)} on disk and {list(shape)} by config.json",
                where=str(folder),
            )
        yield name, tensor


def fill(
    parts: Mapping[str, Part], shapes: Mapping[str, torch.Size], folder: str | Path, layout: str, c: DecoderConfig
) -> None:
    """Copy weights into this process's `parts` (ours by name), as `stream` reads them."""
    for name, tensor in stream(folder, shapes, layout, c, only=parts):
        parts[name].take(tensor)
