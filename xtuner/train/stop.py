"""Requests to stop: finish the iteration, save, exit 75. A second Ctrl-C ends at once."""

import signal
from types import FrameType

from xtuner.core.log import logger

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stop:
    """Listens for signals from its making on."""

    def __init__(self) -> None:
        self.reason = ""
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name
        logger.warning(f"{self.reason}: stopping after this iteration")
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def agreed(self) -> bool:
        return bool(self.reason)
