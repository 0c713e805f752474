"""Where figures go: `JsonLines` and `TensorBoard`, which every run has, and what a config adds."""

from xtuner.train.trackers.base import Tracker, Trackers

__all__ = ["Tracker", "Trackers"]
