"""The loop, and what it needs put together from a config."""

import contextlib
import dataclasses
import os
import time
from pathlib import Path

import torch

from xtuner.compat.report import log_report
from xtuner.config.config import Config
from xtuner.core import log
from xtuner.core.errors import EXIT_DONE, EXIT_STOPPED, CheckpointError, DataError, DivergedError, from_system_exit
from xtuner.core.log import logger
from xtuner.data.format.cache_dirs import Opening
from xtuner.dist import collectives
from xtuner.dist.heartbeat import Heartbeat
from xtuner.dist.mesh import make_mesh
from xtuner.engine import capacity, memory
from xtuner.engine.state.slices import SavedStates
from xtuner.engine.strategies.out_of_memory import is_out_of_memory
from xtuner.engine.strategies.select import strategy
from xtuner.train import preflight
from xtuner.train.checkpoints import history
from xtuner.train.checkpoints.async_saver import Saver
from xtuner.train.plan import make_plan
from xtuner.train.reporting.failure_advice import interrupted, out_of_memory
from xtuner.train.reporting.start_report import report
from xtuner.train.resume import Found, find, load_into
from xtuner.train.run import Iteration, Plan, Progress, Run, Settings, hooks_of
from xtuner.train.start import EarlyLog, open_log, open_trackers, record_start, take_work_dir
from xtuner.train.state import TrainState
from xtuner.train.stop import Stop
from xtuner.train.trackers import Tracker


@dataclasses.dataclass(frozen=True)
class Options:
    """How a run is started, beside what its config says."""

    resume: str | None = None  # a checkpoint, "auto" for the newest in the work dir, None for what the config says
    strict_resume: bool = False  # a damaged checkpoint is an error, not a reason to take the one before it
    allow_change: bool = False  # resume although settings or data that change the result have changed
    seed: int | None = None  # of random weights; None for the config's
    dry_run: bool = False  # report everything, load no weights, train nothing
    ranks: int | None = None  # of a dry run: plan for so many processes
    max_minutes: float | None = None  # stop in time to have saved by then
    cache_dir: str | None = None  # where data indexes are kept
    deepspeed: str | None = None  # a shipped name or a JSON file
    fsdp: str | None = None  # "full" or "hybrid"
    words: tuple[str, ...] = ()  # of the command line, after `xtuner train`


def train(
    config: Config, work_dir: Path, device: torch.device, options: Options, heartbeat: Heartbeat | None = None
) -> int:
    """Run a config to its end: settings, then the plan, then the run.

    Args:
        heartbeat: what is told how far this rank is, if there are others.

    Returns the exit code: 0 done, 75 stopped on request. Raises: XTunerError for what a user can mend.
    """
    mesh = make_mesh(options.fsdp, options.ranks)
    ranks = mesh.ranks
    log.setup(rank=ranks.rank)
    parts = ranks.run_on_all(lambda: preflight.settings(config))
    log_report(config)
    if config.setting("randomness.deterministic"):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.setting("randomness.deterministic"))  # attention is chosen by it
    log.setup(config.setting("log_level"), rank=ranks.rank)
    ranks.run_on_main(lambda: preflight.command_line(work_dir, options.seed, options.max_minutes))
    settings = preflight.prepare(config, parts.hooks, work_dir, device, options.seed, mesh, Opening(options.cache_dir))
    if options.dry_run:
        found = _find(settings, options, contents=False)
        plan = _plan(settings, options, found)
        _print_report(settings, plan)
        if options.ranks is None:  # else it is another machine's memory
            _require_memory(settings, plan)
        logger.info("dry run: nothing was trained" + (f"; it would resume from {found.folder}" if found else ""))
        return EXIT_DONE
    with contextlib.ExitStack() as at_the_end:
        early = EarlyLog()
        ranks.run_on_main(lambda: take_work_dir(work_dir, at_the_end))
        found = _find(settings, options)
        plan = _plan(settings, options, found)
        _require_memory(settings, plan)
        file = open_log(settings)
        early.into_file()
        stop = Stop(work_dir, ranks, options.max_minutes)
        if heartbeat:
            heartbeat.log, heartbeat.interrupted = file, lambda: stop.interrupted
        run: Run | None = None
        progress = Progress(found.state) if found else Progress()
        try:
            run = _build(settings, plan, found, parts.trackers, file, at_the_end)
            progress = run.progress
            with hooks_of(run):
                return loop(run, stop, heartbeat)
        except Exception as e:
            if is_out_of_memory(e):
                now = run.strategy.memory if run else None
                raise out_of_memory(settings, plan, progress.state.iteration, options.words, e, now) from None
            raise
        except SystemExit as e:  # of a hook's or a dataset's method
            raise from_system_exit(e) from None
        except KeyboardInterrupt:
            at_the_end.close()  # with a save in flight
            raise interrupted(work_dir, progress.state.iteration, options.words, mesh) from None
        finally:
            log.show_progress()


def _find(settings: Settings, options: Options, contents: bool = True) -> Found | None:
    resume = options.resume if options.resume is not None else settings.config.setting("resume")
    return find(settings.work_dir, resume, settings.mesh.ranks, options.strict_resume, contents)


def _plan(settings: Settings, options: Options, found: Found | None) -> Plan:
    """All ranks call it together, and come to the same."""
    ranks, optim, device = settings.mesh.ranks, settings.optim, settings.device
    # kernels that are tried take memory: what is free is looked at afterwards
    ranks.run_on_all(lambda: settings.source.require(device, optim.compute_dtype(device)))
    ranks.run_on_all(lambda: optim.traits(device))
    free = memory.free_of_all(device, settings.mesh)
    how = options.allow_change, options.deepspeed, options.fsdp, free
    plan = ranks.run_on_all(lambda: make_plan(settings, found, *how))
    if found:
        ranks.run_on_main(lambda: SavedStates(found.folder) and None)  # the optimizer's state is there
    return plan


def _require_memory(settings: Settings, plan: Plan) -> None:
    def require() -> None:
        capacity.require(plan.choice, settings.source, settings.optim, settings.device)

    settings.mesh.ranks.run_on_all(require)


def _print_report(settings: Settings, plan: Plan) -> None:
    """On rank 0. Its result goes to standard output; what happens while training goes to standard error."""
    if collectives.is_main():
        log.print_result(report(settings, plan))
        if warning := settings.dataset.dropped().warning():
            logger.warning(warning)
        for remark in plan.schedule.remarks(plan.max_iterations):
            logger.warning(remark)


def _build(
    settings: Settings, plan: Plan, found: Found | None, trackers: list[Tracker], file: Path,
    at_the_end: contextlib.ExitStack,
) -> Run:  # fmt: skip
    """Everything of the run, brought to where it begins; what does not lead there is moved out of the way."""
    ranks = settings.mesh.ranks
    metrics = open_trackers(settings, trackers, file.parent)
    at_the_end.callback(metrics.close)
    saver = Saver(settings.work_dir, ranks)
    at_the_end.callback(saver.close)
    _print_report(settings, plan)
    if plan.choice.remark and collectives.is_main():
        logger.info(plan.choice.remark)
    trains = strategy(plan.choice, settings.source, settings.optim, settings.device)
    if settings.device.type == "cuda":
        trains.memory.tell(plan.choice.pack, settings.mesh)
    progress = load_into(trains, settings.config, found, ranks)
    ranks.run_on_main(lambda: history.make_way(settings.work_dir, found.chosen if found else None))
    ranks.run_on_main(lambda: record_start(settings, progress, found, file.parent))
    return Run(**vars(settings), plan=plan, loader=plan.loader(settings), strategy=trains, metrics=metrics,
               saver=saver, log=file, progress=progress)  # fmt: skip


def loop(run: Run, stop: Stop, heartbeat: Heartbeat | None = None) -> int:
    """Train until the end or a request to stop."""
    packs = run.loader.iterate_from(run.state.position)
    begun_at = run.state.iteration
    while run.state.iteration < run.max_iterations:
        begin = time.perf_counter()
        if heartbeat:
            heartbeat.iteration = run.state.iteration
        batch = [next(packs) for _ in range(run.plan.accumulative_counts)]
        data_time = time.perf_counter() - begin
        # at least one iteration is done; all that ranks have to agree on for the next goes in one message
        stops = run.state.iteration > begun_at and stop.requested(run.saver.save_time)
        counted = [stops, sum(b.num_targets for b in batch), sum(b.attention_pairs for b in batch)]
        counts, parts = run.mesh.ranks.sums_and_maxima(counted, run.strategy.parts(batch))
        if counts[0]:
            return _stopped(run, stop)
        num_targets = int(counts[1])
        lr = run.plan.schedule(run.state.iteration)
        loss = run.strategy.forward_backward(batch, num_targets, parts, run.state.iteration + 1)
        grad_norm, applied = run.strategy.step(lr, run.optim.max_norm)
        run.progress.state = _advance(run, num_targets)
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
        _report_checkpoints(run)
    for hook in run.hooks:
        hook.after_run(run)
    _report_checkpoints(run)
    empty = run.progress.without_targets
    left = max(run.plan.total_packs - run.state.packs, 0)
    logger.info(
        f"done: {run.state.iteration} iterations, {run.state.packs:,} packs, {run.state.targets:,} tokens learned from"
        + (f"; {left} packs at the end filled no iteration" if left else "")
        + (f"; {empty:,} iterations had no token to learn from" if empty else "")
    )
    return EXIT_DONE


def _report_checkpoints(run: Run) -> None:
    """Those that have come to the disk since the last time."""
    while run.saver.written:
        folder = run.saver.written.popleft()
        for hook in run.hooks:
            hook.after_checkpoint(run, folder)


def _stopped(run: Run, stop: Stop) -> int:
    """Save where the run stands, before its next iteration."""
    stop.agree()
    run.save(last=True)
    _report_checkpoints(run)
    logger.warning(f"stopped at iteration {run.state.iteration} on {stop.reason}; run again with --resume to continue")
    return EXIT_STOPPED


def _not_applied(run: Run, it: Iteration, packs: list[int]) -> None:
    """Tell why an iteration changed no weight. Raises: DivergedError beyond the budget `train_cfg.max_skipped`."""
    number = it.state.iteration
    packs = [p for rank in run.mesh.ranks.gather(packs) for p in rank]
    if not it.num_targets:
        _without_targets(run, number, packs)
        return
    run.progress.state = dataclasses.replace(run.state, skipped=run.state.skipped + 1)
    what = f"iteration {number}: loss {it.loss}, gradient norm {it.grad_norm}; the step was not applied"
    budget = run.config.setting("train_cfg.max_skipped")
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
        f"        look at a pack: {data.show_command(packs[0], '--tokenizer DIR')}\n"
        f"        or go on without such iterations: --cfg-options train_cfg.max_skipped=10",
    )
    error.reported_elsewhere = not collectives.is_main()
    raise error


def _without_targets(run: Run, number: int, packs: list[int]) -> None:
    """Report the first iteration without a token to learn from, and the 10th, the 100th, …

    Raises: DataError when a whole epoch, or the whole run, had none.
    """
    run.progress.without_targets += 1
    count, data = run.progress.without_targets, run.loader.dataset
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
            + data.show_command(packs[0]),
        )
        error.reported_elsewhere = not collectives.is_main()
        raise error


def _advance(run: Run, num_targets: int) -> TrainState:
    packs = run.plan.packs_per_iteration
    position = run.state.position.advance(packs, run.plan.packs_per_epoch)
    return run.state.advance(position, packs, num_targets)
