"""xtuner check-cfg CONFIG: all mistakes of a config at once, or that it is right."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="config file, or the name of a shipped one")
    parser.add_argument("--cfg-options", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="overrides")


def run(args: argparse.Namespace) -> int:
    from xtuner.config.check import problems
    from xtuner.config.load import load
    from xtuner.config.mistakes import together
    from xtuner.config.told import paragraphs
    from xtuner.core import log

    log.setup()
    config = load(args.config, args.cfg_options)
    if found := problems(config, paths=True):
        raise together(found)
    print("\n\n".join([*paragraphs(config), f"{config.path} is right"]))
    return 0
