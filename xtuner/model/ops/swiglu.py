"""The MLP as one differentiable function, computed in tiles of tokens.

Its tensors [T, F] are the widest of a block. Of more than TILE tokens, those that are not kept exist for one tile at a
time, and weight gradients are added up tile by tile. Each row of an fp8 product has its own scale, so tiles change no
scale. With at most TILE tokens there is one tile, and nothing is copied.
"""

from collections.abc import Sequence
from typing import Any

import torch

from xtuner.model.ops import elementwise as e
from xtuner.model.ops.autograd_functions import Optionals, Recipe
from xtuner.model.ops.gradient_sums import GradientSum, add_gradient
from xtuner.model.ops.low_rank import LowRankTerm, Projection
from xtuner.model.ops.matmul import Matmul
from xtuner.model.ops.prepared import PreparedColumns, PreparedRows, take_rows
from xtuner.model.ops.saved_tensors import FACTORS, BlockTensors

Terms = tuple[LowRankTerm | None, ...]
TILE = 32768  # tokens: products gain nothing from more, and reading weights and gradient sums costs little for each


def split_tokens(tokens: int) -> list[slice]:
    """Tiles of at most TILE tokens, about equal, and multiples of 256 but for the last."""
    count = -(-tokens // TILE)
    step = max(tokens, 1) if count <= 1 else -(-tokens // count // 256) * 256
    return [slice(i, min(i + step, tokens)) for i in range(0, tokens, step)] or [slice(0, 0)]


def put_rows(out: torch.Tensor | None, tile: slice, part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Write a tile's rows to `out`, which has the shape of `like`; a single tile's are the result."""
    if out is None and len(part) == len(like):
        return part
    out = torch.empty_like(like) if out is None else out
    out[tile] = part
    return out


class TiledGradient:
    """The gradient d^T x of a weight, added up over tiles of tokens: in its gradient sum, else for autograd."""

    def __init__(
        self, matmul: Matmul, into: GradientSum | None, weight: torch.Tensor, needed: bool, tiles: int
    ) -> None:
        self.matmul, self.into, self.needed, self.dtype, self.own = matmul, into, needed, weight.dtype, None
        self.gradient: torch.Tensor | None = None
        if needed and into is None and tiles > 1:
            dtype = torch.promote_types(weight.dtype, torch.float32)
            self.own = GradientSum(torch.empty_like(weight, dtype=dtype))

    def prepare(self, d_TN: torch.Tensor) -> tuple[PreparedRows, PreparedColumns | None]:
        """d as the product for x's gradient needs it, and, if it is needed, as this gradient does."""
        return self.matmul.prepare_both(d_TN) if self.needed else (self.matmul.prepare(d_TN), None)

    def add_product(self, d: PreparedColumns | None, x: PreparedColumns | None) -> None:
        if d is not None and x is not None:
            self.gradient = self.matmul.add_gradient(self.own or self.into, d, x, self.dtype)

    def take(self) -> torch.Tensor | None:
        """The gradient for autograd."""
        return self.gradient if self.own is None else self.own.value().to(self.dtype)


class BiasGradient:
    """The gradient of a bias, if there is one and it is needed: the sum over tokens, in fp32."""

    def __init__(self, into: GradientSum | None, bias: torch.Tensor | None, needed: bool) -> None:
        self.into, self.bias, self.needed = into, bias, needed
        self.total: torch.Tensor | None = None

    def add_rows(self, d_TN: torch.Tensor) -> None:
        if self.needed:
            total = d_TN.sum(0, dtype=torch.float32)
            self.total = total if self.total is None else self.total + total

    def take(self) -> torch.Tensor | None:
        """The gradient for autograd."""
        if self.total is None or self.bias is None:
            return None
        return add_gradient(self.into, self.total, self.bias.dtype)


def _projections(
    matmul: Matmul,
    weights: Sequence[torch.Tensor],
    biases: Optionals,
    terms: Terms,
    tensors: Sequence[torch.Tensor],
    into: Sequence[GradientSum | None],
) -> list[Projection]:
    found, at = [], 0
    for weight, bias, term, of_weight in zip(weights, biases, terms, into[:3], strict=True):
        count = term.num_tensors if term else 0
        found.append(Projection(matmul, weight, bias, term, tensors[at : at + count], of_weight))
        at += count
    return found


class SwiGLUFunction(torch.autograd.Function):
    """w2(silu(w1 x + b1) · (w3 x + b3)) + b2 + add; the product of the two factors is not kept.

    Args:
        b1, b3, b2: biases, or None.
        into: gradient sums of w1, w3, w2 and of their biases.
        keep: whether the two factors are kept, else they are recomputed.
        output: False if nothing reads the output, which is not computed then.
        saver: keeps the two factors in host memory.
        terms: low-rank terms of w1, w3, w2, or None; `tensors` are those of all.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TH: torch.Tensor,
        add_TH: torch.Tensor,
        w1: torch.Tensor,
        w3: torch.Tensor,
        w2: torch.Tensor,
        b1: torch.Tensor | None,
        b3: torch.Tensor | None,
        b2: torch.Tensor | None,
        recipe: Recipe,
        matmul: Matmul,
        into: tuple[GradientSum | None, ...],
        keep: bool,
        output: bool,
        saver: BlockTensors | None = None,
        terms: Terms = (None, None, None),
        *tensors: torch.Tensor,
    ) -> torch.Tensor:
        kept: list[torch.Tensor] = []
        out: Any = None if output else add_TH.view_as(add_TH)
        p1, p3, p2 = _projections(matmul, (w1, w3, w2), (b1, b3, b2), terms, tensors, into)
        saver = saver if keep and saver and saver.sends_factors and any(ctx.needs_input_grad) else None

        def compute_factor(p: Projection, rows: PreparedRows, x: torch.Tensor, i: int) -> torch.Tensor:
            if saver:
                saver.make_room_for_factor(x.itemsize * len(x) * len(p.weight))
            factor = p.forward(rows, x, None, i)
            if saver:
                saver.put_on_host(factor, FACTORS)  # while the other one is computed
            return factor

        for i, tile in enumerate(split_tokens(len(x_TH)) if keep or output else ()):
            x = take_rows(x_TH, tile)
            rows = matmul.prepare(x)
            gate, up = (compute_factor(p, rows, x, i) for p in (p1, p3))
            if output:
                product: Any = e.swiglu(gate, up) if p2.term else None
                rows = matmul.prepare(product) if p2.term else matmul.prepare_swiglu(gate, up)
                part = p2.forward(rows, product, add_TH[tile], i)
                out = put_rows(out, tile, part, add_TH)
                del part, product
            kept += [gate, up] if keep else []
            del rows, gate, up
        ctx.save_for_backward(w1, w3, w2, b1, b3, b2, *tensors, *kept, *recipe.tensors)
        ctx.compute, ctx.matmul, ctx.into, ctx.kept = recipe.compute, matmul, into, len(kept)
        ctx.terms, ctx.count = terms, len(tensors)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Optionals:
        (d_TH,), matmul = grads, ctx.matmul
        w1, w3, w2, b1, b3, b2, *others = ctx.saved_tensors
        _, _, need_w1, need_w3, need_w2, *need_biases = ctx.needs_input_grad[:8]
        tensors, others = others[: ctx.count], others[ctx.count :]
        kept, inputs = others[: ctx.kept], others[ctx.kept :]
        p1, p3, p2 = projections = _projections(matmul, (w1, w3, w2), (b1, b3, b2), ctx.terms, tensors, ctx.into)
        need_x = not kept or need_w1 or need_w3 or p1.term or p3.term
        x_TH: Any = ctx.compute(*inputs) if need_x else None
        only_products = need_w1 and need_w3 and need_w2 and not any(need_biases) and not any(ctx.terms)
        tiles, dx_TH = split_tokens(len(d_TH)), None
        needs = zip(ctx.into[:3], (w1, w3, w2), (need_w1, need_w3, need_w2), strict=True)
        dw1, dw3, dw2 = (TiledGradient(matmul, into, w, need, len(tiles)) for into, w, need in needs)
        d_biases = [BiasGradient(*of) for of in zip(ctx.into[3:], (b1, b3, b2), need_biases, strict=True)]
        for i, tile in enumerate(tiles):
            d = take_rows(d_TH, tile)
            x: Any = None if x_TH is None else take_rows(x_TH, tile)
            if kept:
                gate, up = kept[2 * i : 2 * i + 2]
            else:
                rows = matmul.prepare(x)
                gate, up = p1.forward(rows, x, None, i), p3.forward(rows, x, None, i)
                del rows
            rows, columns = dw2.prepare(d)
            d_product = p2.backward(rows, d, None, i)
            del rows
            prepared = matmul.prepare_swiglu_gradients(gate, up, d_product) if only_products else None
            if prepared:
                d_gate: Any = None  # exist in fp8 only
                d_up: Any = None
                dw2.add_product(columns, prepared.product)
            else:
                d_gate, d_up, product = e.swiglu_backward(gate, up, d_product)
                dw2.add_product(columns, matmul.prepare_columns(product) if need_w2 else None)
                p2.add_gradients(d, product, i)
                del product
            del columns, d_product
            x_columns = matmul.prepare_columns(x) if need_w1 or need_w3 else None
            rows_gate, columns = prepared.gate if prepared else dw1.prepare(d_gate)
            dw1.add_product(columns, x_columns)
            p1.add_gradients(d_gate, x, i)
            rows_up, columns = prepared.up if prepared else dw3.prepare(d_up)
            dw3.add_product(columns, x_columns)
            p3.add_gradients(d_up, x, i)
            for gradient, part in zip(d_biases, (d_gate, d_up, d), strict=True):
                gradient.add_rows(part)
            del gate, up, x, columns, x_columns
            if i + 1 == len(tiles):
                del x_TH
            part = p3.backward(rows_up, d_up, p1.backward(rows_gate, d_gate, None, i), i)
            del d_gate, d_up, rows_gate, rows_up, prepared
            dx_TH = put_rows(dx_TH, tile, part, d_TH)
        taken = (dw1.take(), dw3.take(), dw2.take(), *(d.take() for d in d_biases))
        of_terms = [gradient for p in projections for gradient in p.gradients()]
        return dx_TH, d_TH, *taken, *[None] * 7, *of_terms
