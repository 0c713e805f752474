"""Files that grow record by record beside the work: logs and curves. They may be lost, never the process."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path


class AppendFile:
    """A file to which whole records are appended; no method raises OSError.

    A record that cannot be written (a full disk, a folder that has vanished) is lost. The first such loss is reported;
    every further record is tried again, so that the file continues when the disk has room. A record cut short by a
    full disk is removed: readers meet whole ones only.

    Args:
        report: takes one sentence.
        header: what a new file begins with.
    """

    def __init__(self, path: Path, report: Callable[[str], None], header: bytes = b"") -> None:
        self.path = path
        self.lost = 0  # records
        self._report, self._header = report, header
        self._fd: int | None = None

    def write(self, record: bytes) -> None:
        try:
            if self._fd is not None and not os.fstat(self._fd).st_nlink:
                self.close()
                self._report(f"{self.path} has been removed, with what it held; a new one is begun")
            if self._fd is None:
                self._open()
            self._append(record)
        except OSError as e:
            self.lost += 1
            if self.lost == 1:
                self._report(f"{self.path} cannot be written: {e.strerror}; what belongs there is lost until it can be")

    def _open(self) -> None:
        # One level only: under a file system that is no longer mounted, deeper folders would be made on another disk.
        self.path.parent.mkdir(exist_ok=True)
        self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def _append(self, record: bytes) -> None:
        assert self._fd is not None
        size = os.fstat(self._fd).st_size
        left = memoryview(record if size else self._header + record)  # a disk that was full may have cost the header
        try:
            while left:
                left = left[os.write(self._fd, left) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, size)
            raise

    def close_and_report(self) -> None:
        """Close, and say how many records were lost."""
        self.close()
        if self.lost:
            self._report(f"{self.lost} records of {self.path} were lost")

    def close(self) -> None:
        if self._fd is not None:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = None
