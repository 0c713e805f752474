"""The modules that own weights: each knows how it multiplies, where its gradient is summed, whether it has an adapter.

A module's `forward` is all there is: training, evaluation and generation call it. Subclasses that override it, modules
that wrap it and modules put in its place take effect wherever the network is used.
"""

import math

import torch
from torch import nn

from xtuner.model.loss import linear_cross_entropy
from xtuner.model.ops import functions
from xtuner.model.ops.gradient_sums import GradientSum
from xtuner.model.ops.matmul import OWN, Products


class OwnsSums(nn.Module):
    """A module whose functions add the gradients of its parameters to sums of its own (ops/sums.py)."""

    def __init__(self) -> None:
        super().__init__()
        self.gradient_sums: dict[str, GradientSum] = {}  # by parameter, of this module alone; empty: autograd's


class Linear(OwnsSums):
    """y = x W^T + bias + adapter(x).

    Args:
        in_size, out_size: K and N of the weight [N, K].

    Attributes:
        products: how training multiplies with the weight (ops/products.py); evaluation does so in the weight's dtype.
        adapter: a module whose output is added: x [T, K] → [T, N]. None for none.
    """

    def __init__(self, in_size: int, out_size: int, bias: bool = False) -> None:
        super().__init__()
        self.sizes = in_size, out_size  # also where an engine has taken the weight apart
        self.weight = nn.Parameter(torch.empty(out_size, in_size))
        self.bias = nn.Parameter(torch.empty(out_size)) if bias else None
        self.products: Products = OWN
        self.adapter: nn.Module | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """PyTorch's own start for a linear layer; models of a source get theirs from `decoder.initialize`."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x_TK: torch.Tensor, add_TN: torch.Tensor | None = None) -> torch.Tensor:
        """[T, N]: the product; `add` is added to it."""
        recipe, p, sums = functions.recipe_of(x_TK), self.products_now(), self.gradient_sums
        into = (sums.get("weight"), sums.get("bias"))
        y_TN = functions.Product.apply(x_TK, self.weight, self.bias, add_TN, recipe, p, into)
        if self.adapter is not None:
            return y_TN + self.adapter(x_TK)
        if add_TN is None and torch.is_grad_enabled():
            compute = recipe.compute
            again = lambda w, bias, *inputs: p.forward(p.rows(compute(*inputs)), w, bias)  # noqa: E731
            functions.set_recipe(y_TN, (self.weight, self.bias, *recipe.tensors), again)
        return y_TN

    def products_now(self) -> Products:
        """How to multiply: what is not training does so in the weight's dtype."""
        return self.products if torch.is_grad_enabled() else OWN

    def is_plain(self) -> bool:
        """Whether nothing but `forward` as it is above happens when the module is called."""
        hooks = self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks
        return type(self).forward is Linear.forward and not hooks

    def extra_repr(self) -> str:
        return f"{self.sizes[0]}, {self.sizes[1]}, bias={self.bias is not None}"


def multiply(module: nn.Module, x_TK: torch.Tensor, add_TN: torch.Tensor) -> torch.Tensor:
    """module(x) + add, in one pass where the module can."""
    if isinstance(module, Linear) and module.is_plain():  # a hook is to see the module's own output
        return module(x_TK, add_TN)
    return add_TN + module(x_TK)


class RMSNorm(OwnsSums):
    """x / rms(x) · weight, of a sum: the mean square in fp32, the product in x's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(
        self, x_TH: torch.Tensor, add_TH: torch.Tensor | None = None, keep_sum: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(x + add, its norm).

        Args:
            keep_sum: whether x + add is kept for the backward; else it is computed again, where that is possible.
        """
        return functions.add_norm(x_TH, add_TH, self.weight, self.eps, self.gradient_sums.get("weight"), keep_sum)


class Embedding(OwnsSums):
    """Rows of a table. The row `padding` gets no gradient."""

    def __init__(self, vocabulary: int, size: int, padding: int | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, size))
        self.padding = padding
        nn.init.normal_(self.weight)

    def forward(self, ids_T: torch.Tensor) -> torch.Tensor:
        padding = -1 if self.padding is None else self.padding
        return functions.Embed.apply(ids_T, self.weight, padding, self.gradient_sums.get("weight"))


class Head(Linear):
    """The output layer: logits, or the summed loss of targets without holding all logits."""

    def forward(self, x_TH: torch.Tensor, targets_T: torch.Tensor | None = None, scale: float = 1.0) -> torch.Tensor:
        if targets_T is None:
            return super().forward(x_TH)
        return linear_cross_entropy(x_TH, self.weight, targets_T, scale, self.gradient_sums.get("weight"))
