"""xtuner list-cfg: list the shipped configs, or all settings."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-p", "--pattern", default="", help="only names that contain this, or match it (`*7b*`)")
    parser.add_argument("--settings", action="store_true", help="list all settings of a config, with descriptions")


def run(args: argparse.Namespace) -> int:
    from fnmatch import fnmatch

    from xtuner.config.load import ALIASES, shipped_names
    from xtuner.core.errors import ConfigError

    if args.settings:
        from xtuner.tools.settings_pages import list_settings

        found = list(list_settings(args.pattern))
        if not found:
            raise ConfigError(f"no setting contains {args.pattern!r}", do="`xtuner list-cfg --settings` lists all")
        print("\n".join(found))
        return 0
    wanted = args.pattern.lower()
    names, older = ([n for n in known if wanted in n or fnmatch(n, wanted)] for known in (shipped_names(), ALIASES))
    names = names or [f"{n} (an older name of {ALIASES[n]})" for n in older]
    if not names:
        raise ConfigError(f"no shipped config matches {args.pattern!r}", do="`xtuner list-cfg` lists all")
    print("\n".join(names))
    return 0
