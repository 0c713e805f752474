"""xtuner train CONFIG: train by a config."""

import argparse

from xtuner.dist.launchers import LAUNCHERS, Names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="config file, or the name of a shipped one")
    parser.add_argument("--work-dir", help="where checkpoints and logs go (default: ./work_dirs/CONFIG)")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="PATH",
        help="go on from a checkpoint; alone or `auto`: from the newest in the work dir, or start if there is none",
    )
    parser.add_argument(
        "--strict-resume", action="store_true", help="a damaged checkpoint is an error, none before it is used"
    )
    parser.add_argument(
        "--allow-change",
        action="store_true",
        help="resume although settings or data that change the result have changed",
    )
    parser.add_argument("--seed", type=int, help="of random weights; overrides randomness.seed")
    parser.add_argument("--cfg-options", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="overrides")
    parser.add_argument("--dry-run", action="store_true", help="check and report everything, train nothing")
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="with --dry-run: report the run of N processes, 8 on each machine"
    )
    parser.add_argument("--max-minutes", type=float, metavar="M", help="save and stop (exit 75) within so many minutes")
    parser.add_argument("--cache-dir", metavar="DIR", help="where data indexes are kept (default: beside the data)")
    parser.add_argument(
        "--launcher",
        default="none",
        choices=Names(LAUNCHERS),
        help="what has started the processes: torchrun, srun, mpirun, or package.module.Class for a launcher of your "
        "own; none (default): this one works alone, or starts a process for each GPU if NPROC_PER_NODE says so",
    )
    parser.add_argument(
        "--deepspeed",
        metavar="NAME_OR_JSON",
        help="ZeRO by DeepSpeed: deepspeed_zero1, _zero2, _zero3, …, or a JSON file",
    )
    parser.add_argument(
        "--fsdp",
        nargs="?",
        const="full",
        choices=("full", "hybrid"),
        help="full (default): several GPUs divide the state over all of them; hybrid: over those of each machine",
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    from xtuner.dist import environment

    with environment.main_reports(args.launcher):
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
        stdio.survive()  # a run continues when nobody reads what it prints
    if not faulthandler.is_enabled():
        faulthandler.enable()  # where each thread stood if a library crashes, or a mapped file is cut off
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost rank is told in words, not in frames of C++
    for option in ("--work-dir", "--cache-dir", "--deepspeed"):
        if getattr(args, option[2:].replace("-", "_")) == "":  # as a rule a variable of a script that is not set
            raise ConfigError(f"{option} is empty", where=option, do="give a value, or leave the option out")
    if args.ranks is not None and (not args.dry_run or args.ranks < 1):
        do = "give both, and a number of processes from 1 on; a run has those that the launcher starts"
        raise ConfigError(f"--ranks {args.ranks} is for --dry-run", where="--ranks", do=do)
    config = load(args.config, args.cfg_options)
    nodes = launchers.find_launcher(args.launcher).nodes(os.environ, device_count())
    if not args.ranks and nodes and nodes.workers * nodes.nodes > 1:
        return workers.start(nodes, [sys.executable, "-m", "xtuner", "train", *args.words])
    workers.end_with_parent()
    place = launchers.place(args.launcher, os.environ)

    from xtuner.dist.process_group import taking_part
    from xtuner.train.preflight import resolve_work_dir
    from xtuner.train.trainer import Options, train

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
        arguments=tuple(args.words),
    )
    with taking_part(place, group=bool(args.deepspeed)) as (device, watch):
        return train(config, resolve_work_dir(args.work_dir, config), device, options, watch)
