"""A run as hooks see it: everything it is made of, what an iteration did, and what a hook may do about it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from xtuner.config.config import Config
from xtuner.data.loader import PackLoader
from xtuner.dist.mesh import Mesh
from xtuner.engine.base import Strategy
from xtuner.engine.choose import Choice
from xtuner.engine.optim import OptimWrapper
from xtuner.engine.schedule import Schedule
from xtuner.model.source import ModelSource
from xtuner.train.saver import Saver
from xtuner.train.state import TrainState
from xtuner.train.trackers import Trackers


@dataclass
class Run:
    """Everything of one run; what hooks see."""

    config: Config
    work_dir: Path
    device: torch.device
    source: ModelSource
    optim: OptimWrapper
    loader: PackLoader
    hooks: list["Hook"]
    max_epochs: int
    mesh: Mesh
    state: TrainState = field(init=False, default_factory=TrainState)
    without_targets: int = field(init=False, default=0)  # iterations of this start that had no token to learn from
    # iteration of the newest save, and whether it can be resumed
    saved: tuple[int, bool] = field(init=False, default=(-1, False))

    data_facts: dict[str, Any] = field(init=False)  # identity of the data as they were when the run began
    data_files: list[str] | int = field(init=False)  # by name, to say which have changed
    max_iterations: int = field(init=False)
    make_schedule: Callable[[], Schedule] = field(init=False)  # for the packs an iteration takes when it is called
    schedule: Schedule = field(init=False)  # made when it is known what an iteration is: a resume may change that
    choice: Choice = field(init=False)  # which strategy it will be
    strategy: Strategy = field(init=False)
    metrics: Trackers = field(init=False)
    saver: Saver = field(init=False)
    log: Path = field(init=False)  # of this rank

    def plan(self) -> None:
        """Work out what follows from the packs an iteration takes."""
        self.max_iterations = self.total_packs // self.packs_per_iteration
        self.loader.accumulative_counts = self.optim.accumulative_counts
        self.make_schedule = lambda: Schedule(self.optim.lr)
        for hook in self.hooks:
            hook.configure(self)

    @property
    def packs_per_iteration(self) -> int:
        return self.optim.accumulative_counts * self.loader.dp_size

    @property
    def packs_per_epoch(self) -> int:
        return self.loader.packs_per_epoch

    @property
    def total_packs(self) -> int:
        return self.packs_per_epoch * self.max_epochs

    def facts(self) -> dict[str, Any]:
        """What the run depends on, kept with every checkpoint."""
        return {
            "data": self.data_facts,
            "files": self.data_files,
            "packs_per_iteration": self.packs_per_iteration,
            "max_iterations": self.max_iterations,
            "ranks": self.loader.dp_size,
            "begun_on": self.loader.begun_on,
            "balance": self.loader.balance,
            "windows_from": self.loader.windows_from,
            "config": self.config.resolved(),
        }

    def save(self, optimizer: bool = True, keep: int = -1, last: bool = False) -> None:
        """Save the present state, unless that has been done; with `last`, wait until it is on the disk."""
        iteration, resumable = self.saved
        if iteration != self.state.iteration or (optimizer and not resumable):
            facts = {**self.facts(), "strategy": self.strategy.name}
            self.saver.save(self.state, self.strategy, facts, optimizer, keep)
            self.saved = self.state.iteration, optimizer
        if last:
            self.saver.finish(last=True)


@dataclass
class Iteration:
    """What one iteration did. Hooks add to `record`, which becomes the log line."""

    state: TrainState  # after it
    lr: float
    loss: float
    grad_norm: float
    applied: bool
    num_targets: int
    num_tokens: int  # of this rank
    attention_pairs: float  # Σ len² of a rank's packs, the mean of all ranks
    data_time: float  # s this rank waited for packs
    record: dict[str, Any] = field(default_factory=dict)


class Hook:
    priority = 50

    def configure(self, run: Run) -> None: ...
    def before_run(self, run: Run) -> None: ...
    def after_iteration(self, run: Run, it: Iteration) -> None: ...
    def after_run(self, run: Run) -> None: ...
