"""Optimizer state in a checkpoint: N-dimensional slices (offset, shape) of named tensors, readable in any other
slicing.

A file's metadata has the offset of each slice and the shape of its full tensor. A range of elements of a flattened
tensor (ZeRO's) is stored in up to 2·N − 1 slices: `NAME`, `NAME:1`, … Tensors without an offset (scalars, and state
that is not sharded) are the same on all ranks.

Earlier versions stored ranges of flattened tensors with their first element's index; these are read, too.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from xtuner.core.errors import CheckpointError

Numbers = tuple[int, ...]


def range_to_slices(begin: int, end: int, shape: Sequence[int]) -> list[tuple[Numbers, Numbers]]:
    """The slices (offset, shape) that make up elements [begin, end) of a flattened tensor, in their order; a single one
    if the elements are full rows."""
    if begin >= end:
        return []
    if len(shape) == 1:
        return [((begin,), (end - begin,))]
    row, inner = prod(shape[1:]), shape[1:]

    def inside(number: int, first: int, last: int) -> list[tuple[Numbers, Numbers]]:
        return [((number, *offset), (1, *size)) for offset, size in range_to_slices(first, last, inner)]

    top, bottom = -(-begin // row), end // row  # full rows
    if top > bottom:
        return inside(bottom, begin - bottom * row, end - bottom * row)
    full = [((top, *[0] * len(inner)), (bottom - top, *inner))] if top < bottom else []
    above = inside(top - 1, begin - (top - 1) * row, row) if begin < top * row else []
    return [*above, *full, *inside(bottom, 0, end - bottom * row)]


def cut_into_slices(
    name: str, values: torch.Tensor, begin: int, full: Sequence[int]
) -> dict[str, tuple[torch.Tensor, Any]]:
    """Flat `values`, elements from `begin` of a tensor of shape `full`, as a file stores them: key → (slice, facts)."""
    found, at = {}, 0
    for i, (offset, shape) in enumerate(range_to_slices(begin, begin + len(values), full)):
        key = f"{name}:{i}" if i else name
        found[key] = values[at : at + prod(shape)].view(shape), [list(offset), list(full)]
        at += prod(shape)
    return found


@dataclass(frozen=True)
class _Piece:
    """A tensor of a file: the slice at `offset` of a tensor of shape `full`; or, in an old file, a range of a flattened
    tensor from `offset[0]` on, for which `full` is None."""

    key: str
    offset: Numbers
    shape: Numbers
    file: Any  # safe_open
    full: Numbers | None = None

    def slices(self, full: Sequence[int]) -> Iterator[tuple[Numbers, Numbers, int]]:
        """(offset, shape, index of its first element in a flat piece) of the slices that the piece contains."""
        if self.full is not None:
            if self.full == tuple(full):
                yield self.offset, self.shape, 0
            return
        at = 0
        for offset, shape in range_to_slices(self.offset[0], self.offset[0] + self.shape[0], full):
            yield offset, shape, at
            at += prod(shape)

    def read(self, shape: Numbers, at: int, inside: tuple[slice, ...]) -> torch.Tensor:
        values = self.file.get_slice(self.key)
        if self.full is not None:
            found: torch.Tensor = values[inside]
            return found
        row, rows = prod(shape[1:]), inside[0]
        found = values[at + rows.start * row : at + rows.stop * row]
        return found.view(-1, *shape[1:])[(slice(None), *inside[1:])]


class SavedStates:
    """The optimizer state in a checkpoint, of any strategy and mesh.

    Raises: CheckpointError if there is none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.keys: dict[str, list[str]] = {}  # parameter → the optimizer's keys, as `exp_avg`
        self._pieces: dict[str, list[_Piece]] = {}
        self._undivided: dict[str, torch.Tensor] = {}
        files = sorted(folder.glob("optimizer/rank_*.safetensors"))
        for file in files:
            try:
                self._add(safe_open(file, framework="pt"))
            except (SafetensorError, OSError, LookupError, ValueError, TypeError, RecursionError) as e:
                raise CheckpointError(
                    f"{file.name} is not an optimizer state of xtuner: {e}", where=str(file)
                ) from None
        if not files:
            raise CheckpointError(
                "the checkpoint has no optimizer state: it was saved with save_optimizer=False",
                where=str(folder),
                why="a resume would start with new moments, and the run would not be the same",
                do=f"start a new run from its weights: load_from = {str(folder)!r}, in another work_dir",
            )

    def _add(self, file: Any) -> None:
        metadata = file.metadata() or {}
        ranges = json.loads(metadata["begins"]) if "slices" not in metadata else None
        slices = json.loads(metadata["slices"]) if ranges is None else {}
        for key in file.keys():  # noqa: SIM118
            name, shape = key.partition(":")[0], tuple(file.get_slice(key).get_shape())
            if name not in self._pieces and name not in self._undivided:
                self.keys.setdefault(name.partition("/")[2], []).append(name.partition("/")[0])
            if key in slices:
                offset, full = map(_numbers, slices[key])
                if not all(o + n <= m for o, n, m in zip(offset, shape, full, strict=True)):
                    raise ValueError(f"{key} lies at {offset} of {full}")
                piece = _Piece(key, offset, shape, file, full)
            elif ranges is not None and len(shape) == 1:
                piece = _Piece(key, (int(ranges[key]),), shape, file)
            else:
                self._undivided[name] = file.get_tensor(key)
                continue
            self._pieces.setdefault(name, []).append(piece)

    def read(
        self, name: str, offset: Numbers, shape: Numbers, full: Sequence[int], device: torch.device
    ) -> torch.Tensor:
        """The slice at `offset` of `exp_avg/model.norm.weight`, whose shape is `full`, on a device. Nothing else is
        read. A tensor that is not sharded is returned in full."""
        if name in self._undivided:
            return self._undivided[name].clone()
        found, missing = torch.empty(0), prod(shape)
        for piece in self._pieces[name]:
            for begins, sizes, at in piece.slices(full):
                low = [max(a, b) for a, b in zip(offset, begins, strict=True)]
                high = [min(a + n, b + m) for a, n, b, m in zip(offset, shape, begins, sizes, strict=True)]
                if any(a >= b for a, b in zip(low, high, strict=True)):
                    continue
                inside = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, begins, strict=True))
                values = piece.read(sizes, at, inside)
                if not found.numel():
                    found = torch.empty(shape, dtype=values.dtype, device=device)
                found[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset, strict=True))] = values
                missing -= values.numel()
        if missing:
            raise CheckpointError(
                f"{missing:,} elements of the optimizer state {name} are missing",
                where=str(self.folder / "optimizer"),
                why="the run would continue with a part of its state uninitialized",
                do="resume from another checkpoint, or start a new run from this one's weights with load_from",
            )
        return found

    def read_range(self, name: str, begin: int, end: int, full: Sequence[int], device: torch.device) -> torch.Tensor:
        """Elements [begin, end) of the flattened tensor, flat; a tensor that is not sharded in full."""
        if name in self._undivided:
            return self._undivided[name].clone()
        found = [
            self.read(name, offset, shape, full, device).view(-1) for offset, shape in range_to_slices(begin, end, full)
        ]
        return found[0] if len(found) == 1 else torch.cat(found)


def _numbers(values: Any) -> Numbers:
    if not all(type(v) is int and v >= 0 for v in values):
        raise ValueError(f"{values} are not counts")
    return tuple(values)
