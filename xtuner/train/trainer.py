"""The training loop, and the assembly of a run from a config."""

import contextlib
import dataclasses
import os
import time
from pathlib import Path

import torch

from xtuner.compat.report import log_report
from xtuner.config.config import Config
from xtuner.core import log
from xtuner.core.errors import (
    EXIT_DONE,
    EXIT_STOPPED,
    CheckpointError,
    DataError,
    DivergedError,
    from_system_exit,
    is_interrupt,
)
from xtuner.core.log import logger
from xtuner.core.remote.url import parse_url
from xtuner.data.format.cache_dirs import Opening
from xtuner.dist import collectives
from xtuner.dist.heartbeat import Heartbeat
from xtuner.dist.mesh import divisors, make_mesh
from xtuner.engine import capacity, long_documents, memory
from xtuner.engine.state.slices import SavedStates
from xtuner.engine.strategies.out_of_memory import is_out_of_memory
from xtuner.engine.strategies.select import build_strategy, choose_strategy
from xtuner.model.flops import count_attention_pairs
from xtuner.train import preflight
from xtuner.train.checkpoints import history, remote
from xtuner.train.checkpoints.async_saver import AsyncSaver
from xtuner.train.command_line import check_command_line
from xtuner.train.plan import DATASET, find_longest_document, longest_document, make_plan
from xtuner.train.reporting.events import record_events
from xtuner.train.reporting.failure_advice import interrupted_error, out_of_memory_error
from xtuner.train.reporting.rank_times import RankClock
from xtuner.train.reporting.start_report import format_start_report
from xtuner.train.resume import ResumePoint, find_resume_point, fit_accumulative_counts, load_run_state
from xtuner.train.run import Iteration, Plan, Progress, Run, Settings, SourceLoss, run_hooks
from xtuner.train.state import TrainState
from xtuner.train.stop import Stop
from xtuner.train.trackers import Tracker
from xtuner.train.work_dir import EarlyLog, acquire_work_dir, open_log, open_trackers, record_start


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the command line."""

    resume: str | None = None  # a checkpoint, "auto" for the newest in the work dir, None for the config's `resume`
    strict_resume: bool = False  # a damaged checkpoint is an error; else the previous one is used
    allow_change: bool = False  # resume although settings or data that change the result have changed
    seed: int | None = None  # of random weights; None for the config's
    dry_run: bool = False  # report the plan without loading weights or training
    ranks: int | None = None  # of a dry run: plan for this number of processes
    max_minutes: float | None = None  # stop early enough to have saved by then
    cache_dir: str | None = None  # for data indexes
    deepspeed: str | None = None  # a shipped name or a JSON file
    fsdp: str | None = None  # "full" or "hybrid"
    arguments: tuple[str, ...] = ()  # the command line after `xtuner train`


def train(
    config: Config, work_dir: Path, device: torch.device, options: Options, heartbeat: Heartbeat | None = None
) -> int:
    """Run a config to its end: settings, then the plan, then the run.

    Args:
        heartbeat: the one that monitors this rank's progress, if there are several ranks.

    Returns the exit code: 0 done, 75 stopped on request. Raises: XTunerError for errors that the user can fix.
    """
    mesh = make_mesh(options.fsdp, options.ranks)
    ranks = mesh.ranks
    log.setup(rank=ranks.rank)
    extensions = ranks.run_on_all(lambda: preflight.check_settings(config))
    log_report(config)
    if config.setting("randomness.deterministic"):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    deterministic = config.setting("randomness.deterministic")  # affects the choice of attention
    if deterministic != torch.are_deterministic_algorithms_enabled():  # the call imports PyTorch's compiler: 2 s
        torch.use_deterministic_algorithms(deterministic)
    log.setup(config.setting("log_level"), rank=ranks.rank)
    ranks.run_on_main(lambda: check_command_line(work_dir, options.seed, options.max_minutes))
    sharers = config.setting("sequence_parallel_size")
    mesh = ranks.run_on_all(lambda: make_mesh(options.fsdp, options.ranks, sharers))
    settings = preflight.prepare_settings(
        config, extensions.hooks, work_dir, device, options.seed, mesh, Opening(options.cache_dir)
    )
    if config.with_sharers:
        settings = choose_context_size(settings, options)
        config = settings.config
    if options.dry_run:
        found, settings = _find_resume_point(settings, options, contents=False)
        plan = _make_plan(settings, options, found)
        _print_report(settings, plan)
        if options.ranks is None:  # else the plan is for other machines
            _require_memory(settings, plan)
        logger.info("dry run: nothing was trained" + (f"; it would resume from {found.folder}" if found else ""))
        return EXIT_DONE
    with contextlib.ExitStack() as cleanup:
        early = EarlyLog()
        ranks.run_on_main(lambda: acquire_work_dir(work_dir, cleanup))
        found, settings = _find_resume_point(settings, options)
        plan = _make_plan(settings, options, found)
        _require_memory(settings, plan)
        _require_upload_dir(settings, found)
        file = open_log(settings)
        early.write_to_file()
        stop = Stop(work_dir, ranks, options.max_minutes)
        if heartbeat:
            heartbeat.log, heartbeat.interrupted = file, lambda: stop.interrupted
        run: Run | None = None
        progress = Progress(found.state) if found else Progress()
        try:
            run = _build_run(settings, plan, found, extensions.trackers, file, cleanup)
            progress = run.progress
            with record_events(run), run_hooks(run):
                return loop(run, stop, heartbeat)
        except BaseException as e:
            if is_interrupt(e):
                cleanup.close()  # waits for a save in progress
                raise interrupted_error(work_dir, progress.state.iteration, options.arguments, mesh) from None
            if isinstance(e, SystemExit):  # raised by a hook or dataset
                raise from_system_exit(e) from None
            if is_out_of_memory(e):
                now = run.strategy.memory if run else None
                raise out_of_memory_error(settings, plan, progress.state.iteration, options.arguments, e, now) from None
            raise
        finally:
            log.show_progress()


def choose_context_size(settings: Settings, options: Options) -> Settings:
    """The settings with as few ranks that share a pack as its longest document needs. All ranks call it together."""
    ranks, pack = settings.mesh.ranks, settings.dataset.packed_length
    free = memory.min_free_bytes(settings.device, settings.mesh)
    how, document = (options.deepspeed, options.fsdp), longest_document(settings.dataset)

    def choose() -> Settings:
        for size in divisors(settings.mesh.local_size if options.fsdp == "hybrid" else settings.mesh.size):
            mesh = make_mesh(options.fsdp, options.ranks, size)
            choice = choose_strategy(settings.source, settings.optim, settings.device, *how, mesh, pack, free, document)
            if choice.memory.fits(choice.memory.longest_row or choice.pack):
                break
        assert settings.config.with_sharers
        return preflight.arrange_ranks(settings, settings.config.with_sharers(mesh.cp), mesh)

    found = ranks.run_on_all(choose)
    if collectives.is_main():
        logger.info(
            f'sequence_parallel_size = "auto": {found.mesh.cp} for documents of up to {document or pack:,} tokens'
        )
    return found


def _find_resume_point(
    settings: Settings, options: Options, contents: bool = True
) -> tuple[ResumePoint | None, Settings]:
    """The checkpoint to resume, and the settings with as many packs per iteration as its run had."""
    resume = options.resume if options.resume is not None else settings.config.setting("resume")
    ranks, sharers, dp_size = settings.mesh.ranks, settings.mesh.cp, settings.sampler.world_size
    upload_dir = settings.config.setting("upload_dir")
    resume = remote.bring_checkpoint(settings.work_dir, resume, upload_dir, ranks, options.dry_run)
    found = find_resume_point(settings.work_dir, resume, ranks, options.strict_resume, contents)
    counts = settings.optim.accumulative_counts
    if found is None:
        return None, settings
    fitting = ranks.run_on_all(lambda: fit_accumulative_counts(found, counts, dp_size, sharers))
    if fitting == counts:
        return found, settings
    return found, ranks.run_on_all(lambda: preflight.with_accumulation(settings, fitting))


def _require_upload_dir(settings: Settings, found: ResumePoint | None) -> None:
    if upload_dir := settings.config.setting("upload_dir"):
        ours = found and found.folder.resolve().parent == settings.work_dir.resolve()
        iteration = found.state.iteration if found and ours else None
        url = parse_url(upload_dir, "upload_dir")
        settings.mesh.ranks.run_on_main(lambda: remote.require_upload_dir(url, iteration))


def _make_plan(settings: Settings, options: Options, found: ResumePoint | None) -> Plan:
    """All ranks call it together and get equal plans."""
    ranks, optim, device = settings.mesh.ranks, settings.optim, settings.device
    # these two try kernels, which takes memory: measure free memory afterwards
    ranks.run_on_all(lambda: settings.source.require_supported(device, optim.compute_dtype(device)))
    ranks.run_on_all(lambda: optim.traits(device))
    free = memory.min_free_bytes(device, settings.mesh)
    host = long_documents.min_host_bytes(settings.source, optim, device, settings.mesh)
    how = options.allow_change, options.deepspeed, options.fsdp, free, host
    plan = ranks.run_on_all(lambda: make_plan(settings, found, *how))
    if found:
        ranks.run_on_main(lambda: SavedStates(found.folder) and None)  # raises if the optimizer's state is absent
    return plan


def _require_memory(settings: Settings, plan: Plan) -> None:
    def require() -> None:
        key = settings.config.name_in_file(f"{DATASET}.packed_length")
        capacity.require_capacity(plan.choice, settings.source, settings.optim, settings.device, key)

    settings.mesh.ranks.run_on_all(require)


def _print_report(settings: Settings, plan: Plan) -> None:
    """Print the plan on rank 0: to standard output, unlike the log of the training."""
    if collectives.is_main():
        log.print_result(format_start_report(settings, plan))
        if warning := settings.dataset.dropped().warning():
            logger.warning(warning)
        for remark in plan.schedule.remarks(plan.max_iterations):
            logger.warning(remark)


def _build_run(
    settings: Settings, plan: Plan, found: ResumePoint | None, trackers: list[Tracker], file: Path,
    cleanup: contextlib.ExitStack,
) -> Run:  # fmt: skip
    """Build the run, load its initial state, and move aside checkpoints that it does not continue."""
    ranks = settings.mesh.ranks
    metrics = open_trackers(settings, trackers, file.parent, found)
    cleanup.callback(metrics.close)
    saver = AsyncSaver(settings.work_dir, ranks, settings.config.setting("upload_dir"))
    cleanup.callback(saver.close)
    _print_report(settings, plan)
    if plan.choice.remark and collectives.is_main():
        logger.info(plan.choice.remark)
    strategy_ = build_strategy(plan.choice, settings.source, settings.optim, settings.device)
    if settings.device.type == "cuda":
        longest = find_longest_document(settings.dataset) if collectives.is_main() else None
        longest = longest and -(-longest // settings.mesh.cp)
        strategy_.memory.log_plan(plan.choice.pack, settings.mesh, longest)
    progress = load_run_state(strategy_, settings.config, found, ranks, settings.source.base is not None)
    ranks.run_on_main(lambda: history.set_aside_others(settings.work_dir, found.chosen if found else None))
    ranks.run_on_main(lambda: record_start(settings, progress, found, file.parent, metrics.run_id))
    return Run(**vars(settings), plan=plan, loader=plan.loader(settings), strategy=strategy_, metrics=metrics,
               saver=saver, log=file, progress=progress)  # fmt: skip


def loop(run: Run, stop: Stop, heartbeat: Heartbeat | None = None) -> int:
    """Train until the end or a request to stop."""
    packs = run.loader.iterate_from(run.state.position)
    names = mixed.names if (mixed := getattr(run.dataset, "mixture", None)) else ()
    begun_at = run.state.iteration
    clock = RankClock(run.mesh.ranks, run.strategy.device)
    while run.state.iteration < run.max_iterations:
        begin = time.perf_counter()
        if heartbeat:
            heartbeat.iteration = run.state.iteration
        batch = [next(packs) for _ in range(run.plan.accumulative_counts)]
        data_time = time.perf_counter() - begin
        # at least one iteration per start; everything that ranks must agree on is sent in one message
        stops = run.state.iteration > begun_at and stop.requested(run.saver.save_time)
        pairs = sum(count_attention_pairs(run.source.config, b.cu_seqlens) for b in batch)
        by_source = [sum(b.num_targets for b in batch if b.source == s) for s in range(len(names))]
        counted = [stops, sum(b.num_targets for b in batch), pairs, *by_source]
        needed = run.strategy.count_micro_batches(batch)
        counts, parts = run.mesh.ranks.sums_and_maxima([*counted, *clock.arrive(data_time)], needed)
        clock.leave(counts[len(counted) :])
        if counts[0]:
            return _save_and_stop(run, stop)
        num_targets = int(counts[1]) // run.mesh.cp  # ranks that share a pack have counted the same
        lr = run.plan.schedule(run.state.iteration)
        loss = run.strategy.forward_backward(batch, num_targets, parts, run.state.iteration + 1, len(names) or 1)
        targets = [int(n) // run.mesh.cp for n in counts[3 : len(counted)]]
        parts_of_loss = run.strategy.source_losses if names else []
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
            attention_pairs=counts[2] / run.mesh.size,
            data_time=data_time,
            ranks=clock.all,
            sources=tuple(map(SourceLoss, names, (part * num_targets for part in parts_of_loss), targets)),
        )
        if not applied:
            _report_unapplied_step(run, it, [b.pack for b in batch])
        for hook in run.hooks:
            hook.after_iteration(run, it)
        _report_checkpoints(run)
    for hook in run.hooks:
        hook.after_run(run)
    _report_checkpoints(run)
    run.metrics.event("end", run.state.iteration)
    empty = run.progress.without_targets
    left = max(run.plan.total_packs - run.state.packs, 0)
    logger.info(
        f"done: {run.state.iteration} iterations, {run.state.packs:,} packs, {run.state.targets:,} tokens learned from"
        + (f"; {left} packs at the end did not fill an iteration" if left else "")
        + (f"; {empty:,} iterations had no token to learn from" if empty else "")
    )
    return EXIT_DONE


def _report_checkpoints(run: Run) -> None:
    """Pass checkpoints that have been written since the last call to the hooks."""
    while run.saver.written:
        folder = run.saver.written.popleft()
        run.metrics.event("save", int(folder.stem.removeprefix("iter_")), folder=folder.name)
        for hook in run.hooks:
            hook.after_checkpoint(run, folder)
    while run.saver.uploaded:
        folder = run.saver.uploaded.popleft()
        iteration = int(folder.stem.removeprefix("iter_"))
        run.metrics.event("upload", iteration, folder=folder.name, to=run.config.setting("upload_dir"))


def _save_and_stop(run: Run, stop: Stop) -> int:
    """Save the current state and return EXIT_STOPPED."""
    stop.agree()
    run.save(last=True)
    _report_checkpoints(run)
    run.metrics.event("stop", run.state.iteration, reason=stop.reason)
    logger.warning(f"stopped at iteration {run.state.iteration} on {stop.reason}; run again with --resume to continue")
    return EXIT_STOPPED


def _report_unapplied_step(run: Run, it: Iteration, packs: list[int]) -> None:
    """Log why an iteration changed no weight. Raises: DivergedError beyond the budget `train_cfg.max_skipped`."""
    number = it.state.iteration
    packs = list(dict.fromkeys(p for rank in run.mesh.ranks.gather(packs) for p in rank))
    if not it.num_targets:
        _report_without_targets(run, number, packs)
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
        last = history.latest_checkpoint(run.work_dir, run.mesh.ranks)
    except CheckpointError:
        last = None
    again = f"xtuner train {run.config.path} --work-dir {run.work_dir}" + (f" --resume {last.folder}" if last else "")
    error = DivergedError(
        what,
        where=f"packs {packs} of {', '.join(sorted(files))}",
        why="a NaN would have destroyed the weights; they are unchanged since the iteration before",
        do=f"repeat the same iterations: {again}\n"
        f"        look at a pack: {data.show_command(packs[0], '--tokenizer DIR')}\n"
        f"        or continue without such iterations: --cfg-options train_cfg.max_skipped=10",
    )
    error.reported_elsewhere = not collectives.is_main()
    raise error


def _report_without_targets(run: Run, number: int, packs: list[int]) -> None:
    """Report the first iteration without a token to learn from, and the 10th, the 100th, …

    Raises: DataError when a whole epoch, or the whole run, had none.
    """
    run.progress.without_targets += 1
    count, data = run.progress.without_targets, run.loader.dataset
    if count == 1:
        logger.warning(
            f"iteration {number} changed no weight: none of its tokens is a target (packs {packs}). "
            "Further ones are counted, not listed"
        )
    elif set(str(count)) <= {"1", "0"} and str(count).count("1") == 1:
        logger.warning(f"{count:,} iterations so far had no token to learn from")
    ended = run.state.position.epoch > 0 or number == run.max_iterations
    if not run.state.targets and ended:
        error = DataError(
            f"no token to learn from in {run.state.packs:,} packs: nothing was trained",
            where=data.documents.location,
            why="tokens above 0 in the .bin are learned; negative ones are context only",
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
