"""The parts of parameters that a process has, and how they receive values from full parameters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from xtuner.model.ops.low_rank import Rows
from xtuner.model.ops.quantized import FORMATS, QuantizedFormat


@dataclass(frozen=True)
class FlatRange:
    """Elements [begin, begin + len(values)) of a flattened parameter: one process's part of it."""

    values: torch.Tensor  # [n], a view: writing to it changes the parameter
    begin: int = 0

    @classmethod
    def from_parameter(cls, parameter: torch.Tensor) -> "FlatRange":
        return cls(parameter.data.view(-1))

    def read(self) -> torch.Tensor:
        """The fp32 values [n]."""
        return self.values.float()

    @torch.no_grad()
    def copy_from(self, full: torch.Tensor) -> None:
        """Copy this range from the full parameter, casting to the range's dtype."""
        self.values.copy_(full.reshape(-1)[self.begin : self.begin + len(self.values)])


@dataclass(frozen=True, kw_only=True)
class QuantizedRange(FlatRange):
    """Elements of a flattened weight [N, bytes] of ops/quantized.py."""

    form: QuantizedFormat

    @torch.no_grad()
    def copy_from(self, full: torch.Tensor) -> None:
        super().copy_from(self.form.quantize(full.to(self.values.device)))


def make_range(values: torch.Tensor, begin: int, frozen_weights: str) -> FlatRange:
    """The range of a parameter's elements, or of the bytes of one that is quantized in this format."""
    if values.dtype == torch.uint8:
        return QuantizedRange(values, begin, form=FORMATS[frozen_weights])
    return FlatRange(values, begin)


class Receiver(Protocol):
    """What a full parameter is copied to."""

    def copy_from(self, full: torch.Tensor) -> None: ...


class RowNorms:
    """Copies a weight, and its row norms to other ranges.

    Args:
        weight: the weight's own range, if this process has any of it.
        norms: ranges of the norms, by the rows of the weight.
        keep: returns the weight's values as they are kept.
    """

    def __init__(
        self, weight: Receiver | None, norms: Mapping[Rows, Receiver], keep: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        self._weight, self._norms, self._keep = weight, norms, keep

    @torch.no_grad()
    def copy_from(self, full: torch.Tensor) -> None:
        if self._weight is not None:
            self._weight.copy_from(full)
        found = torch.linalg.vector_norm(self._keep(full).float(), dim=1)
        for rows, into in self._norms.items():
            into.copy_from(rows.of(found).flatten())
