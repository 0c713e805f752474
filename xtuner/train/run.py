"""The three stages of a run. Each is complete before the next one starts and does not change afterwards:

    Settings   the objects that config and command line describe, except weights   preflight.prepare_settings
    Plan       what follows from them and from the checkpoint to resume            plan.make_plan
    Run        everything that trains; hooks receive it                            trainer

`Progress` is the mutable part: what the run has done so far.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from xtuner.config.config import Config
from xtuner.core.log import logger
from xtuner.core.secrets import mask_text
from xtuner.data.loading.loader import PackLoader
from xtuner.data.loading.sampler import InternRepoSampler, packs_per_epoch
from xtuner.data.packing.pack import PackedDataset
from xtuner.dist.mesh import Mesh
from xtuner.engine.base import Strategy
from xtuner.engine.strategies.select import Choice
from xtuner.model.source import ModelSource
from xtuner.optim.optim_wrapper import OptimWrapper
from xtuner.optim.schedule import Schedule
from xtuner.train.checkpoints.async_saver import AsyncSaver
from xtuner.train.reporting.rank_times import RankTimes
from xtuner.train.state import TrainState
from xtuner.train.trackers.group import Trackers


@dataclass(frozen=True)
class Settings:
    config: Config
    work_dir: Path
    device: torch.device
    mesh: Mesh
    source: ModelSource
    optim: OptimWrapper
    dataset: PackedDataset
    sampler: InternRepoSampler
    hooks: tuple["Hook", ...]  # in the order in which they are called


@dataclass(frozen=True)
class Lengths:
    """Numbers of packs per iteration, per epoch and of the run.

    Args:
        dp_size: data-parallel ranks; begun_on: their number when the run was started.
        accumulative_counts: packs per data-parallel rank and iteration.
        num_packs: of the data.
    """

    dp_size: int
    begun_on: int
    accumulative_counts: int
    num_packs: int
    max_epochs: int

    @property
    def packs_per_iteration(self) -> int:
        return self.accumulative_counts * self.dp_size

    @property
    def packs_per_epoch(self) -> int:
        return packs_per_epoch(self.num_packs, self.begun_on)

    @property
    def total_packs(self) -> int:
        return self.packs_per_epoch * self.max_epochs

    @property
    def max_iterations(self) -> int:
        return self.total_packs // self.packs_per_iteration


@dataclass(frozen=True)
class Plan(Lengths):
    """What a run will do.

    Args:
        reshuffle: a new order of packs in each epoch.
        balance: how packs are assigned to ranks; windows_from: see `PackLoader`.
        schedule: the learning rate of every iteration.
        choice: the strategy, and how it uses the memory.
        facts: what a resume compares; saved with every checkpoint.
    """

    reshuffle: bool
    balance: int
    windows_from: int
    schedule: Schedule
    choice: Choice
    facts: Mapping[str, Any]

    def loader(self, settings: Settings) -> PackLoader:
        return PackLoader(
            settings.dataset,
            settings.sampler,
            settings.config.setting("train_dataloader.num_workers"),
            self.balance,
            accumulative_counts=self.accumulative_counts,
            reshuffle=self.reshuffle,
            begun_on=self.begun_on,
            windows_from=self.windows_from,
            pairs=settings.source.config.attention_pairs,
        )


@dataclass
class Progress:
    """What a run has done so far.

    Args:
        saved: iteration of the newest save, and whether it has optimizer state.
        without_targets: iterations since this start that had no token to learn from.
    """

    state: TrainState = field(default_factory=TrainState)
    saved: tuple[int, bool] = (-1, False)
    without_targets: int = 0


@dataclass(frozen=True)
class Run(Settings):
    """Everything that one run uses.

    Args:
        log: the log file of this rank.
    """

    plan: Plan
    loader: PackLoader
    strategy: Strategy
    metrics: Trackers
    saver: AsyncSaver
    log: Path
    progress: Progress

    @property
    def state(self) -> TrainState:
        return self.progress.state

    @property
    def max_iterations(self) -> int:
        return self.plan.max_iterations

    def save(self, optimizer: bool = True, keep: int = -1, last: bool = False) -> None:
        """Save the current state, unless it has been saved; with `last`, wait until it is on the disk."""
        iteration, resumable = self.progress.saved
        if iteration != self.state.iteration or (optimizer and not resumable):
            facts = {**self.plan.facts, "strategy": self.strategy.name}
            self.saver.save(self.state, self.strategy, facts, optimizer, keep)
            self.progress.saved = self.state.iteration, optimizer
        if last:
            self.saver.finish(last=True)


@dataclass(frozen=True)
class SourceLoss:
    """The targets of one source of a mixture in an iteration, of all ranks, and the sum of their losses in nats."""

    name: str
    loss: float
    targets: int


@dataclass
class Iteration:
    """The result of one iteration. Hooks add to `record`, which becomes the log line."""

    state: TrainState  # after it
    lr: float
    loss: float
    grad_norm: float
    applied: bool
    num_targets: int
    num_tokens: int  # of this rank
    attention_pairs: float  # of a rank's packs (model/flops.py), mean over ranks
    data_time: float  # s that this rank waited for packs
    record: dict[str, Any] = field(default_factory=dict)
    sources: tuple[SourceLoss, ...] = ()  # of a mixture
    ranks: tuple[RankTimes, ...] = ()  # the newest times of all ranks, if there are several


class Hook:
    """An extension of the training loop that a config adds: it observes and saves. Called on every rank, by `priority`.

    An error in one of the first four methods ends the run. One in `on_error` or `on_end` is only logged.
    """

    priority = 50

    def before_run(self, run: Run) -> None:
        """Before the first iteration, with the weights and state that the run starts from."""

    def after_iteration(self, run: Run, it: Iteration) -> None: ...

    def after_checkpoint(self, run: Run, folder: Path) -> None:
        """A checkpoint is complete on the disk. Ranks may call this at different iterations: use no collectives."""

    def after_run(self, run: Run) -> None:
        """After the last iteration; not called if the run is stopped or fails."""

    def on_error(self, run: Run, error: BaseException) -> None:
        """The run ends with this error."""

    def on_end(self, run: Run) -> None:
        """Called last, however the run ends, if `before_run` was called."""


@contextlib.contextmanager
def run_hooks(run: Run) -> Iterator[None]:
    """Call `before_run` of all hooks; after the block call `on_error` and `on_end`, in reverse order."""
    begun: list[Hook] = []

    def call(hook: Hook, name: str, *more: Any) -> None:
        try:
            getattr(hook, name)(run, *more)
        except Exception as e:
            logger.warning(f"{type(hook).__name__}.{name} failed: {mask_text(f'{type(e).__name__}: {e}')}")

    try:
        for hook in run.hooks:
            begun.append(hook)
            hook.before_run(run)
        yield
    except BaseException as e:
        for hook in reversed(begun):
            call(hook, "on_error", e)
        raise
    finally:
        for hook in reversed(begun):
            call(hook, "on_end")
