"""Low-rank terms of products with weights (LoRA, DoRA), for use inside functions with their own backward.

    z = x w^T + scale · dropout(x) A^T B^T        A [R, K], B [N, R]
    y = z + bias + add                            with magnitudes: y = m / |w + scale · B A| · z + bias + add

A backward needs x and d alone: x A^T is computed again, which costs R/N of a product. A term has one pair of factors,
or one for each of several parts of the weight's rows (q, k and v of the joint projection). Parts are multiplied at
once: A's rows are laid end to end, and B is zero outside the rows of each part.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from xtuner.model.ops.gradient_sums import GradientSum, add_gradient
from xtuner.model.ops.matmul import Matmul
from xtuner.model.ops.prepared import PreparedRows


@dataclass(frozen=True)
class Rows:
    """Rows [begin, end) of each of `groups` equal groups of a weight's rows; all rows by default."""

    groups: int = 1
    begin: int = 0
    end: int | None = None

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """These rows of [N, …], as a view [groups, rows, …]."""
        return tensor.view(self.groups, -1, *tensor.shape[1:])[:, self.begin : self.end]


@dataclass
class DropoutSeed:
    """The seed of all masks of a micro-batch: the strategy sets it, and a block that is recomputed finds the same."""

    value: int = 0


@dataclass(frozen=True)
class Dropout:
    """Zeroes inputs of a term with probability `p`. The mask is a function of the seed, `key` and the tile of tokens,
    so that the backward, and blocks that are recomputed, draw the same."""

    p: float
    key: int
    seed: DropoutSeed

    def __call__(self, x_TK: torch.Tensor, tile: int) -> torch.Tensor:
        generator = torch.Generator(x_TK.device)
        generator.manual_seed(hash((self.seed.value, self.key, tile)) % 2**63)
        mask = torch.empty_like(x_TK).bernoulli_(1 - self.p, generator=generator)
        return mask.mul_(x_TK).mul_(1 / (1 - self.p))


@dataclass(frozen=True)
class LowRankTerm:
    """
    Args:
        parts: the rows of each pair of factors.
        scale: what B A is multiplied by.
        into: gradient sums of the tensors, in their order: A and B of each part; then, if any, the magnitudes of each.
        magnitudes: whether there are magnitudes.
        dropout: None without.
    """

    parts: tuple[Rows, ...]
    scale: float
    into: tuple[GradientSum | None, ...]
    magnitudes: bool = False
    dropout: Dropout | None = None

    @property
    def num_tensors(self) -> int:
        return (2 + self.magnitudes) * len(self.parts)


class Projection:
    """One weight with its bias and low-rank term in a forward or backward; gradients of the term's tensors are added up
    over tiles of tokens.

    Args:
        term: None for a plain product.
        tensors: those of the term.
        into: the weight's gradient sum, for `backward`.
    """

    def __init__(
        self,
        matmul: Matmul,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        term: LowRankTerm | None,
        tensors: Sequence[torch.Tensor],
        into: GradientSum | None = None,
    ) -> None:
        self.matmul, self.weight, self.bias, self.term, self.tensors = matmul, weight, bias, term, tensors
        self.into = into
        self._sums: dict[str, torch.Tensor] = {}
        self._up: dict[int, torch.Tensor] = {}  # d B by tile: small, and both halves of a backward need it
        if term is None:
            return
        pairs = tensors[: 2 * len(term.parts)]
        self.a = pairs[0] if len(pairs) == 2 else torch.cat(tuple(pairs[0::2]))  # [R, K]
        self.b = join_columns(term.parts, pairs[1::2], len(weight))  # [N, R]
        self.gain = self._compute_gain() if term.magnitudes else None  # [N]

    def forward(
        self, rows: PreparedRows, x_TK: torch.Tensor, add_TN: torch.Tensor | None = None, tile: int = 0
    ) -> torch.Tensor:
        """y. Args: rows: x as the product needs it."""
        if self.term is None:
            return self.matmul.forward(rows, self.weight, self.bias, add_TN)
        if self.gain is None:
            y = self.matmul.forward(rows, self.weight, self.bias, add_TN)
            return y.addmm_(self._down(x_TK, tile), self.b.T)
        y = self._product(rows, x_TK, tile).mul_(self.gain)
        for other in (self.bias, add_TN):
            if other is not None:
                y += other
        return y

    def backward(
        self, rows: PreparedRows, d_TN: torch.Tensor, add_TK: torch.Tensor | None = None, tile: int = 0
    ) -> torch.Tensor:
        """The gradient of x, plus `add`. Args: rows: d as the product needs it."""
        dz = self._scaled(d_TN)
        dx = self.matmul.backward(rows if dz is d_TN else self.matmul.prepare(dz), self.weight, add_TK, self.into)
        if self.term is None:
            return dx
        du, dropout = self._up.setdefault(tile, dz @ self.b), self.term.dropout
        if dropout is None:
            return dx.addmm_(du, self.a, alpha=self.term.scale)
        ones = torch.ones_like(dx)  # the mask
        return dx.addcmul_(du @ self.a, dropout(ones, tile), value=self.term.scale)

    def add_gradients(self, d_TN: torch.Tensor, x_TK: torch.Tensor, tile: int = 0) -> None:
        """Add a tile's gradients of the term's tensors. Those of magnitudes need z, which is computed again."""
        if self.term is None:
            return
        dz = self._scaled(d_TN)
        dropped = self._dropped(x_TK, tile)
        u, du = self._down(x_TK, tile, dropped), self._up.pop(tile, None)
        self._add("b", _multiply_in_fp32(dz.T, u))
        self._add("a", _multiply_in_fp32((dz @ self.b if du is None else du).T, dropped).mul_(self.term.scale))
        if self.gain is not None:
            z = self._product(self.matmul.prepare(x_TK), x_TK, tile)
            self._add("m", (d_TN * z).sum(0, dtype=torch.float32) / self.norms)

    def gradients(self) -> list[torch.Tensor | None]:
        """Gradients of the term's tensors for autograd: None where they went to a gradient sum."""
        if self.term is None:
            return []
        if not self._sums:
            return [None] * len(self.tensors)
        parts, at, found = self.term.parts, 0, []
        for part, a in zip(parts, self.tensors[0 : 2 * len(parts) : 2], strict=True):
            columns = slice(at, at + len(a))
            found += [self._sums["a"][columns], part.of(self._sums["b"])[..., columns].flatten(0, 1)]
            at += len(a)
        found += [part.of(self._sums["m"]).flatten() for part in parts if self.term.magnitudes]
        given = zip(self.term.into, found, self.tensors, strict=True)
        return [add_gradient(into, gradient, tensor.dtype) for into, gradient, tensor in given]

    def _add(self, key: str, gradient: torch.Tensor) -> None:
        if key in self._sums:
            self._sums[key] += gradient
        else:
            self._sums[key] = gradient

    def _product(self, rows: PreparedRows, x_TK: torch.Tensor, tile: int) -> torch.Tensor:
        """z."""
        return self.matmul.forward(rows, self.weight).addmm_(self._down(x_TK, tile), self.b.T)

    def _dropped(self, x_TK: torch.Tensor, tile: int) -> torch.Tensor:
        assert self.term
        return x_TK if self.term.dropout is None else self.term.dropout(x_TK, tile)

    def _down(self, x_TK: torch.Tensor, tile: int, dropped: torch.Tensor | None = None) -> torch.Tensor:
        """scale · dropout(x) A^T, [T, R]."""
        assert self.term
        dropped = self._dropped(x_TK, tile) if dropped is None else dropped
        return (dropped @ self.a.T).mul_(self.term.scale)

    def _scaled(self, d_TN: torch.Tensor) -> torch.Tensor:
        """The gradient of z."""
        return d_TN if self.term is None or self.gain is None else d_TN * self.gain

    def _compute_gain(self) -> torch.Tensor:
        """m / |w + scale · B A|, by rows. As in DoRA's paper, its gradient treats the norms as constants."""
        assert self.term
        self.norms = row_norms(self.matmul.read(self.weight), self.a, self.b, self.term.scale)
        magnitudes = self.norms.clone()  # rows outside all parts are not changed
        for part, m in zip(self.term.parts, self.tensors[2 * len(self.term.parts) :], strict=True):
            rows = part.of(magnitudes)
            rows.copy_(m.view(rows.shape))
        return (magnitudes / self.norms).to(self.b.dtype)


def row_norms(w_NK: torch.Tensor, a_RK: torch.Tensor, b_NR: torch.Tensor, scale: float) -> torch.Tensor:
    """|w + scale · B A| by rows, in fp32, in slices of rows: a full matrix in fp32 takes much memory."""
    slices = zip(w_NK.split(1024), b_NR.split(1024), strict=True)
    a = a_RK.float()
    return torch.cat(
        [torch.linalg.vector_norm(torch.addmm(w.float(), b.float(), a, alpha=scale), dim=1) for w, b in slices]
    )


def _multiply_in_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


def join_columns(parts: Sequence[Rows], factors: Sequence[torch.Tensor], total: int) -> torch.Tensor:
    """B of all parts, [N, R]: zero outside the rows of each."""
    if len(factors) == 1 and parts[0].end is None:
        return factors[0]
    width = sum(b.shape[1] for b in factors)
    joined = factors[0].new_zeros(total, width)
    at = 0
    for part, b in zip(parts, factors, strict=True):
        part.of(joined)[..., at : at + b.shape[1]] = b.view(part.groups, -1, b.shape[1])
        at += b.shape[1]
    return joined
