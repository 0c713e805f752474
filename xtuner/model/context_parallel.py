"""Attention of documents that several ranks share (context parallelism): ranks exchange heads for tokens.

    before    rank r has its piece of the S shared tokens: q [n, N, D], k and v [n, K, D]
    exchange  every rank sends the heads of rank d to rank d
    after     rank r has all S tokens of its own heads; attention needs nothing else
    and back  the output's heads return to the ranks that have the tokens: o [n, N, D]

Attention is divided evenly by heads, whatever the pieces. Each rank has complete groups of query heads with their
key-value head; with more ranks than key-value heads, several ranks receive a copy of one, with a part of its query
heads. If heads do not divide evenly, some ranks have one more than others. The heads of a rank are exchanged in up to
two turns, so that one is computed while the other is sent.

    S shared tokens   n of them on this rank   T row of this rank   N query heads   K kv heads   D head dim
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import distributed

from xtuner.data.loading.batch import SharedTokens
from xtuner.model.ops.attention_backends import Attend
from xtuner.model.ops.autograd_functions import recompute_saved, set_recipe

TURNS = 2
Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class HeadShare:
    """The heads that one rank computes in one turn: all queries belong to the key-value heads evenly."""

    queries: slice
    keys: slice

    @property
    def num_queries(self) -> int:
        return self.queries.stop - self.queries.start

    @property
    def num_keys(self) -> int:
        return self.keys.stop - self.keys.start

    @property
    def width(self) -> int:
        """Heads of q, k and v."""
        return self.num_queries + 2 * self.num_keys


def divide_heads(num_heads: int, num_kv_heads: int, ranks: int) -> list[HeadShare]:
    """The heads of each rank, about equally many. With more ranks than query heads some have none."""
    groups = num_heads // num_kv_heads
    if ranks <= num_kv_heads:
        keys = _cut(0, num_kv_heads, ranks)
        return [HeadShare(slice(k.start * groups, k.stop * groups), k) for k in keys]
    found = []
    for kv, copies in enumerate(_cut(0, ranks, num_kv_heads)):
        for queries in _cut(kv * groups, (kv + 1) * groups, copies.stop - copies.start):
            none = queries.start == queries.stop
            found.append(HeadShare(queries, slice(kv, kv if none else kv + 1)))
    return found


def _cut(begin: int, end: int, parts: int) -> list[slice]:
    """[begin, end) in parts whose lengths differ by at most one, the longer ones first."""
    size, more = divmod(end - begin, parts)
    borders = [begin + i * size + min(i, more) for i in range(parts + 1)]
    return [slice(a, b) for a, b in pairwise(borders)]


def divide_turns(share: HeadShare, turns: int) -> list[HeadShare]:
    """A rank's heads in turns of complete key-value heads; later turns may be empty."""
    if not share.num_keys:
        return [share] * turns
    groups = share.num_queries // share.num_keys
    first = share.queries.start - share.keys.start * groups
    return [
        HeadShare(slice(first + k.start * groups, first + k.stop * groups), k)
        for k in _cut(share.keys.start, share.keys.stop, turns)
    ]


class ContextGroup:
    """The ranks that share packs, and which heads each of them computes in each turn.

    Args:
        group: their process group.
        rank: of this process in it.
    """

    def __init__(self, group: Any, rank: int, size: int, num_heads: int, num_kv_heads: int) -> None:
        self.group, self.rank, self.size = group, rank, size
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        shares = divide_heads(num_heads, num_kv_heads, size)
        turns = min(TURNS, max(share.num_keys for share in shares))
        self.turns: list[tuple[HeadShare, ...]] = list(
            zip(*(divide_turns(share, turns) for share in shares), strict=True)
        )

    @property
    def all_have_heads(self) -> bool:
        return all(share.num_keys for turn in self.turns for share in turn)

    @property
    def largest_share(self) -> float:
        """Share of the query heads that the busiest rank computes."""
        each = [sum(turn[rank].num_queries for turn in self.turns) for rank in range(self.size)]
        return max(each) / self.num_heads


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
        pieces: shared tokens of each rank; their sum is S.
        widths: heads of each rank.
    """

    def __init__(self, context: ContextGroup, pieces: Sequence[int], widths: Sequence[int], head_dim: int) -> None:
        self.context, self.pieces, self.widths, self.head_dim = context, pieces, widths, head_dim
        self._by_heads = [pieces[context.rank] * width * head_dim for width in widths]
        self._by_tokens = [piece * widths[context.rank] * head_dim for piece in pieces]

    def new_parts(self, like: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """A buffer of this rank's tokens with all ranks' heads, and each rank's part of it, [n, width, D]."""
        buffer = like.new_empty(sum(self._by_heads))
        return buffer, self.parts(buffer)

    def parts(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        count = self.pieces[self.context.rank]
        split = zip(buffer.split(self._by_heads), self.widths, strict=True)
        return [part.view(count, width, self.head_dim) for part, width in split]

    def to_heads(self, buffer: torch.Tensor) -> Arriving:
        """Begin to send each rank its part of `buffer`. Receives all tokens of this rank's heads, [S, width, D]."""
        shape = sum(self.pieces), self.widths[self.context.rank], self.head_dim
        return self._begin(buffer, self._by_heads, buffer.new_empty(shape), self._by_tokens)

    def to_tokens(self, x_SWD: torch.Tensor) -> Arriving:
        """Begin to send each rank its tokens. Receives this rank's tokens of all heads, a buffer for `parts`."""
        return self._begin(x_SWD, self._by_tokens, x_SWD.new_empty(sum(self._by_heads)), self._by_heads)

    def _begin(self, sent: torch.Tensor, sizes: list[int], received: torch.Tensor, arriving: list[int]) -> Arriving:
        work = distributed.all_to_all_single(
            received.view(-1), sent.reshape(-1), arriving, sizes, group=self.context.group, async_op=True
        )
        return Arriving(received, sent, work)


class Turn:
    """Exchanges of one turn's heads: q, k and v, the output, and their gradients in the backward."""

    def __init__(
        self, context: ContextGroup, shares: Sequence[HeadShare], pieces: Sequence[int], head_dim: int
    ) -> None:
        self.context, self.shares = context, shares
        self.mine = shares[context.rank]
        self._qkv = Exchange(context, pieces, [share.width for share in shares], head_dim)
        self._out = Exchange(context, pieces, [share.num_queries for share in shares], head_dim)
        self.arriving: Arriving | None = None  # between the two autograd functions that begin and end an exchange

    def send_qkv(self, q_nND: torch.Tensor, k_nKD: torch.Tensor, v_nKD: torch.Tensor) -> Arriving:
        buffer, parts = self._qkv.new_parts(q_nND)
        for share, part in zip(self.shares, parts, strict=True):
            torch.cat((q_nND[:, share.queries], k_nKD[:, share.keys], v_nKD[:, share.keys]), 1, out=part)
        return self._qkv.to_heads(buffer)

    def split_qkv(self, received: torch.Tensor) -> Tensors:
        """q, k and v of this rank's heads, contiguous."""
        sizes = [self.mine.num_queries, self.mine.num_keys, self.mine.num_keys]
        return tuple(x.contiguous() for x in received.split(sizes, 1))

    def send_qkv_gradients(self, *grads: torch.Tensor) -> Arriving:
        return self._qkv.to_tokens(torch.cat(grads, 1))

    def add_qkv_gradients(self, buffer: torch.Tensor, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor) -> None:
        """Write a turn's gradients; those of a key-value head that several ranks have are added."""
        for share, part in zip(self.shares, self._qkv.parts(buffer), strict=True):
            dq_part, dk_part, dv_part = part.split([share.num_queries, share.num_keys, share.num_keys], 1)
            dq[:, share.queries] = dq_part
            dk[:, share.keys] += dk_part
            dv[:, share.keys] += dv_part

    def send_output(self, o_SND: torch.Tensor) -> Arriving:
        return self._out.to_tokens(o_SND)

    def write_output(self, buffer: torch.Tensor, o_nND: torch.Tensor) -> None:
        for share, part in zip(self.shares, self._out.parts(buffer), strict=True):
            o_nND[:, share.queries] = part

    def send_output_gradient(self, d_nND: torch.Tensor) -> Arriving:
        buffer, parts = self._out.new_parts(d_nND)
        for share, part in zip(self.shares, parts, strict=True):
            part.copy_(d_nND[:, share.queries])
        return self._out.to_heads(buffer)

    def take(self) -> torch.Tensor:
        """Wait for the exchange that has begun."""
        assert self.arriving is not None
        received, self.arriving = self.arriving.wait(), None
        return received


class BeginQKV(torch.autograd.Function):
    """Begin to send q, k and v of all turns. The backward waits for their gradients."""

    @staticmethod
    def forward(ctx: Any, turns: Sequence[Turn], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Tensors:
        ctx.turns = turns
        ctx.save_for_backward()
        ctx.shapes, ctx.dtype, ctx.device = (q.shape, k.shape, v.shape), q.dtype, q.device
        for turn in turns:
            turn.arriving = turn.send_qkv(q, k, v)
        return tuple(q.new_empty(()) for _ in turns)  # what arrives belongs to the turn

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        copied = sum(share.num_keys for turn in ctx.turns for share in turn.shares) > ctx.shapes[1][1]
        exact = torch.float32 if copied else ctx.dtype
        grads = [torch.empty(ctx.shapes[0], dtype=ctx.dtype, device=ctx.device)]
        grads += [torch.zeros(shape, dtype=exact, device=ctx.device) for shape in ctx.shapes[1:]]
        for turn in reversed(ctx.turns):
            turn.add_qkv_gradients(turn.take(), *grads)
        return None, *(g.to(ctx.dtype) for g in grads)


class EndQKV(torch.autograd.Function):
    """Wait for q, k and v of one turn. The backward begins to send their gradients."""

    @staticmethod
    def forward(ctx: Any, turn: Turn, begun: torch.Tensor) -> Tensors:
        ctx.turn = turn
        return turn.split_qkv(turn.take())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.turn.arriving = ctx.turn.send_qkv_gradients(*grads)
        return None, grads[0].new_empty(())


class BeginOutput(torch.autograd.Function):
    """Begin to send the output of one turn. The backward waits for its gradient."""

    @staticmethod
    def forward(ctx: Any, turn: Turn, o_SND: torch.Tensor) -> torch.Tensor:
        ctx.turn = turn
        turn.arriving = turn.send_output(o_SND)
        return o_SND.new_empty(())

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, ctx.turn.take()


class EndOutput(torch.autograd.Function):
    """Wait for the output of all turns, [n, N, D]. The backward begins to send its gradient."""

    @staticmethod
    def forward(ctx: Any, turns: Sequence[Turn], shape: tuple[int, ...], *begun: torch.Tensor) -> torch.Tensor:
        ctx.turns = turns
        return join_output(turns, begun[0].new_empty(shape))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        for turn in reversed(ctx.turns):
            turn.arriving = turn.send_output_gradient(grads[0])
        return None, None, *(grads[0].new_empty(()) for _ in ctx.turns)


def join_output(turns: Sequence[Turn], o_nND: torch.Tensor) -> torch.Tensor:
    for turn in turns:
        turn.write_output(turn.take(), o_nND)
    return o_nND


@dataclass(frozen=True)
class SharedDocuments:
    """The shared documents of a micro-batch, and the ranks that share them."""

    tokens: SharedTokens
    context: ContextGroup

    @property
    def count(self) -> int:
        """Tokens in this rank's piece."""
        return self.tokens.pieces[self.context.rank]

    def begin_turns(self, head_dim: int) -> list[Turn]:
        return [Turn(self.context, shares, self.tokens.pieces, head_dim) for shares in self.context.turns]

    def attend(
        self, attend: Attend, q_TND: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, cu_seqlens: torch.Tensor,
        max_seqlen: int, project: Callable[[], Tensors] | None,
    ) -> torch.Tensor:  # fmt: skip
        """Attention of a row, [T, N·D]: of this rank's piece of the shared documents, then of its own documents.

        The result carries a recipe, which exchanges the output again: it is kept once, by heads.

        Args:
            cu_seqlens, max_seqlen: of its own documents.
            project: recomputes q, k and v in the backward; None to keep what attention needs.
        """
        count, own_count = self.count, len(q_TND) - self.count
        parts = [x.split([count, own_count]) for x in (q_TND, k_TKD, v_TKD)]
        piece: Any = tuple(p[0] for p in parts)
        own: Any = tuple(p[1] for p in parts)
        turns = self.begin_turns(q_TND.shape[-1])
        begun = BeginQKV.apply(turns, *piece)
        # all ranks must recompute at the same point of the backward, which is attention's by heads
        if project is None or not self.context.all_have_heads:
            context: Any = nullcontext(lambda *_: None)
        else:
            context = recompute_saved(own, lambda: self._recompute(project))
        with context as add:
            own_out = own[0]
            if own_count:  # while heads arrive
                own_out = attend(own[0], own[1], own[2], cu_seqlens, max_seqlen)
            outputs, sent = [], []
            for turn, signal in zip(turns, begun, strict=True):
                q_SND, k_SKD, v_SKD = EndQKV.apply(turn, signal)
                add(q_SND, k_SKD, v_SKD)
                out = q_SND
                if turn.mine.num_keys:
                    out = attend(q_SND, k_SKD, v_SKD, self.tokens.cu_seqlens, self.tokens.max_seqlen)
                outputs.append(out)
                sent.append(BeginOutput.apply(turn, out))
            piece_out = EndOutput.apply(turns, piece[0].shape, *sent)
        o_TM = torch.cat((piece_out, own_out)).view(len(q_TND), -1) if own_count else piece_out.flatten(1)
        if torch.is_grad_enabled():
            set_recipe(o_TM, (own_out, *outputs), self._rejoin)
        return o_TM

    @torch.no_grad()
    def _recompute(self, project: Callable[[], Tensors]) -> Tensors:
        """This rank's own part of q, k and v, then all tokens of its heads by turn."""
        qkv = project()
        parts = [x.split([self.count, len(x) - self.count]) for x in qkv]
        turns = self.begin_turns(qkv[0].shape[-1])
        for turn in turns:
            turn.arriving = turn.send_qkv(*(p[0] for p in parts))
        return (*(p[1] for p in parts), *(x for turn in turns for x in turn.split_qkv(turn.take())))

    def _rejoin(self, own_out: torch.Tensor, *outputs: torch.Tensor) -> torch.Tensor:
        """Attention's output of the row from that of its own documents and that of its heads, [T, N·D]."""
        turns = self.begin_turns(own_out.shape[-1])
        for turn, out in zip(turns, outputs, strict=True):
            turn.arriving = turn.send_output(out)
        piece_out = join_output(turns, own_out.new_empty((self.count, *own_out.shape[1:])))
        return torch.cat((piece_out, own_out)).flatten(1)
