"""Stop requests: finish the iteration, save, exit 75. A second signal has no effect, a second Ctrl-C ends at once.

Sources: SIGTERM, SIGUSR1, Ctrl-C, a closing terminal (SIGHUP, unless `nohup` ignores it), a file `STOP` in the work
dir, `--max-minutes`, and the end of the Slurm job. A request on any rank stops all ranks at the same iteration.
"""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from xtuner.core.log import logger
from xtuner.core.system.stdio import ERASE_LINE, is_terminal
from xtuner.dist.collectives import Ranks
from xtuner.dist.workers import stop_signals

FILE = "STOP"
SLURM_END = "SLURM_JOB_END_TIME"  # seconds since 1970
POLL_SECONDS = 2.0  # between checks for the file
SLACK = {"--max-minutes": 0.0}  # s of margin before a limit; 60 before one at which the job is killed


class Stop:
    """Installs its signal handlers when constructed.

    Args:
        max_minutes: stop early enough to have saved after that many minutes; None for no limit.
    """

    def __init__(self, work_dir: Path, ranks: Ranks, max_minutes: float | None = None) -> None:
        self.reason = ""
        self.interrupted = False  # by a first Ctrl-C
        self._file = work_dir / FILE
        self._ranks = ranks
        self._prints = ranks.is_main  # from the signal handler, with os.write only
        self._last_poll = self._last = time.time()
        self._longest = 0.0
        limits = {"--max-minutes": time.time() + 60 * max_minutes} if max_minutes is not None else {}
        if SLURM_END in os.environ:
            limits["the end of the Slurm job"] = float(os.environ[SLURM_END])
        self._limits = limits
        self._erase = ERASE_LINE if is_terminal(sys.stderr) else ""
        if self._file.exists() and ranks.is_main:
            logger.warning(f"removed {self._file}, which an earlier request had left")
            self._file.unlink(missing_ok=True)
        for number in stop_signals():
            signal.signal(number, self._handle_signal)

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        name, again = signal.Signals(number).name, ""
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # first: the next Ctrl-C may follow at once
            self.interrupted = True
            again = "; press Ctrl-C again to stop at once without saving"
        if self._prints and (again or not self.reason):
            with contextlib.suppress(OSError):  # not log or print: the handler may have interrupted one
                os.write(2, f"{self._erase}xtuner: {name}: finishing this iteration, then saving{again}\n".encode())
        self.reason = self.reason or name

    def requested(self, save_time: float = 0.0) -> bool:
        """Whether this rank has a reason to stop. Called once per iteration.

        Args:
            save_time: duration of a save in s, which must fit before a time limit.
        """
        self.reason = self.reason or self._find_reason(save_time)
        return bool(self.reason)

    def agree(self) -> None:
        """Set the `reason` of all ranks to that of the first rank which has one. All ranks call it together."""
        self.reason = next(filter(None, self._ranks.gather(self.reason)))
        if self._ranks.is_main:
            with contextlib.suppress(OSError):  # read-only: the next start removes it
                self._file.unlink(missing_ok=True)

    def _find_reason(self, save_time: float) -> str:
        now = time.time()
        self._longest, self._last = max(self._longest, now - self._last), now
        for what, end in self._limits.items():
            if now + 2 * self._longest + 2 * save_time + SLACK.get(what, 60.0) > end:
                return what
        if self._ranks.is_main and now - self._last_poll >= POLL_SECONDS:
            self._last_poll = now
            with contextlib.suppress(OSError):  # an unreachable file system is not a request
                if self._file.exists():
                    return f"the file {FILE}"
        return ""
