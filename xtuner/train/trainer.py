"""The loop, and what it needs put together from a config."""

import contextlib
import dataclasses
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from xtuner.config.build import build
from xtuner.config.check import check
from xtuner.config.load import Config
from xtuner.core import dist, log
from xtuner.core.errors import EXIT_DONE, EXIT_STOPPED, ConfigError, DataError, DivergedError
from xtuner.core.files import recover, verify, write_json
from xtuner.core.log import logger
from xtuner.data.index import TokenizedFolder
from xtuner.data.loader import PackLoader
from xtuner.data.order import Position
from xtuner.data.pack import PackedDataset
from xtuner.engine.optim import OptimWrapper
from xtuner.engine.schedule import Schedule
from xtuner.engine.single import SingleStrategy
from xtuner.model.source import ModelSource
from xtuner.train import checkpoint
from xtuner.train.changes import changes
from xtuner.train.hooks import ValidationHook
from xtuner.train.lock import WorkDirLock
from xtuner.train.metrics import MetricWriter
from xtuner.train.report import environment, report
from xtuner.train.run import Iteration, Run
from xtuner.train.saver import Saver
from xtuner.train.state import TrainState
from xtuner.train.stop import Stop


def assemble(config: Config, work_dir: Path, device: torch.device, seed: int | None) -> Run:
    """Build everything from a checked config but the weights. Raises: ConfigError, DataError."""
    seed = seed if seed is not None else (config.get("randomness.seed") or 0)
    source: ModelSource = build(config.values["model"], "model")
    if source.seed is None:
        source = dataclasses.replace(source, seed=seed)
    optim: OptimWrapper = build(config.values["optim_wrapper"], "optim_wrapper")
    dataloader = config.values["train_dataloader"]
    dataset: PackedDataset = build(dataloader["dataset"], "train_dataloader.dataset")
    dataset.vocab_size = source.config.vocab_size
    sampler = build(dataloader["sampler"], "train_dataloader.sampler", dataset=dataset)
    loader = PackLoader(dataset, sampler, dataloader.get("num_workers", 0))
    max_epochs = config.values["train_cfg"]["max_epochs"]
    per_iteration = optim.accumulative_counts * loader.dp_size
    total = Position().packs_until(max_epochs, loader.num_packs, loader.dp_size)
    max_iterations = total // per_iteration
    _enough(dataset.documents, dataset, max_iterations, per_iteration)
    hooks = [build(spec, f"default_hooks.{k}") for k, spec in (config.get("default_hooks") or {}).items()]
    hooks += [build(spec, f"custom_hooks.{i}") for i, spec in enumerate(config.get("custom_hooks") or [])]
    if config.get("val_dataset"):
        held_out: TokenizedFolder = build(config.values["val_dataset"], "val_dataset")
        hooks.append(ValidationHook(held_out, config.get("val_interval", 500), dataset.packed_length))
    hooks.sort(key=lambda h: h.priority)
    constant = Schedule(optim.lr, [], 1)
    run = Run(config, work_dir, device, source, optim, loader, hooks, max_epochs, max_iterations, constant)
    for hook in hooks:
        hook.configure(run)
    run.data_facts = loader.fingerprint()
    return run


def _enough(documents: TokenizedFolder, data: PackedDataset, max_iterations: int, per_iteration: int) -> None:
    if max_iterations:
        return
    raise DataError(
        f"{len(data)} packs, and one iteration takes {per_iteration}",
        where=f"{documents.folder}: {documents.num_tokens:,} tokens in {len(documents)} files",
        why=f"a file's tokens that do not fill a pack of {data.packed_length:,} are dropped",
        do="lower max_length or accumulative_counts, or give more data",
    )


@dataclasses.dataclass(frozen=True)
class Options:
    """How a run is started, beside what its config says."""

    resume: str | None = None  # a checkpoint, "auto" for the newest in the work dir, None for what the config says
    strict_resume: bool = False  # a damaged checkpoint is an error, not a reason to take the one before it
    allow_change: bool = False  # resume although settings or data that change the result have changed
    seed: int | None = None  # of random weights; None for the config's
    dry_run: bool = False  # report everything, load no weights, train nothing
    max_minutes: float | None = None  # stop in time to have saved by then


def train(config: Config, work_dir: Path, device: torch.device, options: Options) -> int:
    """Run a config to its end.

    Returns the exit code: 0 done, 75 stopped on request. Raises: XTunerError for what a user can mend.
    """
    log.setup()
    check(config, paths=True)
    log.setup(config.get("log_level", "INFO"))
    run = assemble(config, work_dir, device, options.seed)
    if options.dry_run:
        report(run)
        logger.info("dry run: nothing was trained")
        return EXIT_DONE
    with contextlib.ExitStack() as at_the_end:
        _open_work_dir(run, at_the_end)
        stop = Stop(work_dir, dist.ALL, options.max_minutes)
        _start(run, options)
        return loop(run, stop)


def _start(run: Run, options: Options) -> None:
    """Everything between the work dir and the first iteration."""
    report(run)
    if run.config.get("randomness.deterministic"):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    run.strategy = SingleStrategy(run.source, run.optim, run.device)
    _resume_or_fresh(run, options)
    for hook in run.hooks:
        hook.before_run(run)


def _open_work_dir(run: Run, at_the_end: contextlib.ExitStack) -> None:
    """Take the work dir; in it a folder for this start: log, metrics, environment, config as written and resolved."""
    folder = run.work_dir / time.strftime("%Y%m%d_%H%M%S")
    try:
        run.work_dir.mkdir(parents=True, exist_ok=True)
        at_the_end.callback(WorkDirLock(run.work_dir).release)
        (folder / "vis_data").mkdir(parents=True, exist_ok=True)
        log.setup(run.config.get("log_level", "INFO"), folder / f"{folder.name}.log")
        write_json(folder / "environment.json", environment())
        write_json(folder / "config.json", run.config.resolved())
        with contextlib.suppress(shutil.SameFileError):  # the config lies in the work dir
            shutil.copyfile(run.config.path, run.work_dir / run.config.path.name)
        recover(run.work_dir, "iter_*.pth")
        recover(run.work_dir, "last_checkpoint")
    except OSError as e:
        raise ConfigError(
            f"the work dir cannot be written: {e.strerror}",
            where=str(e.filename),
            do="give another one with --work-dir",
        ) from None
    run.metrics = MetricWriter(folder / "vis_data")
    at_the_end.callback(run.metrics.close)
    run.saver = Saver(run.work_dir, dist.ALL)
    at_the_end.callback(run.saver.close)


def _resume_or_fresh(run: Run, options: Options) -> None:
    resume = options.resume if options.resume is not None else run.config.get("resume")
    folder = checkpoint.to_resume(run.work_dir, resume, options.strict_resume)
    if dist.is_main():
        checkpoint.set_aside(run.work_dir, folder)
    if folder is None:
        if run.config.get("load_from"):
            _start_from(run, Path(run.config.values["load_from"]).expanduser())
        if resume:
            logger.info("no checkpoint in the work dir: starting afresh")
    else:
        state, facts = checkpoint.read_trainer(folder)
        _same_run(run, folder, facts, options.allow_change)
        run.strategy.load(folder)
        run.state, run.saved = state, (state.iteration, True)
        logger.info(f"resumed from {folder} at iteration {state.iteration}, {state.position}")


def _start_from(run: Run, folder: Path) -> None:
    weights = folder
    if (folder / checkpoint.TRAINER).is_file():
        verify(folder)
        weights = folder / "weights"
    run.strategy.load_weights(weights)
    logger.info(f"weights taken from {weights} (load_from); optimizer and data position are new")


def _same_run(run: Run, folder: Path, facts: dict[str, Any], allow_change: bool) -> None:
    """Tell what has changed since the checkpoint; refuse what would make another run of it."""
    where = str(folder / checkpoint.TRAINER)
    now = run.facts()
    for key, before in facts["data"].items():
        if now["data"][key] != before and not allow_change:
            raise DataError(
                f"the data is not what the checkpoint was trained on: {key} was {before!r}, is {now['data'][key]!r}",
                where=where,
                why="the run would see some documents twice and others never",
                do="restore the data and its settings, go on with --allow-change, or start anew with load_from",
            )
    for key in ("packs_per_iteration", "max_iterations"):
        if now[key] != facts[key] and not allow_change:
            raise ConfigError(
                f"{key} was {facts[key]} and is now {now[key]}",
                where=where,
                why="the schedule and the gradient noise would be another run's",
                do="set accumulative_counts and max_epochs as they were, or go on with --allow-change",
            )
    found = changes(facts["config"], now["config"])
    by_kind = {kind: [c for c in found if c.kind == kind] for kind in ("impossible", "changes the result", "harmless")}
    if by_kind["impossible"]:
        told = "; ".join(map(str, by_kind["impossible"]))
        why = "its weights or its optimizer state would not fit"
        raise ConfigError(f"the checkpoint is another model's or optimizer's: {told}", where=where, why=why)
    for change in by_kind["harmless"]:
        logger.info(f"changed since the checkpoint, harmless: {change}")
    if by_kind["changes the result"] and not allow_change:
        raise ConfigError(
            "changed since the checkpoint: " + "; ".join(map(str, by_kind["changes the result"])),
            where=where,
            why="the run would end differently from the one that was begun",
            do="take the changes back, or go on with --allow-change",
        )
    for change in by_kind["changes the result"]:
        logger.warning(f"changed since the checkpoint, allowed: {change}")


def loop(run: Run, stop: Stop) -> int:
    """Train until the end or a request to stop."""
    packs = run.loader.iterate_from(run.state.position)
    while run.state.iteration < run.max_iterations:
        begin = time.perf_counter()
        batch = [next(packs) for _ in range(run.optim.accumulative_counts)]
        data_time = time.perf_counter() - begin
        num_targets = dist.all_sum(sum(b.num_targets for b in batch))
        lr = run.schedule(run.state.iteration)
        loss = run.strategy.forward_backward(batch, num_targets)
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
            attention_pairs=sum(b.attention_pairs for b in batch),
            data_time=data_time,
        )
        if not applied:
            _not_applied(run, it, [b.pack for b in batch])
        for hook in run.hooks:
            hook.after_iteration(run, it)
        if stop.agreed(run.saver.save_time) and run.state.iteration < run.max_iterations:
            run.save(last=True)
            logger.warning(
                f"stopped at iteration {run.state.iteration} on {stop.reason}; run again with --resume to go on"
            )
            return EXIT_STOPPED
    for hook in run.hooks:
        hook.after_run(run)
    left = run.total_packs - run.state.packs
    logger.info(
        f"done: {run.state.iteration} iterations, {run.state.packs:,} packs, {run.state.targets:,} tokens learned from"
        + (f"; {left} packs at the end filled no iteration" if left else "")
    )
    return EXIT_DONE


def _not_applied(run: Run, it: Iteration, packs: list[int]) -> None:
    """Tell why an iteration changed no weight. Raises: DivergedError beyond the budget `train_cfg.max_skipped`."""
    number = it.state.iteration
    if not it.num_targets:
        logger.warning(f"iteration {number} changed no weight: it has no token to learn from (packs {packs})")
        return
    run.state = dataclasses.replace(run.state, skipped=run.state.skipped + 1)
    what = f"iteration {number}: loss {it.loss}, gradient norm {it.grad_norm}; the step was not applied"
    budget = run.config.get("train_cfg.max_skipped", 0)
    data = run.loader.dataset
    files = {data.documents[data.locate(p)[0]].name for p in packs}
    if run.state.skipped <= budget:
        logger.warning(f"{what} (packs {packs}; {run.state.skipped} of at most {budget} such iterations)")
        return
    run.saver.finish()
    last = checkpoint.latest(run.work_dir)
    again = f"xtuner train {run.config.path} --work-dir {run.work_dir}" + (f" --resume {last}" if last else "")
    raise DivergedError(
        what,
        where=f"packs {packs} of {', '.join(sorted(files))}",
        why="weights that met a NaN would be lost; these are as they were before the iteration",
        do=f"run the same iterations again: {again}\n"
        f"        look at a pack: xtuner data show {data.documents.folder} --pack {packs[0]} "
        f"--max-length {data.packed_length} --seed {data.seed} --tokenizer DIR\n"
        f"        or go on without such iterations: --cfg-options train_cfg.max_skipped=10",
    )


def _advance(run: Run, num_targets: int) -> TrainState:
    packs = run.packs_per_iteration
    position = run.state.position.advance(packs, run.loader.num_packs, run.loader.dp_size)
    return run.state.advance(position, packs, num_targets)
