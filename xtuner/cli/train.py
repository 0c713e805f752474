"""xtuner train CONFIG: train a model by a config."""

import argparse

from xtuner.dist.launchers import LAUNCHERS, LauncherNames


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="config file, or the name of a shipped one")
    parser.add_argument("--work-dir", help="folder for checkpoints and logs (default: ./work_dirs/CONFIG)")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="PATH",
        help="continue from a checkpoint; without PATH or with `auto`: from the newest in the work dir, if any",
    )
    parser.add_argument(
        "--strict-resume",
        action="store_true",
        help="fail if the newest checkpoint is damaged, instead of using an older one",
    )
    parser.add_argument(
        "--allow-change",
        action="store_true",
        help="resume even if settings or data that affect the result have changed",
    )
    parser.add_argument("--seed", type=int, help="seed of random weights; overrides randomness.seed")
    parser.add_argument("--cfg-options", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="overrides")
    parser.add_argument("--dry-run", action="store_true", help="check and report everything, but do not train")
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="with --dry-run: report a run of N processes, 8 per machine"
    )
    parser.add_argument(
        "--max-minutes", type=float, metavar="M", help="save and stop (exit code 75) after M minutes at most"
    )
    parser.add_argument("--cache-dir", metavar="DIR", help="folder for data indexes (default: next to the data)")
    parser.add_argument(
        "--launcher",
        default="none",
        choices=LauncherNames(LAUNCHERS),
        help="what started the processes: torchrun (pytorch), srun (slurm), mpirun (mpi), or package.module.Class for "
        "your own launcher; none (default): a single process, or one per GPU if NPROC_PER_NODE is set",
    )
    parser.add_argument(
        "--deepspeed",
        metavar="NAME_OR_JSON",
        help="train with DeepSpeed: deepspeed_zero1, _zero2, _zero3, …, or a JSON file",
    )
    parser.add_argument(
        "--fsdp",
        nargs="?",
        const="full",
        choices=("full", "hybrid"),
        help="full (default): shard the training state over all GPUs; hybrid: over the GPUs of each machine",
    )
    parser.add_argument(
        "--tracker",
        action="append",
        default=[],
        choices=("swanlab", "wandb"),
        help="also send curves and samples to SwanLab or Weights & Biases; may be given several times",
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    from xtuner.dist import shipped_launchers

    with shipped_launchers.report_interrupt_once(args.launcher):
        return _train(args)


def _train(args: argparse.Namespace) -> int:
    import faulthandler
    import os
    import sys

    from torch.cuda import device_count

    from xtuner.compat.translate import load
    from xtuner.core.errors import ConfigError
    from xtuner.core.system import stdio
    from xtuner.dist import launchers, workers

    if not args.dry_run:
        stdio.ignore_write_errors()  # a run continues when its terminal is closed
    if not faulthandler.is_enabled():
        faulthandler.enable()  # prints stack traces if a library crashes, or a mapped file is truncated
    os.environ.setdefault(
        "TORCH_CPP_LOG_LEVEL", "ERROR"
    )  # the heartbeat reports a lost rank; hide the C++ stack traces
    for option in ("--work-dir", "--cache-dir", "--deepspeed"):
        if getattr(args, option[2:].replace("-", "_")) == "":  # most likely an unset variable in a script
            raise ConfigError(f"{option} is empty", where=option, do="give a value, or leave the option out")
    if args.ranks is not None and not args.dry_run:
        do = "add --dry-run; a real run has the processes that the launcher starts"
        raise ConfigError(f"--ranks {args.ranks} needs --dry-run", where="--ranks", do=do)
    if args.ranks is not None and args.ranks < 1:
        raise ConfigError(f"--ranks {args.ranks} is not 1 or more", where="--ranks", do="give the number of processes")
    config = load(args.config, args.cfg_options)
    layout = launchers.find_launcher(args.launcher).read_nodes(os.environ, device_count())
    if not args.ranks and layout and layout.workers * layout.num_nodes > 1:
        return workers.run_workers(layout, [sys.executable, "-m", "xtuner", "train", *args.argv])
    workers.end_with_parent()
    info = launchers.read_rank(args.launcher, os.environ)

    from xtuner.dist.process_group import join_run
    from xtuner.train.command_line import resolve_work_dir
    from xtuner.train.extensions import add_trackers
    from xtuner.train.trainer import Options, train

    add_trackers(config, args.tracker)
    options = Options(
        resume=args.resume,
        strict_resume=args.strict_resume,
        allow_change=args.allow_change,
        seed=args.seed,
        dry_run=args.dry_run,
        ranks=args.ranks,
        max_minutes=args.max_minutes,
        cache_dir=args.cache_dir,
        deepspeed=args.deepspeed,
        fsdp=args.fsdp,
        arguments=tuple(args.argv),
    )
    with join_run(info, group=bool(args.deepspeed)) as (device, heartbeat):
        return train(config, resolve_work_dir(args.work_dir, config), device, options, heartbeat)
