"""xtuner check-cfg CONFIG: report every mistake that would stop `xtuner train`, or that the config is valid."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="config file, or the name of a shipped one")
    parser.add_argument("--cfg-options", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="overrides")


def run(args: argparse.Namespace) -> int:
    from xtuner.compat.report import report_paragraphs
    from xtuner.compat.translate import load
    from xtuner.data.format.cache_dirs import Opening
    from xtuner.dist.mesh import Mesh
    from xtuner.dist.process_group import select_device
    from xtuner.engine import capacity
    from xtuner.train import preflight
    from xtuner.train.command_line import resolve_work_dir
    from xtuner.train.plan import make_plan

    config = load(args.config, args.cfg_options)
    extensions = preflight.check_settings(config)
    here = select_device()
    work_dir = resolve_work_dir(None, config)
    opening = Opening(read_only=True)
    settings = preflight.prepare_settings(config, extensions.hooks, work_dir, here, None, Mesh(), opening)
    plan = make_plan(settings)
    notes = list(plan.schedule.remarks(plan.max_iterations))
    print("\n\n".join([*report_paragraphs(config), f"{config.path} is valid"]))
    for note in notes:
        print(f"note: {note}")
    if why_not := capacity.why_one_process_cannot(settings.source, settings.optim, here):
        print(f"note: {why_not}")
    return 0
