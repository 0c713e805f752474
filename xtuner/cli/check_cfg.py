"""xtuner check-cfg CONFIG: whatever `xtuner train` would refuse because of the config, or that it is right."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="config file, or the name of a shipped one")
    parser.add_argument("--cfg-options", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="overrides")


def run(args: argparse.Namespace) -> int:
    from xtuner.config.load import load
    from xtuner.config.told import paragraphs
    from xtuner.dist.mesh import Mesh
    from xtuner.engine import fit
    from xtuner.engine.join import device
    from xtuner.train import preflight

    config = load(args.config, args.cfg_options)
    parts = preflight.settings(config)
    here = device()
    work_dir = preflight.work_dir_of(None, config)
    run = preflight.prepare(config, parts.hooks, work_dir, here, None, Mesh(), only_look=True)
    notes = list(run.make_schedule().remarks(run.max_iterations))
    print("\n\n".join([*paragraphs(config), f"{config.path} is right"]))
    for note in notes:
        print(f"note: {note}")
    if why_not := fit.why_not_alone(run.source, run.optim, here):
        print(f"note: {why_not}")
    return 0
