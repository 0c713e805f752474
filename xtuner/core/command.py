"""Running one command: arguments parsed, log lines on standard error, errors for users shown without a traceback, exit
codes that are the truth."""

import argparse
import contextlib
import sys
from collections.abc import Callable
from typing import NoReturn

from xtuner.core import errors, log
from xtuner.core.secrets import mask_text
from xtuner.core.system import stdio

EXIT_PIPE = 141  # 128 + SIGPIPE: the reader of our output has gone, as in `xtuner ... | head`

Arguments = Callable[[argparse.ArgumentParser], None]
Run = Callable[[argparse.Namespace], int]


class _Help(argparse.HelpFormatter):
    """Help that says every default, once."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        says_nothing = default is None or isinstance(default, bool) or default in ([], "", argparse.SUPPRESS)
        return text if says_nothing or "default" in text else f"{text} (default: %(default)s)"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        print_error(f"error: {mask_text(message)}", self.prog)  # it repeats what was given
        sys.exit(errors.EXIT_CONFIG)


def run_command(prog: str, text: str, add_arguments: Arguments, run: Run, argv: list[str]) -> int:
    """Parse `argv` and run; returns the exit code."""
    parser = _Parser(prog=prog, description=text, allow_abbrev=False, formatter_class=_Help)
    add_arguments(parser)
    args = parser.parse_args(argv)
    args.argv = argv  # as they were given, for who starts the same again
    log.setup()
    try:
        return run(args)
    except SystemExit as e:  # of a hook's or a dataset's method
        if errors.raised_by_us(e):
            raise
        raise errors.from_system_exit(e) from None


def exit_with(command: Callable[[], int]) -> NoReturn:
    """Run `command` and end the process with its exit code, or with that of the error it raises."""
    stdio.prepare_streams()
    try:
        code = _exit_code(command)
        sys.stdout.flush()
    except BrokenPipeError:
        code = EXIT_PIPE
        stdio.discard_buffers()
    except OSError as e:
        print_error(f"standard output cannot be written: {e.strerror}")
        code = errors.EXIT_IO
        stdio.discard_buffers()
    sys.exit(code)


def _exit_code(command: Callable[[], int]) -> int | str | None:
    try:
        return command()
    except errors.XTunerError as e:
        if not e.reported_elsewhere:
            print_error(str(e))
        return e.exit_code
    except KeyboardInterrupt:
        print_error("interrupted")
        return errors.EXIT_INTERRUPTED
    except SystemExit as e:  # argparse, after --help or a mistake
        return e.code
    except BrokenPipeError:
        raise
    except Exception as e:
        if isinstance(e, OSError) and (refusal := errors.from_os_error(e)):
            print_error(str(refusal))
            return refusal.exit_code
        import traceback  # a bug; its message may show a value of the config

        with contextlib.suppress(OSError):
            print(mask_text(traceback.format_exc()), end="", file=sys.stderr)
        return errors.EXIT_BUG


def print_error(message: str, label: str = "xtuner") -> None:
    """Print an error for the user, its first line in red on a terminal; lost if nobody can read it."""
    first, newline, rest = f"{label}: {message}".partition("\n")
    if stdio.use_colour(sys.stderr):
        first = f"{stdio.BOLD_RED}{first}{stdio.RESET}"
    with contextlib.suppress(OSError):
        print(first + newline + rest, file=sys.stderr, flush=True)


def run_script(text: str, add_arguments: Arguments, run: Run) -> NoReturn:
    """Body of a file that is run by its path."""
    exit_with(lambda: run_command(sys.argv[0], text, add_arguments, run, sys.argv[1:]))
