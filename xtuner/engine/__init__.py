"""Engines: what a config's `optim_wrapper` and `param_scheduler` name."""

from xtuner.engine.optim import OptimWrapper
from xtuner.engine.schedule import ConstantLR, CosineAnnealingLR, LinearLR, MultiStepLR

__all__ = ["ConstantLR", "CosineAnnealingLR", "LinearLR", "MultiStepLR", "OptimWrapper"]
