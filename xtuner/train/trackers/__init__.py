"""Trackers of metrics: `JsonLines` and `TensorBoard`, which every run has, and those that a config adds."""

from xtuner.train.trackers.base import Tracker, Trackers

__all__ = ["Tracker", "Trackers"]
