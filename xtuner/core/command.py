"""Run one command: parse its arguments, log to standard error, print errors for users without a traceback, and return
its exit code."""

import argparse
import contextlib
import sys
from collections.abc import Callable
from typing import NoReturn

from xtuner.core import errors, log
from xtuner.core.secrets import mask_text
from xtuner.core.system import stdio

EXIT_PIPE = 141  # 128 + SIGPIPE: nobody reads our output any more, as in `xtuner ... | head`

Arguments = Callable[[argparse.ArgumentParser], None]
Run = Callable[[argparse.Namespace], int]


class _Help(argparse.HelpFormatter):
    """Adds every default to its help text, unless the text gives it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        no_default = default is None or isinstance(default, bool) or default in ([], "", argparse.SUPPRESS)
        return text if no_default or "default" in text else f"{text} (default: %(default)s)"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        print_error(f"error: {mask_text(message)}", self.prog)  # the message repeats what was typed
        sys.exit(errors.EXIT_CONFIG)


def run_command(prog: str, text: str, add_arguments: Arguments, run: Run, argv: list[str]) -> int:
    """Parse `argv` and run; returns the exit code."""
    parser = _Parser(prog=prog, description=text, allow_abbrev=False, formatter_class=_Help)
    add_arguments(parser)
    args = parser.parse_args(argv)
    args.argv = argv  # for verbs that start the same command in other processes
    log.setup()
    try:
        return run(args)
    except SystemExit as e:  # raised by a user's hook or dataset
        if errors.raised_by_us(e):
            raise
        raise errors.from_system_exit(e) from None


def exit_with(command: Callable[[], int]) -> NoReturn:
    """Run `command` and exit with the code that it returns, or with that of the error that it raises."""
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
    except SystemExit as e:  # from argparse, after --help or a usage error
        return e.code
    except BrokenPipeError:
        raise
    except Exception as e:
        if errors.is_interrupt(e):
            print_error("interrupted")
            return errors.EXIT_INTERRUPTED
        if isinstance(e, OSError) and (error := errors.from_os_error(e)):
            print_error(str(error))
            return error.exit_code
        import traceback  # a bug; the message may contain a secret of the config

        with contextlib.suppress(OSError):
            print(mask_text(traceback.format_exc()), end="", file=sys.stderr)
        return errors.EXIT_BUG


def print_error(message: str, label: str = "xtuner") -> None:
    """Print an error for the user, its first line in red on a terminal. An error of printing is ignored."""
    first, newline, rest = f"{label}: {message}".partition("\n")
    if stdio.use_colour(sys.stderr):
        first = f"{stdio.BOLD_RED}{first}{stdio.RESET}"
    with contextlib.suppress(OSError):
        print(first + newline + rest, file=sys.stderr, flush=True)


def run_script(text: str, add_arguments: Arguments, run: Run) -> NoReturn:
    """The main function of a file that is run by its path."""
    exit_with(lambda: run_command(sys.argv[0], text, add_arguments, run, sys.argv[1:]))
