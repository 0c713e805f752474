"""What one process holds of weights and optimizer state, and how it comes into a checkpoint and back.

Every strategy gives a rank consecutive elements of each flattened parameter, maybe none. A checkpoint keeps the
optimizer's state in slices (state/slices.py), and weights undivided. So one layout serves all strategies: a checkpoint
of one resumes under any other, on any mesh.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from xtuner.core.errors import ConfigError
from xtuner.core.files import read_json
from xtuner.core.hub import INDEX
from xtuner.core.log import progress
from xtuner.data.loading.batch import Batch
from xtuner.dist.mesh import Mesh
from xtuner.engine.memory import Memory
from xtuner.engine.state.pinned_copies import HostCopy
from xtuner.engine.state.slices import SavedStates, cut
from xtuner.engine.state.snapshot import Snapshot, divide, file_names
from xtuner.families import checkpoint_config, find_family
from xtuner.model.decoder import DecoderConfig
from xtuner.model.weights import Part, WeightFolder, check, fill, hf_shapes
from xtuner.optim.adamw import GROUP, SCALES


@dataclass(frozen=True)
class Shard:
    """This process's part of one parameter: fp32 master and optimizer state."""

    master: Part
    state: Mapping[
        str, torch.Tensor
    ]  # by the optimizer's key, in the packed form of optimizer_trial.py: [n] is the master's n


class StatefulStrategy(ABC):
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
        known = hf_shapes(config)
        self._added = [n for n in shapes if n not in known]  # parameters of adapters
        if missing := sorted(known.keys() - shapes.keys()):
            raise ConfigError(
                f"the model has no parameter {missing[0]}",
                where="model",
                why="what is put into a model must leave its own parameters their names: checkpoints go by them",
            )
        self._files: dict[str, list[str]] = {}
        for prefix, names in (("weights/model", list(known)), ("adapter/model", self._added)):
            groups = divide({n: 4 * shapes[n].numel() for n in names})
            if names:
                self._files |= zip(file_names(prefix, len(groups)), groups, strict=True)
        self._mine = dict(list(self._files.items())[mesh.rank :: mesh.size])  # weight files this rank writes
        self._host = HostCopy(pinned=device.type == "cuda")

    def parts(self, batch: Sequence[Batch]) -> list[int]:
        return [self.memory.parts(pack) for pack in batch]

    @staticmethod
    def _cut(batch: Sequence[Batch], counts: Sequence[int]) -> list[Batch]:
        """The micro-batches of an iteration: so many of each pack."""
        return [piece for pack, count in zip(batch, counts, strict=True) for piece in pack.split(count)]

    @abstractmethod
    def _shards(self) -> dict[str, Shard]:
        """What this process holds, by parameter."""

    @abstractmethod
    def _place(self, name: str, key: str, value: torch.Tensor) -> None:
        """Make `value`, packed, the optimizer's state `key` of a parameter; [n] are this process's part."""

    @abstractmethod
    def _refresh(self) -> None:
        """Bring new masters to where the network computes from, and forget gradients: they are of other weights."""

    def _span(self, key: str, name: str, master: Part) -> tuple[int, int, torch.Size]:
        """(begin, end) of this process's elements of a parameter's optimizer state, and the shape of the full state."""
        shape, begin, end = self._shapes[name], master.begin, master.begin + len(master.values)
        if key in SCALES:
            return begin // GROUP, -(-end // GROUP), torch.Size([-(-shape.numel() // GROUP)])
        return begin, end, shape

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
                snapshot.tensors[file] = {n: states[n] for n in group if states[n].dim() != 1}
                divided = [self._slices(n, states[n], shards) for n in group if states[n].dim() == 1]
                slices = {key: piece for pieces in divided for key, piece in pieces.items()}
                snapshot.tensors[file] |= {key: values for key, (values, _) in slices.items()}
                facts = {key: facts for key, (_, facts) in slices.items()}
                snapshot.metadata[file] = {"slices": json.dumps(facts, sort_keys=True)}
        return snapshot

    def _slices(self, name: str, values: torch.Tensor, shards: Mapping[str, Shard]) -> dict[str, Any]:
        key, _, parameter = name.partition("/")
        begin, _, of = self._span(key, parameter, shards[parameter].master)
        return cut(name, values, begin, of)

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
        texts: dict[str, Any] = {"weights/config.json": checkpoint_config(self._config)}
        files = {f: names for f, names in self._files.items() if f.startswith("weights/")}
        if len(files) > 1:
            weight_map = {n: Path(f).name for f, names in files.items() for n in names}
            total = 4 * sum(self._shapes[n].numel() for n in weight_map)
            texts[f"weights/{INDEX}"] = {"metadata": {"total_size": total}, "weight_map": weight_map}
        return texts

    def load_weights(self, folder: Path) -> None:
        family = find_family(read_json(folder / "config.json"))
        fill({n: s.master for n, s in self._shards().items()}, folder, family, self._config)
        self._refresh()

    def _load_adapter(self, folder: Path) -> None:
        wanted = {n: tuple(self._shapes[n]) for n in self._added}
        if not wanted and not folder.exists():
            return
        saved, shards = WeightFolder(folder), self._shards()
        check(saved, wanted, by="the model")
        for name in wanted.keys() & shards.keys():
            shards[name].master.take(saved[name])

    def load(self, folder: Path) -> None:
        saved = SavedStates(folder)
        shards = self._shards()
        for name, shard in progress(shards.items(), "reading optimizer state", total=len(shards)):
            for key in saved.keys.get(name, ()):
                span = self._span(key, name, shard.master)
                self._place(name, key, saved.read_range(f"{key}/{name}", *span, self.device))
        self._load_adapter(folder / "adapter")
        self.load_weights(folder / "weights")


def _states(shards: Mapping[str, Shard]) -> dict[str, torch.Tensor]:
    """`exp_avg/model.norm.weight` → tensor."""
    return {f"{key}/{name}": value for name, shard in shards.items() for key, value in sorted(shard.state.items())}
