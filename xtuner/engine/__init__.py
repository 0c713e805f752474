"""Engines: what a config's `optim_wrapper` and `param_scheduler` name."""

from xtuner.engine.optim import OptimWrapper
from xtuner.engine.schedule import CosineAnnealingLR, LinearLR

__all__ = ["CosineAnnealingLR", "LinearLR", "OptimWrapper"]
