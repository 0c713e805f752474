"""The shards of weights and optimizer state on a process, and how they are saved to and loaded from checkpoints.

Every strategy assigns a rank consecutive elements of each flattened parameter, possibly none. A checkpoint contains the
optimizer's state in slices (state/slices.py) and full weights. This layout is the same for all strategies: a checkpoint
of one resumes under any other, on any mesh.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from xtuner.core.errors import ConfigError
from xtuner.core.files import read_json
from xtuner.core.hub import INDEX
from xtuner.core.log import progress
from xtuner.data.loading.batch import Batch
from xtuner.dist.mesh import Mesh
from xtuner.engine.memory import MemoryPlan
from xtuner.engine.state.pinned_copies import HostCopy
from xtuner.engine.state.slices import SavedStates, cut_into_slices
from xtuner.engine.state.snapshot import Snapshot, group_into_files
from xtuner.engine.step_time import context_costs
from xtuner.families import checkpoint_config, find_family
from xtuner.model.adapters.folder import ADAPTER, RECORD
from xtuner.model.context_parallel.exchange import ContextGroup
from xtuner.model.decoder import CausalLM, DecoderConfig
from xtuner.model.parameter_ranges import FlatRange
from xtuner.model.weights import (
    WeightFolder,
    check_shapes,
    fill_weights,
    hf_shapes,
    shard_file_names,
    weight_index,
)
from xtuner.optim.adamw import GROUP, SCALES


@dataclass(frozen=True)
class Shard:
    """This process's shard of a parameter: fp32 master and optimizer state.

    `state` maps the optimizer's keys to values in the packed form of optimizer_traits.py; n is `master`'s length.
    """

    master: FlatRange
    state: Mapping[str, torch.Tensor]


class StatefulStrategy(ABC):
    """The common part of strategies: saving and loading a model whose parameters are sharded over the mesh.

    Args:
        shapes: of all parameters, by name, the same on every rank.
        device: where ranks exchange tensors.
        saves: False on ranks whose shards are saved by others (replicas under hybrid sharding).
        adapter: what a checkpoint records of an adapter and its base model. It then contains trained parameters alone;
            None: all weights.
        trained: names of the trained parameters.
    """

    memory: MemoryPlan
    compute_dtype: torch.dtype
    _frozen: Mapping[str, Any]  # parameters that are not trained: weights in the compute dtype, without state

    def __init__(
        self,
        config: DecoderConfig,
        shapes: Mapping[str, torch.Size],
        device: torch.device,
        mesh: Mesh,
        saves: bool = True,
        adapter: Mapping[str, Any] | None = None,
        trained: Collection[str] = (),
    ) -> None:
        self.device = device
        self._config, self._shapes, self._saves, self.mesh = config, shapes, saves, mesh
        known = hf_shapes(config)
        self._adapter = adapter
        weights = [] if adapter else list(known)
        # parameters of adapters; without the base, also what is trained of it
        self._added = [n for n in shapes if n not in known or (adapter and n in trained)]
        if missing := sorted(known.keys() - shapes.keys()):
            raise ConfigError(
                f"the model has no parameter {missing[0]}",
                where="model",
                why="added modules must not rename the model's own parameters: checkpoints refer to them by name",
            )
        self._files: dict[str, list[str]] = {}
        for prefix, names in (("weights/model", weights), ("adapter/model", self._added)):
            groups = group_into_files({n: 4 * shapes[n].numel() for n in names})
            if names:
                self._files |= zip(shard_file_names(prefix, len(groups)), groups, strict=True)
        self._own_files = dict(list(self._files.items())[mesh.rank :: mesh.size])  # weight files this rank writes
        self._host = HostCopy(pinned=device.type == "cuda")

    @property
    @abstractmethod
    def model(self) -> CausalLM:
        """The network."""

    @cached_property
    def _context(self) -> ContextGroup | None:
        """The ranks that share packs, if any. All ranks call it together."""
        mesh, c = self.mesh, self._config
        if mesh.cp == 1:
            return None
        heads = c.num_heads, c.num_kv_heads
        return ContextGroup(mesh.cp_group, mesh.cp_rank, mesh.cp, *heads, self.model.attends_prefixes)

    def count_micro_batches(self, batch: Sequence[Batch]) -> list[int]:
        return [self.memory.count_micro_batches(pack, self.mesh.cp) for pack in batch]

    def _cut_packs(self, batch: Sequence[Batch], counts: Sequence[int]) -> list[Batch]:
        """This rank's micro-batches of an iteration: `counts` of each pack."""
        mesh = self.mesh
        pieces = [piece for pack, count in zip(batch, counts, strict=True) for piece in pack.split(count)]
        if mesh.cp == 1:
            return pieces
        costs = context_costs(self._config, mesh, self.compute_dtype.itemsize)
        return [piece.share(mesh.cp, mesh.cp_rank, costs) for piece in pieces]

    @abstractmethod
    def _shards(self) -> dict[str, Shard]:
        """This process's shards, by parameter."""

    @abstractmethod
    def _restore_state(self, name: str, key: str, value: torch.Tensor) -> None:
        """Set the optimizer's state `key` of a parameter to `value`, packed; [n] are this process's elements."""

    @abstractmethod
    def _sync_weights(self) -> None:
        """Copy new masters to the compute weights, and reset gradients, which belong to the old weights."""

    def _span(self, key: str, name: str, master: FlatRange) -> tuple[int, int, torch.Size]:
        """(begin, end) of this process's elements of a parameter's optimizer state, and the shape of the full state."""
        shape, begin, end = self._shapes[name], master.begin, master.begin + len(master.values)
        if key in SCALES:
            return begin // GROUP, -(-end // GROUP), torch.Size([-(-shape.numel() // GROUP)])
        return begin, end, shape

    def reserve_host_memory(self, optimizer: bool) -> None:
        """Start to allocate host memory for snapshots. Call it after the first step, which creates the state."""
        weights = {n: torch.empty(self._shapes[n], device="meta") for names in self._own_files.values() for n in names}
        self._host.reserve(weights | (_flatten_states(self._shards()) if optimizer and self._saves else {}))

    def snapshot(self, optimizer: bool) -> Snapshot:
        shards = self._shards() if self._saves else {}
        weights = self._copy_weights(shards)
        files = {file: {n: weights[n] for n in names} for file, names in self._own_files.items()}
        snapshot = Snapshot(files, self._json_files() if self.mesh.is_main else {})
        if optimizer and self._saves:  # also an empty state, which differs from a checkpoint without one
            states = self._host.copy(_flatten_states(shards))
            groups = group_into_files({n: t.nbytes for n, t in states.items()})
            names = shard_file_names(f"optimizer/rank_{self.mesh.rank:05d}", len(groups))
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
        begin, _, full = self._span(key, parameter, shards[parameter].master)
        return cut_into_slices(name, values, begin, full)

    def _copy_weights(self, shards: Mapping[str, Shard]) -> dict[str, torch.Tensor]:
        """The full parameters that this rank writes. Bits are summed as integers: exact, and zeros keep their sign."""
        if self.mesh.size == 1:
            own = [n for names in self._files.values() for n in names]
            return {n: self._host.copy({n: shards[n].master.read().view(self._shapes[n])})[n] for n in own}
        copies: dict[str, torch.Tensor] = {}
        for i, names in enumerate(self._files.values()):
            writer = i % self.mesh.size
            for name in names:
                bits = torch.zeros(self._shapes[name].numel(), dtype=torch.int32, device=self.device)
                if name in shards:
                    part = shards[name].master
                    bits[part.begin : part.begin + len(part.values)] = part.read().view(torch.int32)
                self.mesh.ranks.reduce(bits, writer)
                if writer == self.mesh.rank:
                    copies |= self._host.copy({name: bits.view(torch.float32).view(self._shapes[name])})
        return copies

    def _json_files(self) -> dict[str, Any]:
        config = checkpoint_config(self._config)
        if self._adapter:
            return {f"{ADAPTER}/config.json": config, f"{ADAPTER}/{RECORD}": dict(self._adapter)}
        files_json: dict[str, Any] = {"weights/config.json": config}
        files = {Path(f).name: names for f, names in self._files.items() if f.startswith("weights/")}
        if len(files) > 1:
            total = 4 * sum(self._shapes[n].numel() for names in files.values() for n in names)
            files_json[f"weights/{INDEX}"] = weight_index(files, total)
        return files_json

    def load_weights(self, folder: Path) -> None:
        if self._adapter:
            self._load_adapter(folder)
            self._sync_weights()
            return
        family = find_family(read_json(folder / "config.json"))
        fill_weights({n: s.master for n, s in self._shards().items()}, folder, family, self._config)
        self._sync_weights()

    def _load_adapter(self, folder: Path) -> None:
        wanted = {n: tuple(self._shapes[n]) for n in self._added}
        if not wanted and not folder.exists():
            return
        saved, shards = WeightFolder(folder), self._shards()
        check_shapes(saved, wanted, by="the model")
        for name in wanted.keys() & shards.keys():
            shards[name].master.copy_from(saved[name])

    def load(self, folder: Path) -> None:
        saved = SavedStates(folder)
        shards = self._shards()
        trained = {name: shard for name, shard in shards.items() if name not in self._frozen}
        for name, shard in progress(trained.items(), "reading optimizer state", total=len(trained)):
            for key in saved.keys.get(name, ()):
                span = self._span(key, name, shard.master)
                self._restore_state(name, key, saved.read_range(f"{key}/{name}", *span, self.device))
        if self._adapter:
            self.load_weights(folder / ADAPTER)
            return
        self._load_adapter(folder / ADAPTER)
        self.load_weights(folder / "weights")


def _flatten_states(shards: Mapping[str, Shard]) -> dict[str, torch.Tensor]:
    """`exp_avg/model.norm.weight` → tensor."""
    return {f"{key}/{name}": value for name, shard in shards.items() for key, value in sorted(shard.state.items())}
