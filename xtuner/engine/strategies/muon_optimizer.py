"""Muon's step where matrices are sharded: each is orthogonalized by one rank, and every rank updates its own rows.

    round      0        1        2            a rank's matrices in the order of their size; ranks have about equal FLOPs
    rank 0   ▓▓▓▓▓▓▓▓ ▓▓▓▓▓▓▓▓ ▓▓
    rank 1   ▓▓▓▓▓▓▓▓ ▓▓▓▓▓▓▓▓ ▓▓             1. all ranks send rows of the update to the matrix's rank
    rank 2   ▓▓▓▓▓▓▓▓ ▓▓▓▓▓    ▓▓             2. it orthogonalizes the matrix
    rank 3   ▓▓▓▓▓▓▓▓ ▓▓▓▓▓    ▓▓             3. it sends the rows of the result back

Rows are sent in the dtype of the orthogonalization, bf16 on GPUs: 4 bytes a parameter in all, each of them once. The
rows of the next round arrive, and the results of the last one are sent, while a matrix is computed.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import distributed

from xtuner.dist.mesh import Mesh
from xtuner.engine.state.shards import Shard
from xtuner.engine.strategies.local_optimizer import EncodedRange, OwnAdamW, Rows, Tensors, compute_norm, read_clip
from xtuner.engine.strategies.sharded_parameters import rows_per_rank
from xtuner.families.network import DecoderConfig
from xtuner.optim import muon as rules
from xtuner.optim.adamw import make_seed
from xtuner.optim.optim_wrapper import OptimWrapper

Shapes = Mapping[str, torch.Size]


def assign_matrices(costs: Mapping[str, float], ranks: int) -> list[list[str]]:
    """Each rank's matrices, the largest first: every next one goes to the rank with the least to do."""
    assigned: list[list[str]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        rank = load.index(min(load))
        assigned[rank].append(name)
        load[rank] += costs[name]
    return assigned


class MatrixExchange:
    """
    Args:
        shapes: of all matrices.
        assigned: names of each shard rank's matrices.
        dtype: in which rows are sent.
    """

    def __init__(
        self, shapes: Shapes, assigned: list[list[str]], mesh: Mesh, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._shapes, self._assigned, self._mesh = shapes, assigned, mesh
        self._dtype, self._device = dtype, device
        self._rounds = max(map(len, assigned))
        self._group = mesh.shard_group if mesh.shard_size > 1 else None

    def map_matrices(
        self, rows_of: Callable[[str], torch.Tensor], compute: Callable[[str, torch.Tensor], torch.Tensor]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """This rank's rows, flat, of `compute(name, matrix)` for each matrix of which every rank has `rows_of(name)`.

        Every shard rank calls it together.
        """
        if self._group is None:
            for name in self._assigned[0]:
                yield name, compute(name, rows_of(name).view(self._shapes[name])).view(-1)
            return
        finish: Callable[[], Iterator[tuple[str, torch.Tensor]]] = lambda: iter(())  # noqa: E731
        arrives = self._send_rows(0, rows_of)
        for i in range(self._rounds):
            now = arrives
            if i + 1 < self._rounds:
                arrives = self._send_rows(i + 1, rows_of)
            matrix, name = now(), self._name(self._mesh.shard_rank, i)
            result = compute(name, matrix.view(self._shapes[name])).view(-1) if name else matrix
            finish_last, finish = finish, self._return_rows(i, result)
            yield from finish_last()
        yield from finish()

    def _name(self, rank: int, i: int) -> str:
        """A rank's matrix of round `i`; "" for none."""
        return self._assigned[rank][i] if i < len(self._assigned[rank]) else ""

    def _count(self, rank: int, name: str) -> int:
        """Elements of a matrix on a rank."""
        if not name:
            return 0
        rows, columns = self._shapes[name]
        each = rows_per_rank(self._shapes[name], self._mesh.shard_size)
        return max(0, min(each, rows - rank * each)) * columns

    def _counts(self, i: int) -> tuple[list[int], list[int]]:
        """In round `i`: this rank's elements of each rank's matrix; each rank's elements of this rank's matrix."""
        ranks, me = range(self._mesh.shard_size), self._mesh.shard_rank
        return [self._count(me, self._name(r, i)) for r in ranks], [self._count(r, self._name(me, i)) for r in ranks]

    def _send_rows(self, i: int, rows_of: Callable[[str], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """Start to send rows of each rank's matrix of round `i`. Returns what waits for this rank's, flat."""
        mine, parts = self._counts(i)
        names = [self._name(r, i) for r in range(self._mesh.shard_size)]
        rows = [rows_of(name).view(-1) for name, count in zip(names, mine, strict=True) if count]
        return self._exchange(torch.cat(rows) if rows else self._empty(0), mine, parts)

    def _return_rows(self, i: int, result: torch.Tensor) -> Callable[[], Iterator[tuple[str, torch.Tensor]]]:
        """Start to send the result of round `i` back. Returns what waits for this rank's rows of each matrix."""
        mine, parts = self._counts(i)
        wait = self._exchange(result, parts, mine)

        def finish() -> Iterator[tuple[str, torch.Tensor]]:
            for r, rows in enumerate(wait().split(mine)):
                if len(rows):
                    yield self._name(r, i), rows

        return finish

    def _exchange(self, sent: torch.Tensor, counts: list[int], arriving: list[int]) -> Callable[[], torch.Tensor]:
        received = self._empty(sum(arriving))
        work = distributed.all_to_all_single(received, sent, arriving, counts, group=self._group, async_op=True)

        def wait() -> torch.Tensor:
            nonlocal sent
            work.wait()
            del sent  # until here its memory must not be reused
            return received

        return wait

    def _empty(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=self._dtype, device=self._device)


class MuonOptimizer:
    """A `LocalOptimizer`: Muon on matrices of blocks, our own AdamW on this rank's rows of all other parameters.

    Args:
        rows: this rank's rows of trained parameters of which it has any.
        shapes: of all trained parameters, the same on every rank.
    """

    def __init__(
        self, rows: Mapping[str, Rows], shapes: Shapes, optim: OptimWrapper, config: DecoderConfig,
        device: torch.device, mesh: Mesh,
    ) -> None:  # fmt: skip
        assert optim.muon
        form = optim.state_form(device)
        assert form
        self._muon, self._form, self._config, self._optim = optim.muon, form, config, optim
        shapes = {n: s for n, s in shapes.items() if rules.is_matrix(n, s)}
        self._rows = {n: r for n, r in rows.items() if n in shapes}
        self._adamw = OwnAdamW({n: r for n, r in rows.items() if n not in shapes}, optim, form)
        self._state = {n: rules.new_state(r.weight, form) for n, r in self._rows.items()}
        self._steps = 0
        costs = {n: rules.parameter_flops(n, s, self._muon, config) for n, s in shapes.items()}
        self._dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._exchange = MatrixExchange(shapes, assign_matrices(costs, mesh.shard_size), mesh, self._dtype, device)

    def norm(self, gradients: Tensors) -> torch.Tensor:
        return compute_norm(list(gradients.values()))

    def prepare(self, gradients: Tensors) -> None:
        self._adamw.prepare({n: g for n, g in gradients.items() if n not in self._rows})

    @torch.no_grad()
    def apply(self, gradients: Tensors, lr: float, max_norm: float | None, norm: torch.Tensor) -> None:
        others = {n: g for n, g in gradients.items() if n not in self._rows}
        self._adamw.apply(others, lr * self._muon.adamw_scale, max_norm, norm)
        self._steps += 1
        clip = read_clip(max_norm, norm)

        def update_of(name: str) -> torch.Tensor:
            update = rules.update_momentum(gradients[name], clip, self._state[name], self._muon, *self._place(name))
            return update.to(self._dtype)

        def compute(name: str, matrix: torch.Tensor) -> torch.Tensor:
            return rules.orthogonalize_parameter(name, matrix, self._muon, self._config)

        for name, direction in self._exchange.map_matrices(update_of, compute):
            group = self._optim.find_group(name)
            rates = lr * group.lr_scale, rules.weight_decay(self._muon, group)
            weight, state = self._rows[name].weight, self._state[name]
            rules.update_weight(weight, direction, state, self._form, *rates, *self._place(name))

    def _place(self, name: str) -> tuple[int, int]:
        """Seed of this step's random bits, and the index of this rank's first element."""
        return make_seed(name, self._steps), self._rows[name].begin

    def shards(self) -> dict[str, Shard]:
        shards, step = self._adamw.shards(), torch.tensor(float(self._steps))
        for name, rows in self._rows.items():
            state = self._state[name]
            master = EncodedRange(rows.weight.data.view(-1), rows.begin, state=state, form=self._form)
            shards[name] = Shard(master, {"step": step, "momentum_buffer": state["momentum_buffer"]})
        return shards

    def restore_state(self, name: str, key: str, value: torch.Tensor) -> None:
        if name not in self._rows:
            self._adamw.restore_state(name, key, value)
        elif key == "step":
            self._steps = int(value)
        else:
            self._state[name][key].copy_(value)

    def sync_weights(self) -> None:
        pass  # writing a master has already written the weight
