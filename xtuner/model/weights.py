"""Weights on disk → the network, one tensor at a time: safetensors, or foreign `.bin` by the restricted reader.

All readers of weights are `WeightSource`s, including those of other tools' checkpoints in `export/sources`.
"""

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
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
from xtuner.model.parameter_ranges import Receiver

Shape = tuple[int, ...]
_PLAIN = {"F16", "BF16", "F32", "F64", *map(str, (torch.float16, torch.bfloat16, torch.float32, torch.float64))}
_COPIES = "consolidated"  # beginning of the names of files with the same weights in another form, if there are others
_COMPUTED = "rotary_emb.inv_freq"  # tensors of older files that follow from config.json


class WeightSource(ABC):
    """Named tensors on disk. Their shapes are available at once; their contents are read on access."""

    path: Path  # for messages

    @property
    @abstractmethod
    def shapes(self) -> Mapping[str, Shape]:
        """Tensor name → shape, in the order of the files."""

    @abstractmethod
    def __getitem__(self, name: str) -> torch.Tensor:
        """A tensor. Do not modify it: it may be a view of the file."""

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)


class WeightFolder(WeightSource):
    """All tensors of a folder by name, read on access.

    Reads `model.safetensors.index.json` with its shards, else `*.safetensors`, else `pytorch_model*.bin`.
    Raises: CheckpointError if there are none, or if a file of the index is missing.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder)
        self._open: dict[str, Any] = {}
        names = self._indexed() or sorted(p.name for p in self.path.glob("*.safetensors"))
        names = [n for n in names if not n.startswith(_COPIES)] or names
        self._files = names or sorted(p.name for p in self.path.glob("pytorch_model*.bin"))
        if not self._files:
            raise CheckpointError(
                "no weights in the folder",
                where=str(self.path),
                do="give a folder with model.safetensors, or with shards and model.safetensors.index.json",
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
                raise CheckpointError(
                    f"the index names {shown}, which is missing",
                    where=str(index),
                    do="complete the copy or download of the folder",
                )
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

    def require_plain(self, names: Collection[str]) -> None:
        """Raises: CheckpointError if one of these tensors does not contain ordinary floating-point numbers."""
        for name in names:
            handle = self._handle(self.file_of[name])
            kind = str(handle[name].dtype) if isinstance(handle, dict) else handle.get_slice(name).get_dtype()
            if kind not in _PLAIN:
                raise CheckpointError(
                    f"{name} contains {kind.removeprefix('torch.')} numbers, which are not ordinary weights",
                    where=str(self.path / self.file_of[name]),
                    why="quantized weights mean other values than their numbers",
                    do="give the model from which it was quantized",
                )

    def __getitem__(self, name: str) -> torch.Tensor:
        handle = self._handle(self.file_of[name])
        tensor: torch.Tensor = handle[name] if isinstance(handle, dict) else handle.get_tensor(name)
        return tensor

    def read_row(self, name: str, row: int) -> torch.Tensor:
        """One row of a tensor; nothing else is read from safetensors."""
        handle = self._handle(self.file_of[name])
        source = handle[name] if isinstance(handle, dict) else handle.get_slice(name)
        found: torch.Tensor = source[row : row + 1]
        return found

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            path = self.path / file
            try:
                check_regular(path)
                if file.endswith(".safetensors"):
                    self._open[file] = safe_open(path, framework="pt")
                else:
                    from xtuner.core.pickles import load_tensors

                    self._open[file] = require_tensors(load_tensors(path), path)
            except (SafetensorError, OSError) as e:
                what = f"{file} cannot be read as safetensors: {getattr(e, 'strerror', None) or e}"
                raise CheckpointError(what, where=str(path), do="complete its copy or download") from None
        return self._open[file]


def require_tensors(value: Any, path: Path) -> dict[str, torch.Tensor]:
    """`value`, if it is a dict of tensors by name. Raises: CheckpointError."""
    if isinstance(value, dict) and value and all(isinstance(name, str) for name in value):
        other = next((name for name, tensor in value.items() if not isinstance(tensor, torch.Tensor)), None)
        if other is None:
            return value
        what = f"{path.name} does not contain weights only: {short_repr(other)} is not a tensor"
    else:
        what = f"{path.name} does not contain tensors by name"
    raise CheckpointError(
        what,
        where=str(path),
        why="a checkpoint in one file is {'state_dict': {name: tensor}} or {name: tensor}",
        do="give the file of the weights",
    )


def find_base_weights(checkpoint: Path) -> Path:
    """The weights folder of a checkpoint. Raises: CheckpointError if it has an adapter, which would be lost."""
    if not (checkpoint / "weights").is_dir() and (checkpoint / "adapter").is_dir():
        raise CheckpointError(
            "the checkpoint has an adapter (LoRA), not all weights of a model",
            where=str(checkpoint / "adapter"),
            do=f"merge it: xtuner convert pth_to_hf CONFIG {checkpoint} HF_DIR --merge --fp32; and give HF_DIR",
        )
    if (checkpoint / "adapter").is_dir():
        raise CheckpointError(
            "the checkpoint has an adapter, which cannot be merged into its weights yet",
            where=str(checkpoint / "adapter"),
            why="without it the weights are those of the model that the adapter was trained on",
            do=f"give {checkpoint / 'weights'} if that is what you want",
        )
    return checkpoint / "weights"


def split_for_family(name: str, tensor: torch.Tensor, family: ModelFamily, c: DecoderConfig) -> dict[str, torch.Tensor]:
    """Our tensor `name` as the tensors of the family's files, by their names."""
    stored, tail = family.stored(name, c), tensor.shape[1:]
    if len(stored) == 1:
        return {stored[0].name: tensor}
    grouped = ((r, tensor.reshape(r.groups, -1, *tail)) for r in stored)
    return {r.name: rows[:, r.begin : r.end].reshape(-1, *tail) for r, rows in grouped}


def join_from_family(
    parts: Mapping[str, torch.Tensor] | WeightSource, name: str, family: ModelFamily, c: DecoderConfig
) -> torch.Tensor:
    """Our tensor `name` from the tensors of the family's files: the inverse of `split_for_family`."""
    tensors = [(r, parts[r.name]) for r in family.stored(name, c)]
    if len(tensors) == 1:
        return tensors[0][1]
    tail = tensors[0][1].shape[1:]
    return torch.cat([t.reshape(r.groups, -1, *tail) for r, t in tensors], dim=1).reshape(-1, *tail)


def hf_shapes(c: DecoderConfig, family: ModelFamily = NATIVE) -> dict[str, Shape]:
    """Names and shapes of the tensors of network `c` in a family's files; by default under our own names."""
    with torch.device("meta"):
        parameters = dict(CausalLM(c).named_parameters())
    parts = [split_for_family(name, p, family, c) for name, p in parameters.items()]
    shapes = {name: tuple(tensor.shape) for part in parts for name, tensor in part.items()}
    stored, total = sum(map(math.prod, shapes.values())), sum(p.numel() for p in parameters.values())
    assert stored == total, f"{family.name}: its files store {stored:,} of {total:,} numbers"
    return shapes


def shard_file_names(prefix: str, count: int) -> list[str]:
    """`PREFIX.safetensors`, or `PREFIX-00001-of-00007.safetensors` and so on."""
    if count == 1:
        return [f"{prefix}.safetensors"]
    return [f"{prefix}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def weight_index(files: Mapping[str, Collection[str]], total_size: int) -> dict[str, Any]:
    """Contents of `model.safetensors.index.json`, from the names of the tensors in each file."""
    weight_map = {name: file for file, names in files.items() for name in names}
    return {"metadata": {"total_size": total_size}, "weight_map": weight_map}


def check_shapes(
    source: WeightSource, wanted: Mapping[str, Shape], by: str = "config.json", unread: tuple[str, ...] = ()
) -> None:
    """Compare names and shapes with those that `by` describes, without reading contents.

    Args:
        unread: beginnings of the names of other tensors that may be there.

    Raises: CheckpointError for tensors that are missing, of another shape, or not in the model.
    """
    unknown = [n for n in source if n not in wanted and not n.endswith(_COMPUTED) and not n.startswith(unread)]
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} tensors are not in the model; the first is {short(unknown[0])}",
            where=str(source.path),
            why=f"the weights do not match {by}",
            do=f"check that {by} belongs to these files: the model's family, its flags of biases and norms",
        )
    for name, shape in wanted.items():
        if name not in source:
            raise CheckpointError(
                f"tensor {name} is missing",
                where=str(source.path),
                why="a part of the model would be uninitialized",
                do=f"check that all files are there and that {by} belongs to them",
            )
        if source.shapes[name] != shape:
            raise CheckpointError(
                f"{name} is {list(source.shapes[name])} on disk and {list(shape)} by {by}",
                where=str(source.path),
                why=f"the weights do not match {by}",
            )


def check_network(source: WeightSource, family: ModelFamily, c: DecoderConfig, by: str = "config.json") -> None:
    """Compare the tensors of a family's files with those of network `c`; see `check_shapes`.

    A tied output layer may be stored in addition to the embedding, if both are equal.
    """
    wanted = hf_shapes(c, family)
    (head,), (embedding,) = (family.stored(f"{name}.weight", c) for name in ("output", "model.tok_embeddings"))
    unread = (*family.unread, head.name) if c.tie_word_embeddings else family.unread
    if head.name in wanted and head.name not in source and "tie_word_embeddings" in family.fields:
        others = {name: shape for name, shape in wanted.items() if name != head.name}
        check_shapes(source, others, by, unread)
        raise CheckpointError(
            f"tensor {head.name} is missing",
            where=str(source.path),
            why=f"by {by} the output layer has its own weight (tie_word_embeddings is false)",
            do="check that all files are there; set tie_word_embeddings to true if the model has one weight for both",
        )
    check_shapes(source, wanted, by, unread)
    if isinstance(source, WeightFolder):
        source.require_plain(wanted)
    if c.tie_word_embeddings and head.name in source and not source[head.name].equal(source[embedding.name]):
        raise CheckpointError(
            f"{head.name} and {embedding.name} differ, but tie_word_embeddings says that they are one weight",
            where=str(source.path),
            why="one of the two would be ignored",
            do="set tie_word_embeddings to false in config.json if the model was trained with two weights",
        )


def stream_weights(
    folder: str | Path,
    family: ModelFamily,
    c: DecoderConfig,
    what: str = "reading weights",
    only: Collection[str] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The network's tensors by our names, in the network's order, one at a time.

    Args:
        family: the family whose names the folder has.
        what: label of the progress bar.
        only: which tensors to read; None for all.

    Raises: CheckpointError, see `check_shapes`.
    """
    weights = WeightFolder(folder)
    check_network(weights, family, c)
    names = [n for n in hf_shapes(c) if only is None or n in only]
    for name in progress(names, what):
        yield name, join_from_family(weights, name, family, c)


def fill_weights(
    parts: Mapping[str, Receiver], folder: str | Path, family: ModelFamily, c: DecoderConfig, added_rows: int = 0
) -> None:
    """Copy weights into this process's `parts`, by our names.

    Args:
        added_rows: of `c`'s vocabulary that the folder lacks; they become the mean of its other rows.
    """
    stored = replace(c, vocab_size=c.vocab_size - added_rows)
    for name, tensor in stream_weights(folder, family, stored, only=parts):
        if added_rows and name in ("model.tok_embeddings.weight", "output.weight"):
            mean = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
            tensor = torch.cat([tensor, mean.expand(added_rows, -1)])
        parts[name].copy_from(tensor)
