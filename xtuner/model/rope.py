"""Rotary position embedding, half-split, with linear and dynamic-NTK scaling per document.

A table has the angles of every token of a micro-batch, cos and sin [T, D/2], computed once in fp32 and used by all
layers. Dynamic NTK enlarges the base for each document longer than `max_position_embeddings` m, by the document's
length s and the factor f:  theta · (f·s/m − (f − 1))^(D/(D−2)). Documents of at most m tokens keep the base.
"""

from dataclasses import dataclass

import torch

from xtuner.families.network import RopeScaling


@dataclass(frozen=True)
class Rope:
    """Frequencies of a model. `head_dim` D is even."""

    head_dim: int
    theta: float
    max_position_embeddings: int
    scaling: RopeScaling | None = None

    def table(
        self, position_ids: torch.Tensor, cu_seqlens: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin), fp32 [T, D/2], of tokens at `position_ids` [T] in fragments with borders `cu_seqlens` [n + 1].

        Args:
            lengths: [n], of the document of each fragment; None if fragments are complete documents.
        """
        position = position_ids.float()
        if self.scaling is None or self.scaling.kind == "linear":
            theta = torch.full((), self.theta, device=position.device)  # a copy from the host would wait for the GPU
            frequency_D = self._frequencies(theta)
            if self.scaling is not None:
                position = position / self.scaling.factor
            angle_TD = position[:, None] * frequency_D
        else:
            count_n = cu_seqlens.diff()
            frequency_nD = self._frequencies(self._dynamic_theta(count_n if lengths is None else lengths))
            if len(count_n) > 1:  # a single document may be longer than `position_ids`: the other tokens are cached
                frequency_nD = frequency_nD.repeat_interleave(count_n, dim=0, output_size=len(position))
            angle_TD = position[:, None] * frequency_nD
        return angle_TD.cos(), angle_TD.sin()

    def _dynamic_theta(self, length_n: torch.Tensor) -> torch.Tensor:
        """Base of each document, fp32 [n]."""
        assert self.scaling is not None
        f, m, d = self.scaling.factor, self.max_position_embeddings, self.head_dim
        stretch = (f * length_n.float() / m - (f - 1)).clamp(min=1.0)
        return self.theta * torch.where(length_n > m, stretch ** (d / (d - 2)), torch.ones_like(stretch))

    def _frequencies(self, theta: torch.Tensor) -> torch.Tensor:
        """theta^(-2i/D) for i < D/2, fp32, shape theta.shape + [D/2]."""
        exponent_D = torch.arange(0, self.head_dim, 2, device=theta.device).float() / self.head_dim
        return 1.0 / theta[..., None].float() ** exponent_D


def rotate(x_TND: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (x[i], x[i + D/2]) by each token's angles. Computed in fp32, returned in x's dtype."""
    a, b = x_TND.float().chunk(2, dim=-1)
    cos, sin = cos_TD[:, None], sin_TD[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_TND.dtype)
