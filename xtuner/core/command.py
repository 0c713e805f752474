"""Running one command: arguments parsed, errors for users shown without a traceback, exit codes that are the truth."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from xtuner.core.errors import EXIT_BUG, XTunerError

Arguments = Callable[[argparse.ArgumentParser], None]
Run = Callable[[argparse.Namespace], int]


def run_command(prog: str, text: str, add_arguments: Arguments, run: Run, argv: list[str]) -> int:
    """Parse `argv` and run; returns the exit code."""
    parser = argparse.ArgumentParser(prog=prog, description=text, allow_abbrev=False)
    add_arguments(parser)
    return run(parser.parse_args(argv))


def exit_with(command: Callable[[], int]) -> NoReturn:
    """Run `command` and end the process with its exit code, or with that of the error it raises."""
    try:
        code = command()
    except XTunerError as e:
        print(f"xtuner: {e}", file=sys.stderr)
        code = e.exit_code
    except KeyboardInterrupt:
        print("xtuner: interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        code = EXIT_BUG
    sys.exit(code)


def script(text: str, add_arguments: Arguments, run: Run) -> NoReturn:
    """Body of a file that is run by its path."""
    exit_with(lambda: run_command(sys.argv[0], text, add_arguments, run, sys.argv[1:]))
