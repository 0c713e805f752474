"""How the ranks of a run are arranged: `dp_replicate × dp_shard × cp × tp`, in this order, the last varying fastest.

    dp_replicate   copies of the model; the state of each is sharded over dp_shard × cp
    dp_shard       ranks over which weights, gradients and optimizer state are sharded
    cp             ranks that share the tokens of one pack
    tp             ranks that share each matrix product; 1, as it is not implemented

Each data-parallel rank (dp_replicate × dp_shard) trains on its own packs. Sums over targets and gradients are taken
over dp and cp. A single process is a mesh of ones, without process groups.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from xtuner.core.errors import ConfigError
from xtuner.dist.collectives import ALL, Ranks, local_world_size


@dataclass(frozen=True)
class Mesh:
    """Args:
    rank: of this process; its coordinates follow from it.
    local_size: ranks on this machine.
    ranks: the group of all ranks, for messages.
    """

    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    rank: int = 0
    local_size: int = 1
    ranks: Ranks = field(default_factory=Ranks, compare=False, repr=False)

    def __post_init__(self) -> None:
        assert self.tp == 1, "tensor parallelism is not implemented"
        assert 0 <= self.rank < self.size

    @property
    def size(self) -> int:
        return self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def dp_size(self) -> int:
        """Ranks with packs of their own."""
        return self.dp_replicate * self.dp_shard

    @property
    def dp_rank(self) -> int:
        return self.rank // (self.cp * self.tp)

    @property
    def cp_rank(self) -> int:
        return self.rank // self.tp % self.cp

    @property
    def shard_size(self) -> int:
        """Ranks over which one copy of the state is sharded."""
        return self.dp_shard * self.cp

    @property
    def shard_rank(self) -> int:
        return self.rank // self.tp % self.shard_size

    @property
    def replica(self) -> int:
        """Index of the copy of the state of which this process has a shard."""
        return self.rank // (self.shard_size * self.tp)

    @cached_property
    def shard_group(self) -> Any:
        """Process group of the ranks with the shards of this copy. A collective: all ranks must call it."""
        each = self.shard_size
        return self._group([list(range(i * each, (i + 1) * each)) for i in range(self.dp_replicate)])

    @cached_property
    def cp_group(self) -> Any:
        """Process group of the ranks that share this rank's packs. A collective: all ranks must call it.

        Always one of its own: in another's, exchanges would wait for the reductions of gradients.
        """
        from torch import distributed

        members = [list(range(i, i + self.cp)) for i in range(0, self.size, self.cp)]
        return distributed.new_subgroups_by_enumeration(members)[0]

    @cached_property
    def replica_group(self) -> Any:
        """Process group of the ranks with the same shard of each copy. A collective: all ranks must call it."""
        return self._group([list(range(i, self.size, self.shard_size)) for i in range(self.shard_size)])

    def _group(self, members: list[list[int]]) -> Any:
        from torch import distributed

        if len(members) == 1:
            return distributed.group.WORLD
        return distributed.new_subgroups_by_enumeration(members)[0]


def make_mesh(fsdp: str | None = None, planned: int | None = None, cp: int = 1) -> Mesh:
    """The mesh of the running processes.

    Args:
        fsdp: "hybrid" for one copy of the state per machine, sharded over its ranks; otherwise one copy is sharded over
            all ranks.
        planned: make the mesh of this many ranks, 8 on each machine, for a dry run; it cannot communicate.
        cp: ranks that share a pack.

    Raises: ConfigError for a hybrid mesh of machines with unequal numbers of ranks, and for ranks that cannot be
        divided into groups of `cp`.
    """
    ranks, size, here = (Ranks(), planned, min(planned, 8)) if planned else (ALL, ALL.size, local_world_size())
    if size % cp:
        raise ConfigError(
            f"sequence_parallel_size = {cp}, and the number of ranks is {size}",
            where="sequence_parallel_size",
            why="every pack is shared by that many ranks",
            do=f"set it to {describe_divisors(size)}, or start a multiple of {cp} processes",
        )
    if fsdp != "hybrid":
        return Mesh(dp_shard=size // cp, cp=cp, rank=ranks.rank, local_size=here, ranks=ranks)
    if size % here:
        raise ConfigError(
            f"{size} ranks cannot be divided into nodes of {here}",
            where="--fsdp hybrid",
            why="every node has one full copy of the model",
            do="start the same number of processes on every node, or use --fsdp full",
        )
    if here % cp:
        raise ConfigError(
            f"sequence_parallel_size = {cp}, and a node has {here} ranks",
            where="--fsdp hybrid",
            why="ranks that share a pack also share one copy of the state, which is a node's",
            do=f"set sequence_parallel_size to {describe_divisors(here)}, or use --fsdp full",
        )
    return Mesh(size // here, here // cp, cp, rank=ranks.rank, local_size=here, ranks=ranks)


def divisors(number: int) -> list[int]:
    """Ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


def describe_divisors(number: int) -> str:
    return " or ".join(map(str, divisors(number)))
