"""Files that grow record by record during a run: logs and metrics. An error of writing loses records, not the run."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path


class AppendFile:
    """A file to which whole records are appended; no method raises OSError.

    A record that cannot be written (disk full, folder deleted) is lost. The first loss is reported; later records are
    attempted again, so the file continues once the disk has space. A partially written record is removed again.

    Args:
        report: called with one sentence.
        header: first bytes of a new file.
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
                self._report(f"{self.path} was deleted; a new file is started")
            if self._fd is None:
                self._open()
            self._append(record)
        except OSError as e:
            self.lost += 1
            if self.lost == 1:
                self._report(f"{self.path} cannot be written: {e.strerror}; records are lost until it can be")

    def _open(self) -> None:
        # One level only: if the file system was unmounted, deeper folders would be created on another disk.
        self.path.parent.mkdir(exist_ok=True)
        self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def _append(self, record: bytes) -> None:
        assert self._fd is not None
        size = os.fstat(self._fd).st_size
        left = memoryview(record if size else self._header + record)  # the header is lost if the disk was full
        try:
            while left:
                left = left[os.write(self._fd, left) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, size)
            raise

    def close_and_report(self) -> None:
        """Close, and report how many records were lost."""
        self.close()
        if self.lost:
            self._report(f"{self.lost} records of {self.path} were lost")

    def close(self) -> None:
        if self._fd is not None:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = None
