"""Report many mistakes as one error, so that a user can fix them all at once. Each names its setting."""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from xtuner.config.config import Config
from xtuner.core.errors import CheckpointError, ConfigError, XTunerError, from_system_exit

_OURS = Path(__file__).resolve().parents[1]
_INSTALLED = [Path(p) for p in (sys.prefix, sys.base_prefix)]


def combine_errors(problems: Sequence[XTunerError], what: str = "mistakes in the config") -> XTunerError:
    """One error with all messages, and the exit code of the first. A single error is returned unchanged."""
    if len(problems) == 1:
        return problems[0]
    return type(problems[0])(f"{len(problems)} {what}\n" + "\n".join(f"* {p}" for p in problems))


class Findings:
    """Collects the errors of several steps."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.errors: list[XTunerError] = []

    @contextlib.contextmanager
    def collect(self, key: str) -> Iterator[None]:
        """Keep the error that ends the block, with the file and line of the setting `key`."""
        try:
            with locate_errors(self.config, key):
                yield
        except XTunerError as e:
            self.errors.append(e)

    def check(self) -> None:
        """Raise the collected errors, if any."""
        if self.errors:
            raise combine_errors(self.errors)


@contextlib.contextmanager
def locate_errors(config: Config, key: str, *causes: str) -> Iterator[None]:
    """Add the file and line of the settings `causes`, by default of `key`, to errors in the block. Exceptions of a
    user's own classes become errors for users, about `key`."""
    causes = causes or (key,)
    here = " and ".join(config.where(k) for k in causes)
    try:
        yield
    except XTunerError as e:
        where = here
        if e.where and not causes[0].startswith(e.where):
            is_setting = e.where.startswith(f"{key.partition('.')[0]}.")
            by = " and ".join(config.where(k) for k in _find_named(config, causes, e.where))
            where = config.where(e.where) if is_setting else f"{e.where}, by {by}"
        raise type(e)(e.what, where=where, why=e.why, do=e.do) from None
    except SystemExit as e:
        raise from_system_exit(e, config.where(key), key) from None
    except OSError as e:
        what = f"{e.filename or key} cannot be read: {e.strerror or e}"
        raise CheckpointError(what, where=here) from None
    except Exception as e:
        frames = traceback.extract_tb(e.__traceback__)
        if not _is_users(frames):
            raise  # a bug of ours
        raise ConfigError(
            f"{key} cannot be built: {type(e).__name__}: {e}",
            where=config.where(key),
            why=f"raised at {frames[-1].filename}:{frames[-1].lineno}",
        ) from None


def _find_named(config: Config, causes: Sequence[str], where: str) -> Sequence[str]:
    """The settings among `causes` whose path is the place of an error, or contains it; all of them if there is none."""
    found = []
    for key in causes:
        path = str(config.get(key) or "")
        for root in {path, os.path.expanduser(path)}:
            rest = where.removeprefix(root.rstrip("/"))
            if root.strip("/") and rest != where and rest[:1] in ("", "/", ":", ",", " "):
                found.append((len(root), key))
    longest = max((size for size, _ in found), default=0)  # of folders inside each other the inner one
    return [key for size, key in found if size == longest] or causes


def _is_users(frames: Sequence[traceback.FrameSummary]) -> bool:
    """Whether the traceback contains code that is neither ours nor installed, or `build` called such a class."""
    files = [Path(f.filename).resolve() for f in frames]
    called = next((f for f in files[1:] if f != _OURS / "config" / "build.py"), None)
    return (
        called is None
        or not called.is_relative_to(_OURS)
        or any(not any(f.is_relative_to(p) for p in (_OURS, *_INSTALLED)) for f in files)
    )
