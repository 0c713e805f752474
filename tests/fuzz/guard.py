"""What a reader may do: end well or with our own error, soon, in little memory, without side effects."""

import faulthandler
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xtuner.core.errors import XTunerError

SECONDS = 5  # an input that takes longer is a find; all are some kB
STUCK = 40  # seconds after which the process ends, as it hangs in a library
MEMORY = 192 * 2**20  # bytes above what the process has before the first input
LONGEST = 12_000  # characters of a message
_RUNS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "socket.connect")
_CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class TooSlow(BaseException):
    """Not an Exception: a reader that catches everything must not catch it."""


class Guard:
    """Watches one input at a time. `sandbox` is the one folder in which files may change."""

    def __init__(self, sandbox: Path) -> None:
        self.sandbox = f"{sandbox.resolve()}{os.sep}"
        self.on = self.may_exec = False
        self.slow = ""
        self.seen: list[str] = []
        sys.dont_write_bytecode = True
        sys.addaudithook(self._audit)
        signal.signal(signal.SIGALRM, self._slow)

    def limit_memory(self) -> None:
        """From now on, an allocation beyond MEMORY fails."""
        text = Path("/proc/self/status").read_text()
        now = next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("VmData"))
        resource.setrlimit(resource.RLIMIT_DATA, (now + MEMORY, resource.RLIM_INFINITY))

    def run(self, action: Callable[[], Any]) -> tuple[str, str] | None:
        """What is wrong with how `action` ended, as (name of the find, text); None if nothing."""
        self.seen.clear()
        faulthandler.dump_traceback_later(STUCK, exit=True)
        signal.setitimer(signal.ITIMER_REAL, SECONDS, 1)
        self.on, self.slow = True, ""
        try:
            action()
            found = None
        except XTunerError as e:
            message = str(e)
            found = (
                ("a long message", f"{len(message):,} characters: {message[:300]}") if len(message) > LONGEST else None
            )
        except BaseException as e:
            if isinstance(e, KeyboardInterrupt):
                raise
            found = _name(e), "".join(traceback.format_exception(e, limit=-8))[-3000:]
        finally:
            self.on = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.cancel_dump_traceback_later()
        if self.slow:
            return "TooSlow", self.slow
        return (self.seen[0], self.seen[0]) if self.seen else found

    def _slow(self, _: int, frame: Any) -> None:
        if self.on:  # where an exception is swallowed, as in a callback, there is the next second
            self.slow = self.slow or "".join(traceback.format_stack(frame)[-8:])
            raise TooSlow

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in _RUNS or (event == "exec" and not self.may_exec and args[0].co_filename in ("<string>", "")):
            self.seen.append(f"it ran {event} {args!r:.200}")
        elif event == "open" and isinstance(args[2], int) and args[2] & _WRITES and not self._inside(args[0]):
            self.seen.append(f"it opened {args[0]!r} to write")
        elif event in _CHANGES and not self._inside(args[0]):
            self.seen.append(f"it called {event} on {args[0]!r}")

    def _inside(self, path: Any) -> bool:
        if isinstance(path, int):
            return True
        text = os.fsdecode(path)
        # relative names are those of a folder that is open (`shutil.rmtree`)
        return not os.path.isabs(text) or f"{os.path.realpath(text)}{os.sep}".startswith((self.sandbox, "/dev/null/"))


def _name(error: BaseException) -> str:
    """The kind of an error and where in the package it was raised: one find for the same fault."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if f"{os.sep}xtuner{os.sep}" in f.filename] or frames
    where = f"{os.path.basename(ours[-1].filename)}:{ours[-1].name}" if ours else "?"
    return f"{type(error).__name__} in {where}"
