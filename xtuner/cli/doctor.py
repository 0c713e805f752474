"""xtuner doctor: check versions, GPUs, disk and limits of this machine, and run a small computation on each device; on
an allocation also clocks, the shared folder, and the network between nodes."""

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from xtuner.dist.launchers import LAUNCHERS, LauncherNames

if TYPE_CHECKING:
    from xtuner.tools.doctor import Row

COLOURS = {"ok": "\033[32m", "note": "\033[33m", "problem": "\033[31m"}
RESET = "\033[0m"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", help="config whose checkpoints must fit (default: the 1.8B model)")
    parser.add_argument(
        "--work-dir", default="work_dirs", help="folder for runs, whose disk is checked (default: ./work_dirs)"
    )
    parser.add_argument(
        "--checkpoints", type=int, metavar="K", help="number of checkpoints that must fit (default: 1)", default=1
    )
    parser.add_argument(
        "--launcher",
        default="none",
        choices=LauncherNames(LAUNCHERS),
        help="what started the processes, as of `xtuner train`: also check the ranks together",
    )
    parser.add_argument("--cfg-options", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="overrides")
    parser.add_argument("--json", action="store_true", help="print the report and all facts of the machine as JSON")


def run(args: argparse.Namespace) -> int:
    import os
    import sys

    from xtuner.core.errors import ConfigError
    from xtuner.core.system.sysinfo import installed
    from xtuner.dist import launchers, shipped_launchers, workers

    if args.checkpoints < 1:
        raise ConfigError(f"--checkpoints {args.checkpoints} is not at least 1", where="--checkpoints")
    if args.launcher == "none" and "NPROC_PER_NODE" not in os.environ and "LOCAL_RANK" not in os.environ:
        return _report(args, lambda step: _examine(args, step), True)
    if installed("torch") is None:
        raise ConfigError("ranks need torch, which is not installed", do="run `xtuner doctor` without a launcher first")
    from torch.cuda import device_count

    layout = launchers.find_launcher(args.launcher).read_nodes(os.environ, device_count())
    if layout and layout.workers * layout.num_nodes > 1:
        return workers.run_workers(layout, [sys.executable, "-m", "xtuner", "doctor", *args.argv])
    workers.end_with_parent()
    from xtuner.dist.process_group import join_run

    info = launchers.read_rank(args.launcher, os.environ)
    with (
        shipped_launchers.report_interrupt_once(args.launcher),
        join_run(info, group=True) as (device, _),
    ):
        import torch

        from xtuner.dist.collectives import ALL
        from xtuner.tools.doctor_ranks import examine_ranks, gather_rows

        hosts = ALL.gather(os.environ.get("SLURMD_NODENAME") or info.host)

        def examine(step: Callable[[int], object]) -> Iterator["Row"]:
            mine = []
            if hosts.index(hosts[ALL.rank]) == ALL.rank:  # the first of its node
                for row in _examine(args, step):
                    mine.append(row)
                    if ALL.is_main:
                        yield row
            yield from gather_rows(ALL, hosts, mine)
            yield from examine_ranks(ALL, torch.device(device), hosts, Path(args.work_dir))

        return _report(args, examine, ALL.is_main)


def _examine(args: argparse.Namespace, step: Callable[[int], object]) -> Iterator["Row"]:
    """The checks of this machine, and whether the checkpoints of a config fit."""
    import shutil

    from xtuner.core.system import disk
    from xtuner.tools.doctor import CHECKPOINT, examine

    work_dir = Path(args.work_dir)
    yield from examine(work_dir, step)
    if args.config is None and args.checkpoints == 1:
        return  # a check above covers it
    from xtuner.tools.doctor_ranks import checkpoint_row

    size, what = CHECKPOINT, "the 1.8B model"
    if args.config is not None:
        size, what = _checkpoint_size(args), args.config
    folder = disk.nearest_existing(work_dir)
    yield checkpoint_row(shutil.disk_usage(folder).free, size, args.checkpoints, folder, what)


def _checkpoint_size(args: argparse.Namespace) -> float:
    """Bytes: fp32 masters, and two moments of what is trained. Raises: ConfigError."""
    from xtuner.compat.translate import load
    from xtuner.config.build import build
    from xtuner.model.flops import num_parameters
    from xtuner.train.model_checks import build_model_source

    config = load(args.config, args.cfg_options)
    source = build_model_source(config)
    moment = build(config.values["optim_wrapper"], "optim_wrapper").states.moment.itemsize
    trained = source.count_trained().total
    return float(4 * (trained if source.adapter else num_parameters(source.config)) + 2 * moment * trained)


def _report(
    args: argparse.Namespace, examine: Callable[[Callable[[int], object]], Iterator["Row"]], prints: bool
) -> int:
    import contextlib
    import json
    import sys

    from xtuner.core.errors import EXIT_CONFIG, EXIT_DONE
    from xtuner.core.log import human_bytes, use_colour
    from xtuner.core.secrets import mask, mask_text
    from xtuner.core.system import sysinfo
    from xtuner.tools.doctor import NOTE, PROBLEM, Row

    colour, watched = use_colour(sys.stdout), use_colour(sys.stderr) and prints

    def step(done: int) -> None:
        if watched:
            print(f"\r\033[Kmeasuring the disk: {human_bytes(done)}", end="", file=sys.stderr, flush=True)

    def show(row: Row) -> None:
        state = f"{COLOURS[row.state]}{row.state:<7}{RESET}" if colour else f"{row.state:<7}"
        print(f"{state}  {row.name:<15}  {row.found}" + (f"\n{'':26}next: {row.do}" if row.do else ""), flush=True)

    rows = []
    for found in examine(step):
        row = Row(found.name, found.state, mask_text(found.found), mask_text(found.do))
        rows.append(row)
        if watched:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        if prints and not args.json:
            show(row)
    problems, notes = (sum(row.state == state for row in rows) for state in (PROBLEM, NOTE))
    if not prints:  # rank 0 has found the same, and more
        return EXIT_DONE
    if args.json:
        facts = None
        with contextlib.suppress(ImportError, OSError, RuntimeError):  # torch is missing or broken: a check reports it
            facts = mask(sysinfo.facts())
        report = {"ok": not problems, "problems": problems, "notes": notes}
        checks = [dataclasses.asdict(r) for r in rows]
        print(json.dumps(report | {"checks": checks, "machine": facts}, indent=2))
    else:
        verdict = "training will not work correctly here" if problems else "training will work here"
        print(f"\n{verdict}: problems: {problems}, notes: {notes}")
    return EXIT_CONFIG if problems else EXIT_DONE
