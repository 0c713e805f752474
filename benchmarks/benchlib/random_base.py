"""LoRA on a base of random weights, which `xtuner train` refuses outside benchmarks: nothing of use is learnt."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from xtuner.model import from_scratch, lora
from xtuner.model.adapters.lora import build_lora
from xtuner.model.source import ModelSource


def from_scratch_with_adapter(
    frozen_weights: str, rank: int, alpha: int, targets: Sequence[str], **given: Any
) -> ModelSource:
    """`from_scratch` with an adapter. Its checkpoints are of no use, as no folder has the base."""
    source = from_scratch(**given)
    terms = build_lora(lora(rank=rank, alpha=alpha, targets=list(targets)), source.config)
    return replace(source, adapter=terms, frozen_weights=frozen_weights)
