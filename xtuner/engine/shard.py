"""What one process holds of weights and optimizer state, and how it comes into a checkpoint and back.

Every strategy cuts a flattened parameter into consecutive ranges of elements, one a rank, maybe empty. A checkpoint
keeps the optimizer's ranges as they are, each with where it begins, and weights whole. So one layout serves all
strategies: a checkpoint of one resumes under any other, on any number of ranks.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from xtuner.core.errors import CheckpointError
from xtuner.core.files import read_json
from xtuner.core.hub import INDEX
from xtuner.core.log import progress
from xtuner.data.batch import Batch
from xtuner.dist.mesh import Mesh
from xtuner.engine.host import HostCopy
from xtuner.engine.memory import Memory
from xtuner.engine.snapshot import Snapshot, divide, file_names
from xtuner.model.decoder import DecoderConfig
from xtuner.model.families import layout_of, write_config
from xtuner.model.weights import Part, fill


@dataclass(frozen=True)
class Shard:
    """This process's part of one parameter: fp32 master and optimizer state."""

    master: Part
    state: Mapping[str, torch.Tensor]  # by the optimizer's key, in the packed form of trial.py: [n] is the master's n


class ShardedStrategy(ABC):
    """What strategies have in common: snapshots and restores of a model whose parameters are cut over the mesh.

    Args:
        shapes: of all parameters, by name, the same on every rank.
        device: where ranks exchange tensors.
        gives: False on ranks whose parts others hold, too (hybrid sharding): those others save them.
    """

    memory: Memory

    def __init__(
        self,
        config: DecoderConfig,
        shapes: Mapping[str, torch.Size],
        device: torch.device,
        mesh: Mesh,
        gives: bool = True,
    ) -> None:
        self.device = device
        self._config, self._shapes, self._gives, self.mesh = config, shapes, gives, mesh
        groups = divide({n: 4 * s.numel() for n, s in shapes.items()})
        self._files = dict(zip(file_names("weights/model", len(groups)), groups, strict=True))
        self._mine = dict(list(self._files.items())[mesh.rank :: mesh.size])  # weight files this rank writes
        self._host = HostCopy(pinned=device.type == "cuda")

    def parts(self, batch: Sequence[Batch]) -> list[int]:
        return [self.memory.parts(pack) for pack in batch]

    @abstractmethod
    def _shards(self) -> dict[str, Shard]:
        """What this process holds, by parameter."""

    @abstractmethod
    def _place(self, name: str, key: str, value: torch.Tensor) -> None:
        """Make `value`, packed, the optimizer's state `key` of a parameter; [n] are this process's part."""

    @abstractmethod
    def _refresh(self) -> None:
        """Bring new masters to where the network computes from, and forget gradients: they are of other weights."""

    def _span(self, key: str, master: Part) -> tuple[int, int]:
        """(begin, end) of this process's elements of an optimizer state, whose other elements other ranks hold."""
        return master.begin, master.begin + len(master.values)

    def reserve(self, optimizer: bool) -> None:
        """Begin to take host memory for snapshots, beside training; after the first step, which makes the state."""
        weights = {n: torch.empty(self._shapes[n], device="meta") for names in self._mine.values() for n in names}
        self._host.reserve(weights | (_states(self._shards()) if optimizer and self._gives else {}))

    def snapshot(self, optimizer: bool) -> Snapshot:
        shards = self._shards() if self._gives else {}
        weights = self._copy_weights(shards)
        files = {file: {n: weights[n] for n in names} for file, names in self._mine.items()}
        snapshot = Snapshot(files, self._texts() if self.mesh.is_main else {})
        if optimizer and self._gives:  # also a state of nothing: it differs from a checkpoint without one
            states = self._host.of(_states(shards))
            groups = divide({n: t.nbytes for n, t in states.items()})
            names = file_names(f"optimizer/rank_{self.mesh.rank:05d}", len(groups))
            for file, group in zip(names, groups, strict=True):
                begins = {n: shards[_parameter(n)].master.begin for n in group}
                snapshot.tensors[file] = {n: states[n] for n in group}
                snapshot.metadata[file] = {"begins": json.dumps(begins, sort_keys=True)}
        return snapshot

    def _copy_weights(self, shards: Mapping[str, Shard]) -> dict[str, torch.Tensor]:
        """The whole parameters that this rank writes. Bits are summed as integers: exact, zeros keep their sign."""
        if self.mesh.size == 1:
            return {n: self._host.of({n: shards[n].master.read().view(s)})[n] for n, s in self._shapes.items()}
        held: dict[str, torch.Tensor] = {}
        for i, names in enumerate(self._files.values()):
            writer = i % self.mesh.size
            for name in names:
                bits = torch.zeros(self._shapes[name].numel(), dtype=torch.int32, device=self.device)
                if name in shards:
                    part = shards[name].master
                    bits[part.begin : part.begin + len(part.values)] = part.read().view(torch.int32)
                self.mesh.ranks.reduce(bits, writer)
                if writer == self.mesh.rank:
                    held |= self._host.of({name: bits.view(torch.float32).view(self._shapes[name])})
        return held

    def _texts(self) -> dict[str, Any]:
        texts: dict[str, Any] = {"weights/config.json": write_config(self._config, "internlm2", torch.float32)}
        if len(self._files) > 1:
            weight_map = {n: Path(f).name for f, names in self._files.items() for n in names}
            total = 4 * sum(s.numel() for s in self._shapes.values())
            texts[f"weights/{INDEX}"] = {"metadata": {"total_size": total}, "weight_map": weight_map}
        return texts

    def load_weights(self, folder: Path) -> None:
        layout = layout_of(read_json(folder / "config.json"))
        fill({n: s.master for n, s in self._shards().items()}, folder, layout, self._config)
        self._refresh()

    def load(self, folder: Path) -> None:
        saved = SavedStates(folder)
        shards = self._shards()
        for name, shard in progress(shards.items(), "reading optimizer state", total=len(shards)):
            for key in saved.keys.get(name, ()):
                self._place(name, key, saved.read(f"{key}/{name}", *self._span(key, shard.master), self.device))
        self.load_weights(folder / "weights")


class SavedStates:
    """The optimizer state in a checkpoint, of whatever strategy and number of ranks.

    Raises: CheckpointError if there is none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.keys: dict[str, list[str]] = {}  # parameter → the optimizer's keys, as `exp_avg`
        self._pieces: dict[str, list[tuple[int, int, Any]]] = {}  # name → (begin, elements, open file)
        self._whole: dict[str, torch.Tensor] = {}  # name → a scalar, or a value of a shape of its own
        files = sorted(folder.glob("optimizer/rank_*.safetensors"))
        for file in files:
            try:
                tensors = safe_open(file, framework="pt")
                begins = json.loads((tensors.metadata() or {})["begins"])
                shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
            except (SafetensorError, OSError, KeyError, ValueError) as e:
                raise CheckpointError(f"{file.name} is no optimizer state of ours: {e}", where=str(file)) from None
            for name, shape in shapes.items():
                if name not in self._pieces and name not in self._whole:
                    self.keys.setdefault(_parameter(name), []).append(name.partition("/")[0])
                if len(shape) == 1:
                    self._pieces.setdefault(name, []).append((begins[name], shape[0], tensors))
                else:
                    self._whole[name] = tensors.get_tensor(name)
        if not files:
            raise CheckpointError(
                "the checkpoint has no optimizer state: it was saved with save_optimizer=False",
                where=str(folder),
                why="a resume would start AdamW's moments anew, and the run would not be the same",
                do=f"start a new run from its weights: load_from = {str(folder)!r}, in another work_dir",
            )

    def read(self, name: str, begin: int, end: int, device: torch.device) -> torch.Tensor:
        """`exp_avg/model.norm.weight`, packed; of what may be cut its elements from `begin` to `end`, on a device."""
        if name in self._whole:
            return self._whole[name].clone()
        found, missing = torch.empty(0), end - begin
        for at, count, tensors in self._pieces[name]:
            first, last = max(at, begin), min(at + count, end)
            if first < last:
                piece = tensors.get_slice(name)[first - at : last - at]
                if not len(found):
                    found = torch.empty(end - begin, dtype=piece.dtype, device=device)
                found[first - begin : last - begin] = piece
                missing -= last - first
        if missing:
            raise CheckpointError(
                f"{missing:,} elements of the optimizer state {name} are missing",
                where=str(self.folder / "optimizer"),
                why="the run would go on with a part of its state at random",
                do="resume from another checkpoint, or begin a new run from this one's weights with load_from",
            )
        return found


def _states(shards: Mapping[str, Shard]) -> dict[str, torch.Tensor]:
    """`exp_avg/model.norm.weight` → tensor."""
    return {f"{key}/{name}": value for name, shard in shards.items() for key, value in sorted(shard.state.items())}


def _parameter(name: str) -> str:
    return name.partition("/")[2]
