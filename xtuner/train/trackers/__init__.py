"""Trackers of metrics: `JsonLines` and `TensorBoard`, which every run has, and those that a config adds."""

from xtuner.train.trackers.base import Tracker
from xtuner.train.trackers.swanlab import SwanLab
from xtuner.train.trackers.wandb import Wandb

__all__ = ["SwanLab", "Tracker", "Wandb"]
