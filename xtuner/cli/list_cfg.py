"""xtuner list-cfg: names of the shipped configs."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-p", "--pattern", default="", help="only names that contain this, or match it (`*7b*`)")


def run(args: argparse.Namespace) -> int:
    from fnmatch import fnmatch

    from xtuner.config.load import shipped_names
    from xtuner.core.errors import ConfigError

    wanted = args.pattern.lower()
    names = [n for n in shipped_names() if wanted in n or fnmatch(n, wanted)]
    if not names:
        raise ConfigError(f"no shipped config matches {args.pattern!r}", do="`xtuner list-cfg` lists all")
    print("\n".join(names))
    return 0
