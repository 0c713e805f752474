"""What the verbs that run others' evaluators share."""

import argparse
from pathlib import Path

from xtuner.tools.evaluators.environment import Environment, default_folder


def add_shared(parser: argparse.ArgumentParser, who: str) -> None:
    parser.add_argument("--work-dir", type=Path, metavar="DIR", help="for results (default: work_dirs/eval/MODEL)")
    parser.add_argument(
        "--env", type=Path, metavar="DIR", help=f"environment with {who} (default: of the user's cache)"
    )
    parser.add_argument("--install", action="store_true", help="make that environment first; with no MODEL: only that")
    parser.add_argument(
        "--cfg-options", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="of CONFIG.py"
    )
    parser.add_argument(
        "--extra", nargs=argparse.REMAINDER, default=[], metavar="WORD", help=f"all behind it: to {who}"
    )


def environment(args: argparse.Namespace, command: str, turbomind: bool = False) -> Environment:
    """The one that is asked for, installed if that is asked for."""
    found = Environment(args.env or default_folder(), command)
    if args.install:
        found.install(turbomind)
    return found
