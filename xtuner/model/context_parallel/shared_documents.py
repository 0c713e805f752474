"""Attention of a row that begins with a piece of documents shared by several ranks."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from xtuner.data.loading.batch import SharedTokens, make_borders
from xtuner.model.context_parallel.division import Queries, divide_queries
from xtuner.model.context_parallel.exchange import (
    BeginOutput,
    BeginQKV,
    ContextGroup,
    EndOutput,
    EndQKV,
    Exchange,
    Tensors,
    Turn,
    write_output,
)
from xtuner.model.ops.attention_backends import Attend, AttendPrefixes
from xtuner.model.ops.autograd_functions import Optionals, set_recipe
from xtuner.model.ops.saved_tensors import BlockTensors, recompute_saved


class TakeRanges(torch.autograd.Function):
    """Ranges of rows, which may overlap, one after the other."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ranges: Sequence[tuple[int, int]]) -> torch.Tensor:
        ctx.ranges, ctx.shape = ranges, x.shape
        return torch.cat([x[a:b] for a, b in ranges])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dx = torch.zeros(ctx.shape, dtype=torch.float32, device=grads[0].device)
        for (a, b), d in zip(ctx.ranges, grads[0].split([b - a for a, b in ctx.ranges]), strict=True):
            dx[a:b] += d
        return dx.to(grads[0].dtype), None


@dataclass(frozen=True)
class SharedDocuments:
    """The shared documents of a micro-batch, and the ranks that share them."""

    tokens: SharedTokens
    context: ContextGroup

    @property
    def count(self) -> int:
        """Tokens in this rank's piece."""
        return self.tokens.pieces[self.context.rank]

    @cached_property
    def _queries(self) -> list[list[Queries | None]]:
        """By turn and rank, the queries of its heads; None for all."""
        return [
            [
                None if share.parts == 1 else divide_queries(self.tokens.borders, share.part, share.parts)
                for share in turn
            ]
            for turn in self.context.turns
        ]

    @property
    def _all_attend(self) -> bool:
        """Whether every rank has heads and queries in every turn."""
        pairs = zip(self.context.turns, self._queries, strict=True)
        return all(s.num_keys and (q is None or q.ranges) for p in pairs for s, q in zip(*p, strict=True))

    def make_turns(self, head_dim: int) -> list[Turn]:
        context, pieces, found = self.context, self.tokens.pieces, []
        begins = [sum(pieces[:rank]) for rank in range(context.size)]
        me = begins[context.rank], self.count
        for shares, queries in zip(context.turns, self._queries, strict=True):
            rows = [
                [n if q is None else q.count_within(begin, n) for q in queries]
                for begin, n in zip(begins, pieces, strict=True)
            ]
            ranges = [None if q is None else q.ranges_within(*me) for q in queries]
            to_queries = Exchange(context, rows, [s.queries for s in shares], ranges, head_dim)
            complete = [[n] * context.size for n in pieces]
            to_keys = Exchange(context, complete, [s.keys for s in shares], [None] * context.size, head_dim)
            found.append(Turn(shares[context.rank], to_queries, to_keys))
        return found

    def attend(
        self, attend: Attend, attend_prefixes: AttendPrefixes | None, q_TND: torch.Tensor, k_TKD: torch.Tensor,
        v_TKD: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, project: Callable[..., Tensors] | None,
        inputs: Optionals, saver: BlockTensors | None,
    ) -> torch.Tensor:  # fmt: skip
        """Attention of a row, [T, N·D]: of this rank's piece of the shared documents, then of its own documents.

        The result carries a recipe, which exchanges the output again: it is kept once, by heads.

        Args:
            cu_seqlens, max_seqlen: of its own documents.
            project: recomputes q, k and v from `inputs` in the backward; None to keep what attention needs.
            saver: packs what else attention saves.
        """
        own_count = len(q_TND) - self.count
        parts = [x.split([self.count, own_count]) for x in (q_TND, k_TKD, v_TKD)]
        (q_piece, k_piece, v_piece), (q_own, k_own, v_own) = zip(*parts, strict=True)
        turns = self.make_turns(q_TND.shape[-1])
        begun = BeginQKV.apply(turns, q_piece, k_piece, v_piece)
        # all ranks must recompute at the same point of the backward, which is attention's by heads
        if project is None or not self._all_attend:
            saving: Any = nullcontext(lambda *_: None)
        else:
            recompute = lambda *inputs: self._recompute(project(*inputs))  # noqa: E731
            saving = recompute_saved((q_own, k_own, v_own), inputs, recompute, saver)
        with saving as add:
            own_out = q_own.new_empty(q_own.shape)  # if empty, a view would keep all of q
            if own_count:  # while heads arrive
                own_out = attend(q_own, k_own, v_own, cu_seqlens, max_seqlen)
            outputs, sent = [], []
            for number, (turn, signal) in enumerate(zip(turns, begun, strict=True)):
                heads = EndQKV.apply(turn, signal)
                add(*heads)
                outputs.append(self._attend_heads(attend, attend_prefixes, number, heads))
                sent.append(BeginOutput.apply(turn, outputs[-1]))
            piece_out = EndOutput.apply(turns, q_piece.shape, *sent)
        o_TM = torch.cat((piece_out, own_out)).view(len(q_TND), -1) if own_count else piece_out.flatten(1)
        if torch.is_grad_enabled():
            set_recipe(o_TM, (own_out, *outputs), self._rejoin)
        return o_TM

    def _attend_heads(
        self, attend: Attend, attend_prefixes: AttendPrefixes | None, turn: int, heads: Tensors
    ) -> torch.Tensor:
        """Attention of this rank's heads over all shared tokens, or over its part of the queries."""
        q_RHD, k_SKD, v_SKD = heads
        if not q_RHD.numel():  # no heads, or no queries in documents of very few tokens
            return q_RHD + 0 * (k_SKD.sum() + v_SKD.sum())  # their gradients are exchanged all the same
        queries = self._queries[turn][self.context.rank]
        if queries is None:
            return attend(q_RHD, k_SKD, v_SKD, self.tokens.cu_seqlens, self.tokens.max_seqlen)
        assert attend_prefixes is not None
        q_lengths, k_lengths = ([b - a for a, b in ranges] for ranges in (queries.ranges, queries.keys))
        borders = [make_borders(lengths).to(q_RHD.device, non_blocking=True) for lengths in (q_lengths, k_lengths)]
        k, v = (TakeRanges.apply(x, queries.keys) for x in (k_SKD, v_SKD))
        return attend_prefixes(q_RHD, k, v, borders[0], borders[1], max(q_lengths), max(k_lengths))

    @torch.no_grad()
    def _recompute(self, qkv: Tensors) -> Tensors:
        """This rank's own part of q, k and v, then all tokens of its heads by turn."""
        (*piece,), own = zip(*(x.split([self.count, len(x) - self.count]) for x in qkv), strict=True)
        turns = self.make_turns(qkv[0].shape[-1])
        for turn in turns:
            turn.send(*piece)
        return (*own, *(x for turn in turns for x in turn.end()))

    def _rejoin(self, own_out: torch.Tensor, *outputs: torch.Tensor) -> torch.Tensor:
        """Attention's output of the row from that of its own documents and that of its heads, [T, N·D]."""
        turns = self.make_turns(own_out.shape[-1])
        for turn, out in zip(turns, outputs, strict=True):
            turn.begin(turn.queries.to_tokens(out))
        piece_out = write_output(turns, own_out.new_empty((self.count, *own_out.shape[1:])))
        return torch.cat((piece_out, own_out)).flatten(1)
