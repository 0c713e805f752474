"""How the ranks of a run are arranged: `dp_replicate × dp_shard × cp × tp`, in this order, the last varying fastest.

    dp_replicate   copies of the model: each holds all of its state, divided over dp_shard × cp
    dp_shard       ranks over which weights, gradients and optimizer state are divided
    cp             ranks that share the tokens of one pack
    tp             ranks that share each matrix product; always 1 until it is built

Data-parallel ranks (dp_replicate × dp_shard) take packs of their own. Sums over targets and gradients go over dp and cp.
A single process is a mesh of ones: it has no process groups.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from xtuner.dist.collectives import ALL, Ranks, local_world_size
from xtuner.core.errors import ConfigError


@dataclass(frozen=True)
class Mesh:
    """Args:
    rank: of this process; its coordinates follow.
    local_size: ranks on this machine.
    ranks: all of them, for messages.
    """

    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    rank: int = 0
    local_size: int = 1
    ranks: Ranks = field(default_factory=Ranks, compare=False, repr=False)

    def __post_init__(self) -> None:
        assert self.tp == 1, "tensor parallelism is not built yet"
        assert 0 <= self.rank < self.size

    @property
    def size(self) -> int:
        return self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def dp_size(self) -> int:
        """Ranks that take packs of their own."""
        return self.dp_replicate * self.dp_shard

    @property
    def dp_rank(self) -> int:
        return self.rank // (self.cp * self.tp)

    @property
    def shard_size(self) -> int:
        """Ranks over which state is divided."""
        return self.dp_shard * self.cp

    @property
    def shard_rank(self) -> int:
        return self.rank // self.tp % self.shard_size

    @property
    def replica(self) -> int:
        """Which copy of the state this process holds a part of."""
        return self.rank // (self.shard_size * self.tp)

    @cached_property
    def shard_group(self) -> Any:
        """The process group of the ranks that hold the other parts of this copy. All ranks must ask for it together."""
        each = self.shard_size
        return self._group([list(range(i * each, (i + 1) * each)) for i in range(self.dp_replicate)])

    @cached_property
    def replica_group(self) -> Any:
        """The process group of the ranks that hold the same part of other copies. All ranks must ask together."""
        return self._group([list(range(i, self.size, self.shard_size)) for i in range(self.shard_size)])

    def _group(self, members: list[list[int]]) -> Any:
        from torch import distributed

        if len(members) == 1:
            return distributed.group.WORLD
        return distributed.new_subgroups_by_enumeration(members)[0]


def make_mesh(fsdp: str | None = None, planned: int | None = None) -> Mesh:
    """The mesh of the processes there are.

    Args:
        planned: of so many, 8 on each machine, in place of those there are: nothing can be sent in it.
        fsdp: "hybrid" to keep a copy of the state on each machine, divided over its ranks; otherwise one copy is
            divided over all ranks.

    Raises: ConfigError for a hybrid mesh of machines with unequal numbers of ranks.
    """
    ranks, size, here = (Ranks(), planned, min(planned, 8)) if planned else (ALL, ALL.size, local_world_size())
    if fsdp != "hybrid":
        return Mesh(dp_shard=size, rank=ranks.rank, local_size=here, ranks=ranks)
    if size % here:
        raise ConfigError(
            f"{size} ranks do not divide into nodes of {here}",
            where="--fsdp hybrid",
            why="every node is to hold one full copy of the model",
            do="start equally many processes on every node, or use --fsdp full",
        )
    return Mesh(size // here, here, rank=ranks.rank, local_size=here, ranks=ranks)
