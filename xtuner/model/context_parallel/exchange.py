"""Sends heads between the ranks that have their tokens and those that compute them, also in the backward.

An exchange is begun by one autograd function and ended by another, so that others compute in between; in the backward
the second one begins it and the first one ends it. What is on its way belongs to a `Turn`, not to the graph.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from xtuner.core.activity import record_progress
from xtuner.model.context_parallel.division import HeadShare, divide_heads, divide_turns

TURNS = 2
Tensors = tuple[torch.Tensor, ...]


class ContextGroup:
    """The ranks that share packs, and which heads each of them computes in each turn.

    Args:
        group: their process group.
        rank: of this process in it.
        divide_queries: whether attention supports queries that are a part of a document.
    """

    def __init__(
        self, group: Any, rank: int, size: int, num_heads: int, num_kv_heads: int, divide_queries: bool = False
    ) -> None:
        self.group, self.rank, self.size = group, rank, size
        shares = divide_heads(num_heads, num_kv_heads, size, divide_queries)
        turns = min(TURNS, max(share.num_keys for share in shares))
        self.turns: list[tuple[HeadShare, ...]] = list(
            zip(*(divide_turns(share, turns) for share in shares), strict=True)
        )


@dataclass
class Arriving:
    """The result of an exchange that has begun."""

    received: torch.Tensor
    sent: torch.Tensor  # kept until it has been sent
    work: Any

    def wait(self) -> torch.Tensor:
        self.work.wait()
        return self.received


class Exchange:
    """Sends heads to the ranks that compute them, and back to the ranks that have the tokens.

    Args:
        rows: tokens that each rank has for each rank's heads, by the rank that has them.
        heads: of each rank.
        ranges: for each rank's heads, the ranges of this rank's piece that it gets; None for the complete piece.
    """

    def __init__(
        self, context: ContextGroup, rows: Sequence[Sequence[int]], heads: Sequence[slice],
        ranges: Sequence[list[tuple[int, int]] | None], head_dim: int,
    ) -> None:  # fmt: skip
        self.context, self.heads, self.ranges, self.head_dim = context, heads, ranges, head_dim
        me = context.rank
        self._shapes = [(n, h.stop - h.start, head_dim) for n, h in zip(rows[me], heads, strict=True)]
        self._by_heads = [n * width * dim for n, width, dim in self._shapes]
        self._shape = sum(r[me] for r in rows), heads[me].stop - heads[me].start, head_dim
        self._by_tokens = [r[me] * self._shape[1] * head_dim for r in rows]

    def to_heads(self, x_nND: torch.Tensor) -> Arriving:
        """Begin to send each rank its heads of this rank's tokens. Receives all tokens of this rank's heads."""
        buffer = x_nND.new_empty(sum(self._by_heads))
        for part, piece in zip(self._parts(buffer), self._pieces(x_nND), strict=True):
            if len(piece) == 1:
                part.copy_(piece[0])
            elif piece:
                torch.cat(piece, out=part)
        return self._begin(buffer, self._by_heads, x_nND.new_empty(self._shape), self._by_tokens)

    def to_tokens(self, x_RHD: torch.Tensor) -> Arriving:
        """Begin to send each rank its tokens of this rank's heads. Receives what `add` adds."""
        return self._begin(x_RHD, self._by_tokens, x_RHD.new_empty(sum(self._by_heads)), self._by_heads)

    def write(self, received: torch.Tensor, x_nND: torch.Tensor) -> None:
        """Write the heads of all ranks into this rank's tokens."""
        for part, pieces in zip(self._parts(received), self._pieces(x_nND), strict=True):
            for piece, value in zip(pieces, part.split([len(p) for p in pieces]), strict=True):
                piece.copy_(value)

    def add(self, received: torch.Tensor, x_nND: torch.Tensor) -> None:
        """Add the heads of all ranks to this rank's tokens: several ranks may have the same head."""
        for part, pieces in zip(self._parts(received), self._pieces(x_nND), strict=True):
            for piece, value in zip(pieces, part.split([len(p) for p in pieces]), strict=True):
                piece.add_(value)

    def _pieces(self, x_nND: torch.Tensor) -> list[list[torch.Tensor]]:
        """Views of what each rank gets."""
        return [
            [x_nND[:, heads]] if ranges is None else [x_nND[a:b, heads] for a, b in ranges]
            for heads, ranges in zip(self.heads, self.ranges, strict=True)
        ]

    def _parts(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        return [part.view(shape) for part, shape in zip(buffer.split(self._by_heads), self._shapes, strict=True)]

    def _begin(self, sent: torch.Tensor, sizes: list[int], received: torch.Tensor, arriving: list[int]) -> Arriving:
        record_progress("exchange of attention heads")
        sent = sent.reshape(-1).contiguous()  # a gradient may be expanded from one number
        work = distributed.all_to_all_single(
            received.view(-1), sent, arriving, sizes, group=self.context.group, async_op=True
        )
        return Arriving(received, sent, work)


class Turn:
    """Exchanges of one turn's heads: q, k and v, the output, and their gradients in the backward.

    Args:
        queries: what each rank's heads get of the queries.
        keys: what they get of keys and values.
    """

    def __init__(self, share: HeadShare, queries: Exchange, keys: Exchange) -> None:
        self.share, self.queries, self.keys = share, queries, keys
        self._arriving: list[Arriving] = []  # between the two autograd functions that begin and end an exchange

    def begin(self, *arriving: Arriving) -> None:
        assert not self._arriving
        self._arriving = list(arriving)

    def end(self) -> Tensors:
        found, self._arriving = [a.wait() for a in self._arriving], []
        return tuple(found)

    def send(self, q_nND: torch.Tensor, k_nKD: torch.Tensor, v_nKD: torch.Tensor) -> None:
        self.begin(self.queries.to_heads(q_nND), self.keys.to_heads(k_nKD), self.keys.to_heads(v_nKD))


class BeginQKV(torch.autograd.Function):
    """Begin to send q, k and v of all turns. The backward waits for their gradients."""

    @staticmethod
    def forward(ctx: Any, turns: Sequence[Turn], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Tensors:
        ctx.turns = turns
        ctx.shapes, ctx.like = (q.shape, k.shape, v.shape), q.new_empty(())
        for turn in turns:
            turn.send(q, k, v)
        return tuple(q.new_empty(()) for _ in turns)  # what arrives belongs to the turn

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dq = ctx.like.new_empty(ctx.shapes[0])
        dk, dv = (torch.zeros(shape, dtype=torch.float32, device=dq.device) for shape in ctx.shapes[1:])
        for turn in reversed(ctx.turns):
            q_part, k_part, v_part = turn.end()
            turn.queries.write(q_part, dq)
            turn.keys.add(k_part, dk)
            turn.keys.add(v_part, dv)
        return None, dq, dk.to(dq.dtype), dv.to(dq.dtype)


class EndQKV(torch.autograd.Function):
    """Wait for q, k and v of one turn. The backward begins to send their gradients."""

    @staticmethod
    def forward(ctx: Any, turn: Turn, begun: torch.Tensor) -> Tensors:
        ctx.turn = turn
        return turn.end()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        turn, (dq, dk, dv) = ctx.turn, grads
        turn.begin(turn.queries.to_tokens(dq), turn.keys.to_tokens(dk), turn.keys.to_tokens(dv))
        return None, dq.new_empty(())


class BeginOutput(torch.autograd.Function):
    """Begin to send the output of one turn. The backward waits for its gradient."""

    @staticmethod
    def forward(ctx: Any, turn: Turn, o_RHD: torch.Tensor) -> torch.Tensor:
        ctx.turn = turn
        turn.begin(turn.queries.to_tokens(o_RHD))
        return o_RHD.new_empty(())

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *ctx.turn.end()


class EndOutput(torch.autograd.Function):
    """Wait for the output of all turns, [n, N, D]. The backward begins to send its gradient."""

    @staticmethod
    def forward(ctx: Any, turns: Sequence[Turn], shape: tuple[int, ...], *begun: torch.Tensor) -> torch.Tensor:
        ctx.turns = turns
        return write_output(turns, begun[0].new_empty(shape))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        for turn in reversed(ctx.turns):
            turn.begin(turn.queries.to_heads(grads[0]))
        return None, None, *(grads[0].new_empty(()) for _ in ctx.turns)


def write_output(turns: Sequence[Turn], o_nND: torch.Tensor) -> torch.Tensor:
    for turn in turns:
        (received,) = turn.end()
        turn.queries.write(received, o_nND)
    return o_nND
