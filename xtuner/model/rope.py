"""Rotary position embedding, half-split, with linear, dynamic-NTK, llama3 and yarn scaling.

A table has the angles of every token of a micro-batch, cos and sin [T, D/2], computed once and used by all layers.
Dynamic NTK enlarges the base for each document longer than `max_position_embeddings` m, by the document's length s and
the factor f:  theta · (f·s/m − (f − 1))^(D/(D−2)). Documents of at most m tokens keep the base.

llama3 and yarn (arXiv:2309.00071) divide low frequencies by the factor and keep high ones, whatever a document's
length. Between the two they mix both: llama3 by the number of rotations in the original context, yarn by the
frequency's index. yarn also multiplies cos and sin, and so the logits of attention.

Frequencies are fp32 numbers, as in the reference. The product with a position is rounded to fp32 too as long as
positions stay below EXACT_FROM: cos and sin are then within 2^-10 of those of the exact product. At a million tokens
they would be off by up to 2^-5, more than bf16's rounding (2^-9). From EXACT_FROM on the product is taken in fp64 and
reduced modulo 2π before it is rounded: cos and sin are within 4e-7. A position's angle does not depend on what else is
in the micro-batch, nor (without dynamic NTK) on how the document continues.
"""

import math
from dataclasses import dataclass

import torch

from xtuner.families.network import RopeScaling

EXACT_FROM = 32768  # position; the bits of shorter documents' angles are part of what resumed runs reproduce
SLICE = 32768  # tokens whose fp64 angles exist at once: 16 MiB for heads of 128


@dataclass(frozen=True)
class Rope:
    """Frequencies of a model. `head_dim` D is even."""

    head_dim: int
    theta: float
    max_position_embeddings: int
    scaling: RopeScaling | None = None

    def table(
        self, position_ids: torch.Tensor, cu_seqlens: torch.Tensor, longest: int, lengths: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin), fp32 [T, D/2], of tokens at `position_ids` [T] in fragments with borders `cu_seqlens` [n + 1].

        Args:
            longest: all positions are below it. Known on the host, so that the GPU need not be waited for.
            lengths: [n], of the document of each fragment; None if fragments are complete documents.
        """
        num_tokens, device = len(position_ids), position_ids.device
        if self.scaling is None or self.scaling.kind != "dynamic":
            theta = torch.full((1,), self.theta, device=device)  # a copy from the host would wait for the GPU
        else:
            theta = self._dynamic_theta(cu_seqlens.diff() if lengths is None else lengths)
        frequency_nD = self._frequencies(theta)
        row_T = None
        if len(frequency_nD) > 1:  # a single document may be longer than `position_ids`: the other tokens are cached
            token_T = torch.arange(num_tokens, dtype=cu_seqlens.dtype, device=device)
            row_T = torch.searchsorted(cu_seqlens[1:], token_T, right=True)
        cos_TD, sin_TD = (torch.empty(num_tokens, self.head_dim // 2, device=device) for _ in range(2))
        for begin in range(0, num_tokens, SLICE):
            tokens = slice(begin, begin + SLICE)
            frequency = frequency_nD if row_T is None else frequency_nD[row_T[tokens]]
            angle = self._angles(position_ids[tokens, None], frequency, longest)
            torch.cos(angle, out=cos_TD[tokens])
            torch.sin(angle, out=sin_TD[tokens])
        if self.scaling and (factor := self.scaling.cos_sin_factor) != 1:
            cos_TD, sin_TD = cos_TD.mul_(factor), sin_TD.mul_(factor)
        return cos_TD, sin_TD

    def _angles(self, position_T1: torch.Tensor, frequency_TD: torch.Tensor, longest: int) -> torch.Tensor:
        """Position times frequency, fp32 [T, D/2], modulo 2π from EXACT_FROM on."""
        factor = self.scaling.factor if self.scaling and self.scaling.kind == "linear" else 1.0
        rounded = position_T1.float() / factor * frequency_TD
        if longest <= EXACT_FROM:
            return rounded
        exact = (position_T1.double() / factor * frequency_TD.double()).remainder_(2 * math.pi).float()
        return torch.where(position_T1 < EXACT_FROM, rounded, exact)

    def _dynamic_theta(self, length_n: torch.Tensor) -> torch.Tensor:
        """Base of each document, fp32 [n]; from EXACT_FROM on computed in fp64, as by the reference."""
        assert self.scaling is not None
        f, m, d = self.scaling.factor, self.max_position_embeddings, self.head_dim

        def theta(length: torch.Tensor) -> torch.Tensor:
            stretch = (f * length / m - (f - 1)).clamp(min=1.0)
            return self.theta * torch.where(length > m, stretch ** (d / (d - 2)), 1.0)

        return torch.where(length_n > EXACT_FROM, theta(length_n.double()).float(), theta(length_n.float()))

    def _frequencies(self, theta: torch.Tensor) -> torch.Tensor:
        """theta^(-2i/D) for i < D/2, fp32, shape theta.shape + [D/2]; with llama3 and yarn as these change them."""
        exponent_D = torch.arange(0, self.head_dim, 2, device=theta.device).float() / self.head_dim
        period = theta[..., None].float() ** exponent_D
        kept, s = 1.0 / period, self.scaling
        if s is None or s.kind not in ("llama3", "yarn"):
            return kept
        context = s.original_max_position_embeddings
        assert context is not None
        if s.kind == "llama3":
            rotations = context / (2 * math.pi / kept)
            share = ((rotations - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
            return (1 - share) * kept / s.factor + share * kept
        share = 1 - self._yarn_ramp(s, context, theta.device)
        return 1.0 / (s.factor * period) * (1 - share) + kept * share

    def _yarn_ramp(self, s: RopeScaling, context: int, device: torch.device) -> torch.Tensor:
        """How much of each frequency is divided by the factor, fp32 [D/2]: 0 up to an index, 1 from another on."""

        def find_index(rotations: float) -> float:
            """Of the frequency that rotates so often in the original context."""
            return self.head_dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = find_index(s.beta_fast), find_index(s.beta_slow)
        if s.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.head_dim - 1)
        high += 0.001 * (low == high)
        index_D = torch.arange(self.head_dim // 2, dtype=torch.float32, device=device)
        return ((index_D - low) / (high - low)).clamp(0, 1)


def rotate(x_TND: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (x[i], x[i + D/2]) by each token's angles. Computed in fp32, returned in x's dtype."""
    a, b = x_TND.float().chunk(2, dim=-1)
    cos, sin = cos_TD[:, None], sin_TD[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_TND.dtype)
