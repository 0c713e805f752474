"""The differentiable functions that the network's modules compute with: each has a backward of its own.

What is cheap to compute again (a norm, SwiGLU's product) is not kept between forward and backward, but computed again
from what is kept anyway. So that its consumers do not keep it either, such a tensor carries a `Recipe`. A consumer that
knows nothing of recipes, a foreign module, keeps the tensor itself: more memory, the same numbers.

Of the rest a block may keep, in bytes a token with 2-byte numbers:

    attention   its output and log-sums           2·N·D + 4·N
    qkv         q, k and v after their rotation   2·(N + 2K)·D
    residual    the sum after attention           2·H
    gate_up     both factors of SwiGLU            4·F

activation_memory.py chooses. matmul.py computes products with weights; gradient_sums.py says where their gradients go.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from xtuner.model.ops import elementwise as e
from xtuner.model.ops.gradient_sums import GradientSum, give, give_product
from xtuner.model.ops.matmul import Products

Tensors = tuple[torch.Tensor, ...]
Optionals = tuple[torch.Tensor | None, ...]


@dataclass(frozen=True)
class Keep:
    """What one block keeps between forward and backward in addition to its input; the rest is computed again."""

    attention: bool = True  # without it nothing else can be kept: the whole block is computed again
    qkv: bool = True
    residual: bool = True
    gate_up: bool = True


EVERYTHING = Keep()
NOTHING = Keep(False, False, False, False)


@dataclass(frozen=True)
class Recipe:
    """How to compute a tensor again.

    Args:
        tensors: what it is computed from. Whoever keeps the recipe keeps them through autograd, and not in a closure,
            so that a block that is checkpointed lets go of them.
        compute: these tensors → the tensor.
        version: of the tensor when the recipe was made; a tensor that was changed in place since has no recipe.
    """

    tensors: Optionals
    compute: Callable[..., torch.Tensor]
    version: int = 0


def set_recipe(tensor: torch.Tensor, tensors: Optionals, compute: Callable[..., torch.Tensor]) -> torch.Tensor:
    """The tensor, with a recipe for its consumers."""
    tensor.recipe = Recipe(tensors, compute, tensor._version)  # type: ignore[attr-defined]
    return tensor


def recipe_of(tensor: torch.Tensor) -> Recipe:
    """The tensor's recipe; one that keeps the tensor itself if it has none."""
    recipe: Recipe | None = getattr(tensor, "recipe", None)
    if recipe is not None and recipe.version == tensor._version:
        return recipe
    return Recipe((tensor,), _itself)


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@dataclass
class Sum:
    """The sum in front of a norm, where it is not kept: computed again once, by whoever needs it first."""

    value: torch.Tensor | None = None

    def take(self) -> torch.Tensor | None:
        value, self.value = self.value, None
        return value


class AddNorm(torch.autograd.Function):
    """(x + add, its RMS norm times w); the gradients of both join here.

    Args:
        again: None to keep the sum; else where it is put when it has been computed again from x and `recipe`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TH: torch.Tensor,
        add_TH: torch.Tensor | None,
        w_H: torch.Tensor,
        eps: float,
        into: GradientSum | None,
        recipe: Recipe | None,
        again: Sum | None,
    ) -> Tensors:
        total, normed = e.rms_norm(x_TH, w_H, eps, add_TH)
        if add_TH is None:
            total = x_TH.view_as(x_TH)
        kept = (total,) if recipe is None else (x_TH, *recipe.tensors)
        ctx.save_for_backward(w_H, *kept)
        ctx.eps, ctx.into, ctx.again, ctx.compute = eps, into, again, recipe and recipe.compute
        return total, normed

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Optionals:
        d_total, d_normed = grads
        w_H, total, *inputs = ctx.saved_tensors
        if ctx.compute is not None:
            found = ctx.again.take()
            total = total + ctx.compute(*inputs) if found is None else found
        dx, dw = e.rms_norm_backward(d_normed, total, w_H, ctx.eps, d_total)
        dw_H = give(ctx.into, dw, w_H.dtype) if ctx.needs_input_grad[2] else None
        return dx, dx if ctx.needs_input_grad[1] else None, dw_H, None, None, None, None


def add_norm(
    x_TH: torch.Tensor,
    add_TH: torch.Tensor | None,
    w_H: torch.Tensor,
    eps: float,
    into: GradientSum | None = None,
    keep_sum: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + add, its RMS norm times w); the norm carries a recipe.

    Args:
        keep_sum: False to compute x + add again in the backward, if `add` carries a recipe.
    """
    of_add: Recipe | None = None if keep_sum or add_TH is None else getattr(add_TH, "recipe", None)
    again = Sum() if of_add else None
    total, normed = AddNorm.apply(x_TH, add_TH, w_H, eps, into, of_add, again)
    if not torch.is_grad_enabled():
        return total, normed
    if of_add is None or again is None:
        set_recipe(normed, (total, w_H), lambda total, w: e.rms_norm(total, w, eps)[1])
        return total, normed
    compute_add = of_add.compute

    def compute(x: torch.Tensor, w: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        again.value, computed = e.rms_norm(x, w, eps, compute_add(*inputs))
        return computed

    set_recipe(normed, (x_TH, w_H, *of_add.tensors), compute)
    return total, normed


class Product(torch.autograd.Function):
    """x w^T + bias + add, for one weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TK: torch.Tensor,
        w_NK: torch.Tensor,
        bias_N: torch.Tensor | None,
        add_TN: torch.Tensor | None,
        recipe: Recipe,
        products: Products,
        into: tuple[GradientSum | None, GradientSum | None],
    ) -> torch.Tensor:
        ctx.save_for_backward(w_NK, bias_N, *recipe.tensors)
        ctx.compute, ctx.products, ctx.into = recipe.compute, products, into
        return products.forward(products.rows(x_TK), w_NK, bias_N, add_TN)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Optionals:
        (d_TN,), p, (to_w, to_bias) = grads, ctx.products, ctx.into
        w_NK, bias_N, *inputs = ctx.saved_tensors
        need_x, need_w, need_bias, need_add, *_ = ctx.needs_input_grad
        dw = give_product(to_w, d_TN, ctx.compute(*inputs)) if need_w else None
        d_bias = give(to_bias, d_TN.sum(0, dtype=torch.float32), bias_N.dtype) if need_bias else None
        dx = p.back(p.rows(d_TN), w_NK) if need_x else None
        return dx, dw, d_bias, d_TN if need_add else None, None, None, None


class GatedProducts(torch.autograd.Function):
    """w2(silu(w1 x) · w3 x) + add: three products and what lies between them, without keeping it."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TH: torch.Tensor,
        add_TH: torch.Tensor,
        w1: torch.Tensor,
        w3: torch.Tensor,
        w2: torch.Tensor,
        recipe: Recipe,
        products: Products,
        into: tuple[GradientSum | None, ...],
        keep: bool,
    ) -> torch.Tensor:
        p = products
        rows = p.rows(x_TH)
        gate, up = p.forward(rows, w1), p.forward(rows, w3)
        out = p.forward(p.rows(e.swiglu(gate, up)), w2, add_TN=add_TH)
        ctx.save_for_backward(*((gate, up) if keep else (None, None)), w1, w3, w2, *recipe.tensors)
        ctx.compute, ctx.products, ctx.into = recipe.compute, products, into
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Optionals:
        (d,), p, (to_w1, to_w3, to_w2) = grads, ctx.products, ctx.into
        gate, up, w1, w3, w2, *inputs = ctx.saved_tensors
        _, _, need_w1, need_w3, need_w2, *_ = ctx.needs_input_grad
        x: Any = ctx.compute(*inputs) if gate is None or need_w1 or need_w3 else None
        if gate is None:
            rows = p.rows(x)
            gate, up = p.forward(rows, w1), p.forward(rows, w3)
        d_gate, d_up, product = e.swiglu_backward(gate, up, p.back(p.rows(d), w2))
        d_w2 = give_product(to_w2, d, product) if need_w2 else None
        d_w1 = give_product(to_w1, d_gate, x) if need_w1 else None
        d_w3 = give_product(to_w3, d_up, x) if need_w3 else None
        del gate, up, product, x
        dx = p.back(p.rows(d_up), w3, p.back(p.rows(d_gate), w1))
        return dx, d, d_w1, d_w3, d_w2, None, None, None, None


class SplitRotate(torch.autograd.Function):
    """The joint projection [T, K·(G+2)·D] → q [T, N, D], k and v [T, K, D]; q and k turned by each token's angles."""

    @staticmethod
    def forward(
        ctx: Any, qkv: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor, kv_heads: int, head_dim: int
    ) -> Tensors:
        ctx.save_for_backward(cos_TD, sin_TD)
        return e.split_rotate(qkv, cos_TD, sin_TD, kv_heads, head_dim)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Optionals:
        return e.split_rotate_backward(*grads, *ctx.saved_tensors), None, None, None, None


class Embed(torch.autograd.Function):
    """Rows of the embedding; row `padding` gets no gradient (-1: none is exempt)."""

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
        return None, give(ctx.into, dw, ctx.dtype), None, None


@contextmanager
def forgetting(tensors: Tensors, again: Callable[[], Tensors]) -> Iterator[None]:
    """Inside, autograd does not keep `tensors` (contiguous), nor views of all of one, but calls `again` once, in the
    backward, for all of them."""
    which = {t.data_ptr(): (i, t.numel()) for i, t in enumerate(tensors)}
    made: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> Any:
        i, numel = which.get(tensor.data_ptr(), (0, -1))
        if tensor.numel() != numel:
            return tensor.detach()  # an output that kept its own node would keep the graph alive after an error
        return i, tensor.shape, tensor.stride()

    def unpack(packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        if not made:
            made.extend(again())
        i, shape, stride = packed
        return made[i].as_strided(shape, stride)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
