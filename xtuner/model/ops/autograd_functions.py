"""The differentiable functions of the network's modules, each with its own backward.

What is cheap to recompute (a norm, SwiGLU's product) is not kept between forward and backward, but recomputed from
tensors that are kept anyway. Such a tensor carries a `Recipe`, so that its consumers need not keep it either. A
consumer that ignores recipes, such as a user's module, keeps the tensor itself: more memory, the same numbers.

The other activations, which a block may keep or recompute, in bytes per token with 2-byte numbers:

    attention   attention's output and log-sums   2·N·D + 4·N
    qkv         q, k and v after rotation         2·(N + 2K)·D; with norms of q and k as much again, before these
    residual    the sum after attention           2·H
    gate_up     both factors of SwiGLU            4·F

Where products read a norm in fp8 by columns too, its 1 / rms is kept: 4 bytes, and 4 bytes a channel, which the plan of
memory leaves to its margin.

activation_memory.py chooses among them. matmul.py has the products with weights, gradient_sums.py their gradients.
swiglu.py has the MLP, in tiles of tokens; saved_tensors.py recomputes q, k and v, and keeps tensors in host memory.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from xtuner.model.ops import elementwise as e
from xtuner.model.ops.gradient_sums import GradientSum, add_gradient
from xtuner.model.ops.low_rank import LowRankTerm, Projection
from xtuner.model.ops.matmul import PLAIN, Matmul
from xtuner.model.ops.maxima import set_maxima
from xtuner.model.ops.prepared import Normed, get_normed, stand_in

Tensors = tuple[torch.Tensor, ...]
Optionals = tuple[torch.Tensor | None, ...]


@dataclass(frozen=True)
class KeepPolicy:
    """What one block keeps between forward and backward in addition to its input; the rest is recomputed.

    Args:
        attention: without it nothing else is kept: the whole block is recomputed.
        on_host: which of "input", "attention" and "gate_up" are kept in host memory. With "attention", `qkv` is False:
            a GPU with room for q, k and v would have room for attention's output.
        output: False while a block is recomputed: then nothing reads its output, which is not computed.
        saver: while the block computes, the hooks that keep them there (saved_tensors.py).
    """

    attention: bool = True
    qkv: bool = True
    residual: bool = True
    gate_up: bool = True
    on_host: frozenset[str] = frozenset()
    output: bool = True
    saver: Any = field(default=None, compare=False, repr=False)


KEEP_ALL = KeepPolicy()
KEEP_NONE = KeepPolicy(False, False, False, False)


@dataclass(frozen=True)
class Recipe:
    """How to recompute a tensor.

    Args:
        tensors: its inputs. A consumer saves them through autograd, not in a closure, so that a checkpointed block
            frees them.
        compute: computes the tensor from these inputs.
        version: the tensor's version when the recipe was made; a later change in place invalidates the recipe.
    """

    tensors: Optionals
    compute: Callable[..., torch.Tensor]
    version: int = 0


def set_recipe(tensor: torch.Tensor, tensors: Optionals, compute: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Attach a recipe to a tensor for its consumers."""
    tensor.recipe = Recipe(tensors, compute, tensor._version)  # type: ignore[attr-defined]
    return tensor


def get_recipe(tensor: torch.Tensor) -> Recipe:
    """The tensor's recipe; if it has none, one that keeps the tensor itself."""
    recipe: Recipe | None = getattr(tensor, "recipe", None)
    if recipe is not None and recipe.version == tensor._version:
        return recipe
    return keep_tensor(tensor)


def keep_tensor(tensor: torch.Tensor) -> Recipe:
    """The recipe that keeps the tensor itself."""
    return Recipe((tensor,), _identity)


def _identity(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@dataclass
class Recomputed:
    """What is in front of a norm, if it is not kept: recomputed once, by the first function that needs it."""

    value: torch.Tensor | None = None

    def take(self) -> torch.Tensor | None:
        value, self.value = self.value, None
        return value


class AddNorm(torch.autograd.Function):
    """(x + add, its RMS norm times w); the backward adds the gradients of both.

    Args:
        matmul: of the products that alone read the norm; `PLAIN` if anything else does.
        recomputed: None to keep the sum; else stores the sum once it has been recomputed from x and `recipe`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TH: torch.Tensor,
        add_TH: torch.Tensor | None,
        w_H: torch.Tensor,
        eps: float,
        into: GradientSum | None,
        matmul: Matmul,
        recipe: Recipe | None,
        recomputed: Recomputed | None,
    ) -> Tensors:
        total, normed = matmul.add_norm(x_TH, w_H, eps, add_TH)
        if add_TH is None:
            total = x_TH.view_as(x_TH)
        kept = (total,) if recipe is None else (x_TH, *recipe.tensors)
        ctx.save_for_backward(w_H, *kept)
        ctx.eps, ctx.into, ctx.matmul = eps, into, matmul
        ctx.recomputed, ctx.compute = recomputed, recipe and recipe.compute
        return total, normed

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Optionals:
        d_total, d_normed = grads
        w_H, total, *inputs = ctx.saved_tensors
        if ctx.compute is not None:
            found = ctx.recomputed.take()
            total = total + ctx.compute(*inputs) if found is None else found
        maxima = ctx.matmul.new_maxima(*total.shape, total.device)
        dx, dw = e.rms_norm_backward(d_normed, total, w_H, ctx.eps, d_total, maxima)
        set_maxima(dx, maxima)
        dw_H = add_gradient(ctx.into, dw, w_H.dtype) if ctx.needs_input_grad[2] else None
        return dx, dx if ctx.needs_input_grad[1] else None, dw_H, None, None, None, None, None


def add_norm(
    x_TH: torch.Tensor,
    add_TH: torch.Tensor | None,
    w_H: torch.Tensor,
    eps: float,
    into: GradientSum | None = None,
    keep_sum: bool = True,
    matmul: Matmul = PLAIN,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + add, its RMS norm times w); the norm carries a recipe.

    Args:
        keep_sum: False to recompute x + add in the backward, if `add` carries a recipe.
        matmul: of the products that alone read the norm, which may be a stand-in then (prepared.py).
    """
    add_recipe: Recipe | None = None if keep_sum or add_TH is None else getattr(add_TH, "recipe", None)
    recomputed = Recomputed() if add_recipe else None
    total, normed = AddNorm.apply(x_TH, add_TH, w_H, eps, into, matmul, add_recipe, recomputed)
    if not torch.is_grad_enabled():
        return total, normed
    if add_recipe is None or recomputed is None:
        unwritten = get_normed(normed)
        if unwritten is None:
            set_recipe(normed, (total, w_H), lambda total, w: e.rms_norm(total, w, eps)[1])
        else:
            found = total, w_H, *unwritten.columns
            set_recipe(normed, found, lambda total, w, *columns: stand_in(Normed(total, w, eps, columns=columns)))
        return total, normed
    compute_add = add_recipe.compute

    def compute(x: torch.Tensor, w: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        recomputed.value, computed = matmul.add_norm(x, w, eps, compute_add(*inputs))
        return computed

    set_recipe(normed, (x_TH, w_H, *add_recipe.tensors), compute)
    return total, normed


class LinearFunction(torch.autograd.Function):
    """x w^T + bias + add, and a low-rank term, if any, whose tensors are `tensors`."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TK: torch.Tensor,
        w_NK: torch.Tensor,
        bias_N: torch.Tensor | None,
        add_TN: torch.Tensor | None,
        recipe: Recipe,
        matmul: Matmul,
        into: tuple[GradientSum | None, GradientSum | None],
        term: LowRankTerm | None = None,
        *tensors: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(w_NK, bias_N, *tensors, *recipe.tensors)
        ctx.compute, ctx.matmul, ctx.into, ctx.term, ctx.count = recipe.compute, matmul, into, term, len(tensors)
        return Projection(matmul, w_NK, bias_N, term, tensors).forward(matmul.prepare(x_TK), x_TK, add_TN)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Optionals:
        (d_TN,), (to_w, to_bias) = grads, ctx.into
        w_NK, bias_N, *others = ctx.saved_tensors
        tensors, inputs = others[: ctx.count], others[ctx.count :]
        need_x, need_w, need_bias, need_add, *_ = ctx.needs_input_grad
        projection = Projection(ctx.matmul, w_NK, bias_N, ctx.term, tensors, to_w)
        x_TK: Any = ctx.compute(*inputs) if need_w or ctx.term else None
        dw = None
        if need_w:
            rows, columns = ctx.matmul.prepare_both(d_TN)
            dw = ctx.matmul.add_gradient(to_w, columns, ctx.matmul.prepare_columns(x_TK), w_NK.dtype)
            del columns
        else:
            rows = ctx.matmul.prepare(d_TN)
        d_bias = add_gradient(to_bias, d_TN.sum(0, dtype=torch.float32), bias_N.dtype) if need_bias else None
        projection.add_gradients(d_TN, x_TK)
        del x_TK
        dx = projection.backward(rows, d_TN) if need_x else None
        return dx, dw, d_bias, d_TN if need_add else None, None, None, None, None, *projection.gradients()


class SplitRotate(torch.autograd.Function):
    """The joint projection [T, K·(G+2)·D] → q [T, N, D], k and v [T, K, D]; q and k rotated by each token's angles.

    Args:
        matmul: of the projection, which reads this gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        qkv: torch.Tensor,
        cos_TD: torch.Tensor,
        sin_TD: torch.Tensor,
        kv_heads: int,
        head_dim: int,
        matmul: Matmul,
    ) -> Tensors:
        ctx.save_for_backward(cos_TD, sin_TD)
        ctx.matmul, ctx.width = matmul, qkv.shape[1]
        return e.split_rotate(qkv, cos_TD, sin_TD, kv_heads, head_dim)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Optionals:
        (dq, dk, dv), (cos_TD, sin_TD) = grads, ctx.saved_tensors
        maxima = ctx.matmul.new_maxima(len(dq), ctx.width, dq.device)
        d = e.split_rotate_backward(dq, dk, dv, cos_TD, sin_TD, maxima)
        set_maxima(d, maxima)
        return d, None, None, None, None, None


class SplitNormRotate(torch.autograd.Function):
    """`SplitRotate` with the RMS norm of every head's q and k, times wq and wk, before the rotation.

    Args:
        recipe: how to recompute the joint projection; one that keeps it, or one of fewer bytes.
        recomputed: stores the joint projection if another function has recomputed it.
        into: gradient sums of wq and wk.
        matmul: of the joint projection, which reads its gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        qkv: torch.Tensor,
        wq_D: torch.Tensor,
        wk_D: torch.Tensor,
        eps: float,
        angles: tuple[torch.Tensor, torch.Tensor],
        kv_heads: int,
        recipe: Recipe,
        recomputed: Recomputed,
        into: tuple[GradientSum | None, GradientSum | None],
        matmul: Matmul,
    ) -> Tensors:
        ctx.save_for_backward(wq_D, wk_D, *angles, *recipe.tensors)
        ctx.matmul = matmul
        ctx.eps, ctx.compute, ctx.recomputed, ctx.into = eps, recipe.compute, recomputed, into
        return e.split_norm_rotate(qkv, wq_D, wk_D, eps, *angles, kv_heads)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Optionals:
        (dq, dk, dv), (wq_D, wk_D, cos_TD, sin_TD, *inputs) = grads, ctx.saved_tensors
        qkv = ctx.recomputed.take()
        if qkv is None:
            qkv = ctx.compute(*inputs)
        maxima = ctx.matmul.new_maxima(*qkv.shape, qkv.device)
        d, *d_weights = e.split_norm_rotate_backward(dq, dk, dv, qkv, wq_D, wk_D, ctx.eps, cos_TD, sin_TD, maxima)
        set_maxima(d, maxima)
        dw = [
            add_gradient(into, d_w, w.dtype) if needed else None
            for into, d_w, w, needed in zip(ctx.into, d_weights, (wq_D, wk_D), ctx.needs_input_grad[1:3], strict=True)
        ]
        return d, *dw, None, None, None, None, None, None, None


class Embed(torch.autograd.Function):
    """Rows of the embedding; row `padding` gets no gradient (-1: every row gets one)."""

    @staticmethod
    def forward(
        ctx: Any, ids_T: torch.Tensor, w_VH: torch.Tensor, padding: int, into: GradientSum | None
    ) -> torch.Tensor:
        ctx.save_for_backward(ids_T)
        ctx.rows, ctx.dtype, ctx.padding, ctx.into = len(w_VH), w_VH.dtype, padding, into
        return w_VH[ids_T]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Optionals:
        (ids_T,) = ctx.saved_tensors
        dw = torch.ops.aten.embedding_dense_backward(grads[0], ids_T, ctx.rows, ctx.padding, False)
        return None, add_gradient(ctx.into, dw, ctx.dtype), None, None
