"""Engines: what a config's `optim_wrapper` and `param_scheduler` name."""

from xtuner.optim.optim_wrapper import OptimWrapper
from xtuner.optim.schedule import ConstantLR, CosineAnnealingLR, LinearLR, MultiStepLR

__all__ = ["ConstantLR", "CosineAnnealingLR", "LinearLR", "MultiStepLR", "OptimWrapper"]
