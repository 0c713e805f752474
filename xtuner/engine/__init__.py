"""Strategies, memory and state. The names here are those of a config's `optim_wrapper` and `param_scheduler`."""

from xtuner.optim.optim_wrapper import OptimWrapper
from xtuner.optim.schedule import ConstantLR, CosineAnnealingLR, LinearLR, MultiStepLR

__all__ = ["ConstantLR", "CosineAnnealingLR", "LinearLR", "MultiStepLR", "OptimWrapper"]
