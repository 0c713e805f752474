"""What a folder's file system does: how fast, and whether it keeps the promises that locks and checkpoints need."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from xtuner.core.files import sync_folder

CHUNK = 16 * 2**20  # bytes
SECONDS = 1.0  # at most, for writing and for reading each, but for the chunk that is under way then


def nearest_existing(folder: Path) -> Path:
    """`folder`, or the nearest one above it that exists."""
    folder = folder.expanduser().absolute()
    return next(f for f in (folder, *folder.parents) if f.is_dir())


def measure_speed(folder: Path, size: int, step: Callable[[int], object] = lambda done: None) -> tuple[float, float]:
    """Write (fsync included) and read bytes a second of a file of at most `size` bytes in `folder`.

    A slow disk gets a smaller file. The page cache is asked to forget the file before it is read; where a system does
    not do so, reading is memory's speed. `step` is called with the bytes done so far, of both. Raises: OSError.
    """
    chunk = os.urandom(min(CHUNK, size))  # nothing that a file system could compress
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
    """What does not work in `folder` of that which the lock (hard links) and checkpoints (rename, fsync) rely on."""
    a, b = folder / "a", folder / "b"
    a.write_text("a")
    b.write_text("b")
    try:
        os.link(a, folder / "linked")
        if not (folder / "linked").samefile(a):
            yield "a hard link is another file"
    except OSError as e:
        yield f"hard links: {e.strerror}"
    else:
        with contextlib.suppress(FileExistsError):
            os.link(b, folder / "linked")
            yield "a hard link replaces a file that is there"
    try:
        os.replace(b, a)
        if a.read_text() != "b" or b.exists():
            yield "rename does not replace a file"
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
