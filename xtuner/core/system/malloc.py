"""What the C library does with memory that has been freed."""

import contextlib
import ctypes
import functools
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h


@functools.cache
def keep_freed() -> None:
    """Let this process keep up to 256 MB that was freed, for the next arrays, of up to 32 MB each.

    By default such arrays are given back, and the system zeroes new ones: half of what a pack from a token cache costs.
    Elsewhere than in glibc, or where the user has set its MALLOC_… variables, nothing is done.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        if library.gnu_get_libc_version:  # AttributeError in any other library
            library.mallopt(_MMAP_THRESHOLD, 2**25)
            library.mallopt(_TRIM_THRESHOLD, 2**28)
