"""xtuner list-cfg: names of the shipped configs."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-p", "--pattern", default="", help="only names that contain this, or match it (`*7b*`)")


def run(args: argparse.Namespace) -> int:
    from fnmatch import fnmatch

    from xtuner.config.load import ALIASES, shipped_names
    from xtuner.core.errors import ConfigError

    wanted = args.pattern.lower()
    names, older = ([n for n in known if wanted in n or fnmatch(n, wanted)] for known in (shipped_names(), ALIASES))
    names = names or [f"{n} (an older name of {ALIASES[n]})" for n in older]
    if not names:
        raise ConfigError(f"no shipped config matches {args.pattern!r}", do="`xtuner list-cfg` lists all")
    print("\n".join(names))
    return 0
