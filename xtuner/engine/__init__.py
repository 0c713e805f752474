"""Strategies, memory and state. The names here are those of a config's `optim_wrapper` and `param_scheduler`."""

from xtuner.optim.muon import Muon
from xtuner.optim.optim_wrapper import OptimWrapper
from xtuner.optim.pretraining_schedulers import CosineRestartLR, WarmupStableDecayLR
from xtuner.optim.schedule import ConstantLR, CosineAnnealingLR, LinearLR, MultiStepLR

__all__ = [
    "ConstantLR",
    "CosineAnnealingLR",
    "CosineRestartLR",
    "LinearLR",
    "MultiStepLR",
    "Muon",
    "OptimWrapper",
    "WarmupStableDecayLR",
]
