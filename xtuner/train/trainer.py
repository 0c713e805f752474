"""The loop, and what it needs put together from a config."""

import contextlib
import dataclasses
import logging
import os
import platform
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from xtuner.config.literals import without_secrets
from xtuner.config.load import Config
from xtuner.config.told import tell
from xtuner.core import dist, log
from xtuner.core.errors import (
    EXIT_DONE,
    EXIT_STOPPED,
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    XTunerError,
    of_exit,
)
from xtuner.core.files import not_written, recover, write_json
from xtuner.core.log import logger
from xtuner.dist.mesh import arrange
from xtuner.engine import fit
from xtuner.engine.choose import choose, strategy
from xtuner.engine.strategies.out_of_memory import is_out_of_memory
from xtuner.engine.watch import Watch
from xtuner.train import history, preflight
from xtuner.train.advice import interrupted, out_of_memory
from xtuner.train.lock import WorkDirLock
from xtuner.train.report import environment, report
from xtuner.train.resume import Found, find, take
from xtuner.train.run import Iteration, Run
from xtuner.train.saver import Saver
from xtuner.train.state import TrainState
from xtuner.train.stop import Stop
from xtuner.train.trackers import Tracker, Trackers
from xtuner.train.trackers.json_lines import JsonLines
from xtuner.train.trackers.tensorboard import TensorBoard


@dataclasses.dataclass(frozen=True)
class Options:
    """How a run is started, beside what its config says."""

    resume: str | None = None  # a checkpoint, "auto" for the newest in the work dir, None for what the config says
    strict_resume: bool = False  # a damaged checkpoint is an error, not a reason to take the one before it
    allow_change: bool = False  # resume although settings or data that change the result have changed
    seed: int | None = None  # of random weights; None for the config's
    dry_run: bool = False  # report everything, load no weights, train nothing
    max_minutes: float | None = None  # stop in time to have saved by then
    deepspeed: str | None = None  # a shipped name or a JSON file
    fsdp: str | None = None  # "full" or "hybrid"
    words: tuple[str, ...] = ()  # of the command line, after `xtuner train`


def train(config: Config, work_dir: Path, device: torch.device, options: Options, watch: Watch | None = None) -> int:
    """Run a config to its end.

    Args:
        watch: what is told how far this rank is, if there are others.

    Returns the exit code: 0 done, 75 stopped on request. Raises: XTunerError for what a user can mend.
    """
    mesh = arrange(options.fsdp)
    ranks = mesh.ranks
    log.setup(rank=ranks.rank)
    parts = ranks.together(lambda: preflight.settings(config))
    tell(config)
    if config.get("randomness.deterministic"):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(bool(config.get("randomness.deterministic")))  # attention is chosen by it
    log.setup(config.get("log_level", "INFO"), rank=ranks.rank)
    ranks.on_main(lambda: preflight.command_line(work_dir, options.seed, options.max_minutes))
    run = preflight.prepare(config, parts.hooks, work_dir, device, options.seed, mesh)
    how, pack = (options.deepspeed, options.fsdp, mesh), run.loader.dataset.packed_length
    run.choice = ranks.together(lambda: choose(run.source, run.optim, device, *how, pack))
    ranks.together(lambda: run.source.require(device, run.optim.compute_dtype(device)))
    if options.dry_run:
        found = _find(run, options, contents=False)
        _print_report(run)
        ranks.together(lambda: fit.require(run.choice, run.source, run.optim, device))
        logger.info("dry run: nothing was trained" + (f"; it would resume from {found.folder}" if found else ""))
        return EXIT_DONE
    ranks.together(lambda: fit.require(run.choice, run.source, run.optim, device))
    with contextlib.ExitStack() as at_the_end:
        early = _Early()
        logger.addHandler(early)
        ranks.on_main(lambda: _take_work_dir(work_dir, at_the_end))
        found = _find(run, options)
        _open_log(run, parts.trackers, at_the_end)
        early.into_log()
        stop = Stop(work_dir, ranks, options.max_minutes)
        if watch:
            watch.log, watch.interrupted = run.log, lambda: stop.interrupted
        try:
            _start(run, found)
            return loop(run, stop, watch)
        except Exception as e:
            if is_out_of_memory(e):
                raise out_of_memory(run, options.words, run.choice, e) from None
            raise
        except SystemExit as e:  # of a hook's or a dataset's method
            raise of_exit(e) from None
        except KeyboardInterrupt:
            at_the_end.close()  # with a save in flight
            raise interrupted(run, options.words) from None
        finally:
            log.show_progress()


def _print_report(run: Run) -> None:
    """On rank 0. Its result goes to standard output; what happens while training goes to standard error."""
    if dist.is_main():
        log.print_result(report(run))
        if warning := run.loader.dataset.dropped().warning():
            logger.warning(warning)
        for remark in run.schedule.remarks(run.max_iterations):
            logger.warning(remark)


def _find(run: Run, options: Options, contents: bool = True) -> Found | None:
    resume = options.resume if options.resume is not None else run.config.get("resume")
    found = find(run, resume, options.strict_resume, options.allow_change, contents)
    run.schedule = run.mesh.ranks.together(run.make_schedule)
    return found


def _start(run: Run, found: Found | None) -> None:
    """Everything between the work dir and the first iteration."""
    _print_report(run)
    run.strategy = strategy(run.choice, run.source, run.optim, run.device)
    if run.device.type == "cuda":
        run.strategy.memory.tell(run.choice.pack, run.mesh)
    take(run, found)
    dist.ALL.on_main(lambda: _record_start(run, found))
    for hook in run.hooks:
        hook.before_run(run)


def _record_start(run: Run, found: Found | None) -> None:
    """What the records of this start continue: a checkpoint of this work dir by its name, another one by its path."""
    assert run.log is not None
    source = None if found is None else str(found.folder.resolve())
    if found and found.folder.resolve().parent == run.work_dir.resolve():
        source = found.folder.name
    with _writing(run.log.parent):
        write_json(run.log.parent / "start.json", {"iteration": run.state.iteration, "resumed_from": source})


class _Early(logging.Handler):
    """Keeps what is logged before there is a log file, for the file."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def into_log(self) -> None:
        for handler in logger.handlers[1:]:  # the first is the terminal, which has shown them
            for record in self.records:
                handler.handle(record)


def _take_work_dir(work_dir: Path, at_the_end: contextlib.ExitStack) -> None:
    """Make the work dir and lock it. A run that is refused before it writes anything leaves no folder that was new."""
    new = [folder for folder in (work_dir, *work_dir.parents) if not folder.exists()]

    def give_back() -> None:
        for folder in new:
            with contextlib.suppress(OSError):  # a run has begun in it
                folder.rmdir()

    with _writing(work_dir):
        at_the_end.callback(give_back)
        work_dir.mkdir(parents=True, exist_ok=True)
        at_the_end.callback(WorkDirLock(work_dir).release)
        recover(work_dir, "iter_*.pth")
        recover(work_dir, "last_checkpoint")


def _open_log(run: Run, trackers: list[Tracker], at_the_end: contextlib.ExitStack) -> None:
    """In the work dir a folder for this start: logs, metrics, environment, config as written and resolved."""
    ranks = run.mesh.ranks
    folder = Path(ranks.on_main(lambda: str(_make_folder(run))))
    ranks.together(lambda: _see(folder))
    name = f"{folder.name}.log" if ranks.is_main else f"rank_{ranks.rank:05d}.log"
    run.log = folder / name
    log.setup(run.config.get("log_level", "INFO"), run.log, ranks.rank)
    run.metrics = Trackers([JsonLines(), TensorBoard(), *trackers] if ranks.is_main else [])
    at_the_end.callback(run.metrics.close)
    run.metrics.begin(folder, run.config.resolved())
    run.saver = Saver(run.work_dir, ranks)
    at_the_end.callback(run.saver.close)


def _make_folder(run: Run) -> Path:
    folder = run.work_dir / time.strftime("%Y%m%d_%H%M%S")
    copy = run.work_dir / run.config.path.name
    new = [path for path in (folder, copy) if not os.path.lexists(path)]
    try:
        with _writing(folder):
            folder.mkdir(exist_ok=True)
            write_json(folder / "environment.json", environment(run.config.path))
            write_json(folder / "config.json", run.config.resolved())
            _copy_config(run.config.path, copy)
    except XTunerError:  # a run that has not begun leaves nothing
        if folder in new:
            shutil.rmtree(folder, ignore_errors=True)
        if copy in new:
            copy.unlink(missing_ok=True)
        raise
    return folder


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise not_written(e, "the work dir", folder, "give another one with --work-dir") from None


def _copy_config(config: Path, copy: Path) -> None:
    if copy.exists() and copy.samefile(config):  # the config lies in the work dir
        return
    copy.write_bytes(without_secrets(config.read_bytes()))


def _see(folder: Path) -> None:
    if not folder.is_dir():
        raise ConfigError(
            f"rank {dist.rank()} on {platform.node()} does not see the work dir that rank 0 has made",
            where=str(folder),
            why="all ranks write their parts of a checkpoint there",
            do="give a --work-dir on a file system that all nodes share, as an absolute path",
        )


def loop(run: Run, stop: Stop, watch: Watch | None = None) -> int:
    """Train until the end or a request to stop."""
    packs = run.loader.iterate_from(run.state.position)
    begun_at = run.state.iteration
    while run.state.iteration < run.max_iterations:
        begin = time.perf_counter()
        if watch:
            watch.iteration = run.state.iteration
        batch = [next(packs) for _ in range(run.optim.accumulative_counts)]
        data_time = time.perf_counter() - begin
        # at least one iteration is done; all that ranks have to agree on for the next goes in one message
        stops = run.state.iteration > begun_at and stop.requested(run.saver.save_time)
        counted = [stops, sum(b.num_targets for b in batch), sum(b.attention_pairs for b in batch)]
        counts, parts = run.mesh.ranks.sums_and_most(counted, run.strategy.parts(batch))
        if counts[0]:
            return _stopped(run, stop)
        num_targets = int(counts[1])
        lr = run.schedule(run.state.iteration)
        loss = run.strategy.forward_backward(batch, num_targets, parts, run.state.iteration + 1)
        grad_norm, applied = run.strategy.step(lr, run.optim.max_norm)
        run.state = _advance(run, num_targets)
        it = Iteration(
            state=run.state,
            lr=lr,
            loss=loss,
            grad_norm=grad_norm,
            applied=applied,
            num_targets=num_targets,
            num_tokens=sum(b.num_tokens for b in batch),
            attention_pairs=counts[2] / run.mesh.dp_size,
            data_time=data_time,
        )
        if not applied:
            _not_applied(run, it, [b.pack for b in batch])
        for hook in run.hooks:
            hook.after_iteration(run, it)
    for hook in run.hooks:
        hook.after_run(run)
    left = max(run.total_packs - run.state.packs, 0)
    logger.info(
        f"done: {run.state.iteration} iterations, {run.state.packs:,} packs, {run.state.targets:,} tokens learned from"
        + (f"; {left} packs at the end filled no iteration" if left else "")
        + (f"; {run.without_targets:,} iterations had no token to learn from" if run.without_targets else "")
    )
    return EXIT_DONE


def _stopped(run: Run, stop: Stop) -> int:
    """Save where the run stands, before its next iteration."""
    stop.agree()
    run.save(last=True)
    logger.warning(f"stopped at iteration {run.state.iteration} on {stop.reason}; run again with --resume to continue")
    return EXIT_STOPPED


def _not_applied(run: Run, it: Iteration, packs: list[int]) -> None:
    """Tell why an iteration changed no weight. Raises: DivergedError beyond the budget `train_cfg.max_skipped`."""
    number = it.state.iteration
    packs = [p for rank in run.mesh.ranks.gather(packs) for p in rank]
    if not it.num_targets:
        _without_targets(run, number, packs)
        return
    run.state = dataclasses.replace(run.state, skipped=run.state.skipped + 1)
    what = f"iteration {number}: loss {it.loss}, gradient norm {it.grad_norm}; the step was not applied"
    budget = run.config.get("train_cfg.max_skipped", 0)
    data = run.loader.dataset
    files = {data.documents.file(data.locate(p)[0]).name for p in packs}
    if run.state.skipped <= budget:
        logger.warning(f"{what} (packs {packs}; {run.state.skipped} of at most {budget} such iterations)")
        return
    run.saver.finish()
    try:
        last = history.latest(run.work_dir, run.mesh.ranks)
    except CheckpointError:
        last = None
    again = f"xtuner train {run.config.path} --work-dir {run.work_dir}" + (f" --resume {last.folder}" if last else "")
    error = DivergedError(
        what,
        where=f"packs {packs} of {', '.join(sorted(files))}",
        why="weights that met a NaN would be lost; these are as they were before the iteration",
        do=f"run the same iterations again: {again}\n"
        f"        look at a pack: {data.how_to_show(packs[0], '--tokenizer DIR')}\n"
        f"        or go on without such iterations: --cfg-options train_cfg.max_skipped=10",
    )
    error.quiet = not dist.is_main()
    raise error


def _without_targets(run: Run, number: int, packs: list[int]) -> None:
    """Report the first iteration without a token to learn from, and the 10th, the 100th, …

    Raises: DataError when a whole epoch, or the whole run, had none.
    """
    run.without_targets += 1
    count, data = run.without_targets, run.loader.dataset
    if count == 1:
        logger.warning(
            f"iteration {number} changed no weight: none of its tokens is marked as learned (packs {packs}). "
            "Further ones are counted, not listed"
        )
    elif set(str(count)) <= {"1", "0"} and str(count).count("1") == 1:
        logger.warning(f"{count:,} iterations so far had no token to learn from")
    ended = run.state.position.epoch > 0 or number == run.max_iterations
    if not run.state.targets and ended:
        error = DataError(
            f"no token to learn from in {run.state.packs:,} packs: nothing was trained",
            where=data.documents.location,
            why="a token is learned if it is above 0 in the .bin; negative ones are context only",
            do=f"count them: xtuner data stats {data.documents.folder}\n        look at a pack: "
            * bool(data.documents.folder)
            + data.how_to_show(packs[0]),
        )
        error.quiet = not dist.is_main()
        raise error


def _advance(run: Run, num_targets: int) -> TrainState:
    packs = run.packs_per_iteration
    position = run.state.position.advance(packs, run.packs_per_epoch)
    return run.state.advance(position, packs, num_targets)
