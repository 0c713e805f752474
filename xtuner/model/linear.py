"""The modules that own weights: each has its matrix product, its gradient sums and, if any, its adapter.

Training, evaluation and generation all call `forward`. Subclasses that override it, wrappers and replacement modules
take effect wherever the network is used.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from xtuner.model.loss import linear_cross_entropy
from xtuner.model.ops import autograd_functions
from xtuner.model.ops.gradient_sums import GradientSum
from xtuner.model.ops.low_rank import Dropout, LowRankTerm, Projection, Rows
from xtuner.model.ops.matmul import PLAIN, Matmul
from xtuner.model.ops.quantized import Dequantizer


def has_hooks(module: nn.Module) -> bool:
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks)


def runs_only(module: nn.Module, *forwards: Callable[..., Any]) -> bool:
    """Whether a call of the module runs one of these and nothing else: no hook, no override by a class or an object."""
    return getattr(module.forward, "__func__", None) in forwards and not has_hooks(module)


class GradientSumModule(nn.Module):
    """A module that adds the gradients of its parameters to its own sums (ops/gradient_sums.py)."""

    def __init__(self) -> None:
        super().__init__()
        self.gradient_sums: dict[str, GradientSum] = {}  # by parameter of this module; one without a sum uses autograd


class LowRank(GradientSumModule):
    """The factors of a low-rank term on some rows of a weight: A [r, K], B [n, r], and the rows' magnitudes [n] (DoRA).

    Args:
        rows: which rows of the weight.
    """

    def __init__(self, in_size: int, rank: int, rows: Rows, num_rows: int, magnitudes: bool) -> None:
        super().__init__()
        self.rows = rows
        self.A = nn.Parameter(torch.empty(rank, in_size))
        self.B = nn.Parameter(torch.zeros(num_rows, rank))
        self.magnitude = nn.Parameter(torch.ones(num_rows)) if magnitudes else None
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))


class LowRankAdapter(nn.Module):
    """The low-rank terms of a weight, by the name of the part; computed by the function of the `Linear` itself.

    Args:
        scale: what B A is multiplied by.
        dropout: of the terms' input in training; None without.
    """

    def __init__(self, parts: Mapping[str, LowRank], scale: float, dropout: Dropout | None = None) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.scale, self.dropout = scale, dropout

    def parts(self) -> dict[str, LowRank]:
        return {name: part for name, part in self.named_children() if isinstance(part, LowRank)}

    def term(self) -> tuple[LowRankTerm, list[torch.Tensor]]:
        """The term as functions need it, and its tensors."""
        parts = list(self.parts().values())
        named = [(p, key, getattr(p, key)) for p in parts for key in ("A", "B")]
        named += [(p, "magnitude", p.magnitude) for p in parts if p.magnitude is not None]
        into = tuple(p.gradient_sums.get(key) for p, key, _ in named)
        dropout = self.dropout if torch.is_grad_enabled() else None
        rows, magnitudes = tuple(p.rows for p in parts), len(named) > 2 * len(parts)
        return LowRankTerm(rows, self.scale, into, magnitudes, dropout), [tensor for *_, tensor in named]


class Linear(GradientSumModule):
    """y = x W^T + bias + adapter(x).

    Args:
        in_size, out_size: K and N of the weight [N, K].

    Attributes:
        matmul: how training multiplies with the weight (ops/matmul.py); evaluation uses the weight's dtype.
        kept: reads the weight if it is quantized: then `weight` is uint8 [N, bytes]; None for one in the compute dtype.
        adapter: low-rank terms, computed with the product; or any module whose output is added, x [T, K] → [T, N]; or
            None.
    """

    def __init__(self, in_size: int, out_size: int, bias: bool = False) -> None:
        super().__init__()
        self.sizes = in_size, out_size  # valid also where a strategy has sharded the weight
        self.weight = nn.Parameter(torch.empty(out_size, in_size))
        self.bias = nn.Parameter(torch.empty(out_size)) if bias else None
        self.matmul: Matmul = PLAIN
        self.kept: Dequantizer | None = None
        self.adapter: nn.Module | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """PyTorch's default; a `ModelSource` overwrites it by `initialize_parameter` or by loaded weights."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x_TK: torch.Tensor, add_TN: torch.Tensor | None = None) -> torch.Tensor:
        """The product plus `add`, [T, N]."""
        recipe, matmul, sums = autograd_functions.get_recipe(x_TK), self.current_matmul(), self.gradient_sums
        into, (term, tensors) = (sums.get("weight"), sums.get("bias")), self.low_rank_term()
        given = (x_TK, self.weight, self.bias, add_TN, recipe, matmul, into, term, *tensors)
        y_TN = autograd_functions.LinearFunction.apply(*given)
        if self.adapter is not None and term is None:
            return y_TN + self.adapter(x_TK)
        if add_TN is None and torch.is_grad_enabled():
            compute, count = recipe.compute, len(tensors)

            def recompute(w: torch.Tensor, bias: torch.Tensor | None, *others: torch.Tensor) -> torch.Tensor:
                x = compute(*others[count:])
                return Projection(matmul, w, bias, term, others[:count]).forward(matmul.prepare(x), x)

            autograd_functions.set_recipe(y_TN, (self.weight, self.bias, *tensors, *recipe.tensors), recompute)
        return y_TN

    def low_rank_term(self) -> tuple[LowRankTerm | None, list[torch.Tensor]]:
        """The low-rank terms of the adapter, and their tensors; None for no adapter, and for any other module."""
        return self.adapter.term() if isinstance(self.adapter, LowRankAdapter) else (None, [])

    def is_fusable(self) -> bool:
        """Whether a function with its own backward may compute this product in place of `forward`."""
        return self.is_plain() and (self.adapter is None or isinstance(self.adapter, LowRankAdapter))

    def current_matmul(self) -> Matmul:
        """The matrix product to use now: evaluation multiplies in the weight's dtype."""
        matmul = self.matmul if torch.is_grad_enabled() else PLAIN
        return self.kept.wrap(matmul) if self.kept else matmul

    def quantize(self, kept: Dequantizer) -> None:
        """Keep the weight in this format, uninitialized."""
        self.kept, (columns, rows) = kept, self.sizes
        packed = torch.empty(rows, kept.form.row_bytes(columns), dtype=torch.uint8, device=self.weight.device)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def is_plain(self) -> bool:
        """Whether a call runs the `forward` above and nothing else."""
        return runs_only(self, Linear.forward)

    def extra_repr(self) -> str:
        return f"{self.sizes[0]}, {self.sizes[1]}, bias={self.bias is not None}"


def common_matmul(readers: Sequence[nn.Module]) -> Matmul:
    """The product by which all of these modules read their input; `PLAIN` if one of them reads it in another way, as a
    hook, an adapter or another class may do."""
    found = [m.current_matmul() if isinstance(m, Linear) and m.is_plain() and not m.adapter else PLAIN for m in readers]
    return found[0] if all(matmul is found[0] for matmul in found) else PLAIN


def apply_linear(module: nn.Module, x_TK: torch.Tensor, add_TN: torch.Tensor) -> torch.Tensor:
    """module(x) + add, in one pass if the module can do that."""
    if isinstance(module, Linear) and module.is_plain():  # hooks must see the module's output without `add`
        return module(x_TK, add_TN)
    return add_TN + module(x_TK)


class RMSNorm(GradientSumModule):
    """x / rms(x) · weight, of a sum: the mean square in fp32, the product in x's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(
        self,
        x_TH: torch.Tensor,
        add_TH: torch.Tensor | None = None,
        keep_sum: bool = True,
        matmul: Matmul = PLAIN,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(x + add, its norm).

        Args:
            keep_sum: whether x + add is kept for the backward; else it is recomputed if possible.
            matmul: of the products that alone read the norm, which may be a stand-in then (ops/prepared.py).
        """
        into = self.gradient_sums.get("weight")
        return autograd_functions.add_norm(x_TH, add_TH, self.weight, self.eps, into, keep_sum, matmul)

    def is_plain(self) -> bool:
        """Whether a call runs the `forward` above and nothing else."""
        return runs_only(self, RMSNorm.forward)


class Embedding(GradientSumModule):
    """Rows of a table. The row `padding` gets no gradient."""

    def __init__(self, vocabulary: int, size: int, padding: int | None) -> None:
        super().__init__()
        self.sizes = vocabulary, size  # valid also where a strategy has sharded the weight
        self.weight = nn.Parameter(torch.empty(vocabulary, size))
        self.padding = padding
        if not self.weight.is_meta:  # there a random draw would import PyTorch's compiler: a second
            nn.init.normal_(self.weight)

    def forward(self, ids_T: torch.Tensor) -> torch.Tensor:
        padding = -1 if self.padding is None else self.padding
        return autograd_functions.Embed.apply(ids_T, self.weight, padding, self.gradient_sums.get("weight"))


class Head(Linear):
    """The output layer: logits, or the summed loss of targets, computed without storing all logits."""

    def forward(self, x_TH: torch.Tensor, targets_T: torch.Tensor | None = None, scale: float = 1.0) -> torch.Tensor:
        if targets_T is None:
            return super().forward(x_TH)
        return linear_cross_entropy(x_TH, self.weight, targets_T, scale, self.gradient_sums.get("weight"))


class TiedHead(Head):
    """An output layer that multiplies with the embedding's weight and adds to its gradient sum. It owns no parameter,
    so that whatever shards, saves or updates parameters finds the weight once, in the embedding."""

    def __init__(self, embedding: Embedding) -> None:
        GradientSumModule.__init__(self)
        self.sizes = embedding.sizes[::-1]
        self.bias, self.matmul, self.kept, self.adapter = None, PLAIN, None, None
        self._embedding = (embedding,)  # in a tuple: not a submodule
        self.gradient_sums = embedding.gradient_sums

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        return self._embedding[0].weight
