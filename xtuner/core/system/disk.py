"""Measure a file system: its speed, and whether it has the guarantees that locks and checkpoints rely on."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from xtuner.core.files import sync_folder

CHUNK = 16 * 2**20  # bytes
SECONDS = 1.0  # time limit of writing, and of reading; the current chunk is finished


def nearest_existing(folder: Path) -> Path:
    """`folder`, or its nearest parent that exists."""
    folder = folder.expanduser().absolute()
    return next(f for f in (folder, *folder.parents) if f.is_dir())


def measure_speed(folder: Path, size: int, step: Callable[[int], object] = lambda done: None) -> tuple[float, float]:
    """(write with fsync, read) in bytes/s, for a file of at most `size` bytes in `folder`.

    On a slow disk the file is smaller. Before reading, the file is dropped from the page cache; where the system
    ignores this, the read speed is that of memory. `step` is called with the bytes done so far. Raises: OSError.
    """
    chunk = os.urandom(min(CHUNK, size))  # incompressible
    path = folder / "speed"
    try:
        with open(path, "wb", buffering=0) as f:
            begin, written = time.perf_counter(), 0
            while written < size and (not written or time.perf_counter() - begin < SECONDS):
                written += f.write(chunk)
                os.fsync(f.fileno())
                step(written)
            write_s = time.perf_counter() - begin
        with open(path, "rb", buffering=0) as f:
            with contextlib.suppress(OSError, AttributeError):
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            begin, read = time.perf_counter(), 0
            while time.perf_counter() - begin < SECONDS and (got := len(f.read(CHUNK))):
                read += got
                step(written + read)
            read_s = time.perf_counter() - begin
    finally:
        path.unlink(missing_ok=True)
    return written / write_s, read / read_s


def find_broken_guarantees(folder: Path) -> Iterator[str]:
    """Guarantees that `folder` lacks: the lock relies on hard links, checkpoints on rename and fsync."""
    a, b = folder / "a", folder / "b"
    a.write_text("a")
    b.write_text("b")
    try:
        os.link(a, folder / "linked")
        if not (folder / "linked").samefile(a):
            yield "a hard link is a separate file"
    except OSError as e:
        yield f"hard links: {e.strerror}"
    else:
        with contextlib.suppress(FileExistsError):
            os.link(b, folder / "linked")
            yield "a hard link replaces an existing file"
    try:
        os.replace(b, a)
        if a.read_text() != "b" or b.exists():
            yield "rename does not replace an existing file"
        (folder / "c").mkdir()
        os.rename(folder / "c", folder / "d")
    except OSError as e:
        yield f"rename: {e.strerror}"
    try:
        with open(a, "rb+") as f:
            os.fsync(f.fileno())
        sync_folder(folder)
    except OSError as e:
        yield f"fsync: {e.strerror}"
