"""A block's training pass as two functions around attention, with what each keeps for its backward chosen.

What is cheap to compute again (norms, SwiGLU's product) is never kept. Of the rest a block may keep, in bytes a token
with 2-byte numbers:

    attention   its output and log-sums           2·N·D + 4·N
    qkv         q, k and v after their rotation   2·(N + 2K)·D
    residual    the sum after attention           2·H
    gate_up     both factors of SwiGLU            4·F

`plan.py` chooses. How products with weights are computed, `products.py` says; where their gradients go, `sums.py`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from xtuner.model.ops import elementwise as e
from xtuner.model.ops.products import Products
from xtuner.model.ops.sums import give, give_product, sums_of

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Keep:
    """What one block keeps between forward and backward beside its input; the rest is computed again."""

    attention: bool = True  # without it nothing else can be kept: the whole block is computed again
    qkv: bool = True
    residual: bool = True
    gate_up: bool = True


EVERYTHING = Keep()
NOTHING = Keep(False, False, False, False)


def heads_of(
    x_TH: torch.Tensor,
    w_norm: torch.Tensor,
    wqkv: torch.Tensor,
    bias: torch.Tensor | None,
    cos_TD: torch.Tensor,
    sin_TD: torch.Tensor,
    eps: float,
    kv_heads: int,
    head_dim: int,
    products: Products,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [T, N, D], k and v [T, K, D] of a block's input."""
    _, normed = e.rms_norm(x_TH, w_norm, eps)
    return e.split_rotate(products.forward(products.rows(normed), wqkv, bias), cos_TD, sin_TD, kv_heads, head_dim)


class AttentionInputs(torch.autograd.Function):
    """(q, k, v, x): `heads_of` its inputs, and the first of them, x, for the residual, whose gradient joins here."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensors:
        x_TH, w_norm, wqkv, bias, cos_TD, sin_TD, eps, _, _, products = inputs
        ctx.save_for_backward(x_TH, w_norm, wqkv, bias, cos_TD, sin_TD)
        ctx.eps, ctx.sums, ctx.products = eps, sums_of(w_norm, wqkv, bias), products
        return *heads_of(*inputs), x_TH.view_as(x_TH)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dq, dk, dv, residual = grads
        x_TH, w_norm, wqkv, bias, cos_TD, sin_TD = ctx.saved_tensors
        to_norm, to_wqkv, to_bias = ctx.sums
        d = e.split_rotate_backward(dq, dk, dv, cos_TD, sin_TD)
        _, normed = e.rms_norm(x_TH, w_norm, ctx.eps)
        d_wqkv = give_product(to_wqkv, d, normed)
        d_bias = None if bias is None else give(to_bias, d.sum(0, dtype=torch.float32), bias.dtype)
        d_normed = ctx.products.back(ctx.products.rows(d), wqkv)
        dx, d_norm = e.rms_norm_backward(d_normed, x_TH, w_norm, ctx.eps, residual)
        return dx, give(to_norm, d_norm, w_norm.dtype), d_wqkv, d_bias, *(None,) * 6


class BlockOutputs(torch.autograd.Function):
    """x + attention's projection, then + MLP of its norm: from a block's input x and its attention o, both [T, …]."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TH: torch.Tensor,
        o: torch.Tensor,
        wo: torch.Tensor,
        bias: torch.Tensor | None,
        w_norm: torch.Tensor,
        w1: torch.Tensor,
        w3: torch.Tensor,
        w2: torch.Tensor,
        eps: float,
        keep: Keep,
        p: Products,
    ) -> torch.Tensor:
        residual, normed = e.rms_norm(x_TH, w_norm, eps, p.forward(p.rows(o), wo, bias))
        rows = p.rows(normed)
        gate, up = p.forward(rows, w1), p.forward(rows, w3)
        out = p.forward(p.rows(e.swiglu(gate, up)), w2, add_TN=residual)
        kept = (residual, None) if keep.residual else (None, x_TH)
        factors = (gate, up) if keep.gate_up else (None, None)
        ctx.save_for_backward(*kept, *factors, o, wo, bias, w_norm, w1, w3, w2)
        ctx.eps, ctx.sums, ctx.products = eps, sums_of(wo, bias, w_norm, w1, w3, w2), p
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (d,), p = grads, ctx.products
        residual, x_TH, gate, up, o, wo, bias, w_norm, w1, w3, w2 = ctx.saved_tensors
        to_wo, to_bias, to_norm, to_w1, to_w3, to_w2 = ctx.sums
        if residual is None:
            residual, normed = e.rms_norm(x_TH, w_norm, ctx.eps, p.forward(p.rows(o), wo, bias))
        else:
            _, normed = e.rms_norm(residual, w_norm, ctx.eps)
        if gate is None:
            rows = p.rows(normed)
            gate, up = p.forward(rows, w1), p.forward(rows, w3)
        d_gate, d_up, product = e.swiglu_backward(gate, up, p.back(p.rows(d), w2))
        d_w2, d_w1 = give_product(to_w2, d, product), give_product(to_w1, d_gate, normed)
        d_w3 = give_product(to_w3, d_up, normed)
        del gate, up, product, normed
        d_normed = p.back(p.rows(d_up), w3, p.back(p.rows(d_gate), w1))
        del d_gate, d_up
        d_residual, d_norm = e.rms_norm_backward(d_normed, residual, w_norm, ctx.eps, d)
        d_wo = give_product(to_wo, d_residual, o)
        d_bias = None if bias is None else give(to_bias, d_residual.sum(0, dtype=torch.float32), bias.dtype)
        d_w_norm = give(to_norm, d_norm, w_norm.dtype)
        d_o = p.back(p.rows(d_residual), wo)
        return d_residual, d_o, d_wo, d_bias, d_w_norm, d_w1, d_w3, d_w2, None, None, None


@contextmanager
def forgetting(tensors: Tensors, again: Callable[[], Tensors]) -> Iterator[None]:
    """Inside, autograd does not keep `tensors` (contiguous), nor views of all of one, but calls `again` once, in the
    backward, for all of them."""
    which = {t.data_ptr(): (i, t.numel()) for i, t in enumerate(tensors)}
    made: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> Any:
        i, numel = which.get(tensor.data_ptr(), (0, -1))
        return tensor if tensor.numel() != numel else (i, tensor.shape, tensor.stride())

    def unpack(packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        if not made:
            made.extend(again())
        i, shape, stride = packed
        return made[i].as_strided(shape, stride)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: torch.Tensor, w_H: torch.Tensor, eps: float) -> torch.Tensor:
        ctx.save_for_backward(x_TH, w_H)
        ctx.eps, (ctx.sum,) = eps, sums_of(w_H)
        return e.rms_norm(x_TH, w_H, eps)[1]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TH, w_H = ctx.saved_tensors
        dx, dw = e.rms_norm_backward(grads[0], x_TH, w_H, ctx.eps)
        return dx, give(ctx.sum, dw, w_H.dtype), None


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids_T: torch.Tensor, w_VH: torch.Tensor, padding: int) -> torch.Tensor:
        ctx.save_for_backward(ids_T)
        ctx.rows, ctx.dtype, ctx.padding, (ctx.sum,) = len(w_VH), w_VH.dtype, padding, sums_of(w_VH)
        return w_VH[ids_T]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (ids_T,) = ctx.saved_tensors
        dw = torch.ops.aten.embedding_dense_backward(grads[0], ids_T, ctx.rows, ctx.padding, False)
        return None, give(ctx.sum, dw, ctx.dtype), None


def norm(x_TH: torch.Tensor, w_H: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm with its own backward."""
    return _Norm.apply(x_TH, w_H, eps)


def embed(ids_T: torch.Tensor, w_VH: torch.Tensor, padding: int | None) -> torch.Tensor:
    """Rows of the embedding; row `padding` gets no gradient."""
    return _Embed.apply(ids_T, w_VH, -1 if padding is None else padding)
