"""Shared by the verbs that run external evaluators."""

import argparse
from pathlib import Path

from xtuner.tools.evaluators.environment import Environment, default_folder


def add_shared(parser: argparse.ArgumentParser, evaluator: str) -> None:
    parser.add_argument("--work-dir", type=Path, metavar="DIR", help="for results (default: work_dirs/eval/MODEL)")
    parser.add_argument(
        "--env", type=Path, metavar="DIR", help=f"environment with {evaluator} (default: in the user's cache)"
    )
    parser.add_argument(
        "--install", action="store_true", help="create that environment first; without MODEL do nothing else"
    )
    parser.add_argument(
        "--cfg-options", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="overrides for CONFIG.py"
    )
    parser.add_argument(
        "--extra",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="WORD",
        help=f"pass all following arguments to {evaluator}",
    )


def environment(args: argparse.Namespace, command: str, turbomind: bool = False) -> Environment:
    """The environment of --env, installed first if --install is given."""
    found = Environment(args.env or default_folder(), command)
    if args.install:
        found.install(turbomind)
    return found
