"""Running one command: arguments parsed, errors for users shown without a traceback, exit codes that are the truth."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from xtuner.core.errors import EXIT_BUG, XTunerError
from xtuner.core.secrets import mask_text

EXIT_INTERRUPTED = 130  # 128 + SIGINT
EXIT_PIPE = 141  # 128 + SIGPIPE: the reader of our output has gone, as in `xtuner ... | head`

Arguments = Callable[[argparse.ArgumentParser], None]
Run = Callable[[argparse.Namespace], int]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(mask_text(message))  # it repeats what was given


def run_command(prog: str, text: str, add_arguments: Arguments, run: Run, argv: list[str]) -> int:
    """Parse `argv` and run; returns the exit code."""
    parser = _Parser(prog=prog, description=text, allow_abbrev=False)
    add_arguments(parser)
    args = parser.parse_args(argv)
    args.words = argv  # as they were given, for who starts the same again
    return run(args)


def exit_with(command: Callable[[], int]) -> NoReturn:
    """Run `command` and end the process with its exit code, or with that of the error it raises."""
    try:
        code = _code(command)
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:
        code = EXIT_PIPE
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for fd in (1, 2):  # what is left in buffers is flushed at exit, and would fail again
            os.dup2(nowhere, fd)
    sys.exit(code)


def _code(command: Callable[[], int]) -> int | str | None:
    try:
        return command()
    except XTunerError as e:
        if not e.quiet:
            print(f"xtuner: {e}", file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:
        print("xtuner: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except SystemExit as e:  # argparse, after --help or a mistake
        return e.code
    except BrokenPipeError:
        raise
    except Exception:  # a bug; its message may show a value of the config
        import traceback

        print(mask_text(traceback.format_exc()), end="", file=sys.stderr)
        return EXIT_BUG


def script(text: str, add_arguments: Arguments, run: Run) -> NoReturn:
    """Body of a file that is run by its path."""
    exit_with(lambda: run_command(sys.argv[0], text, add_arguments, run, sys.argv[1:]))
