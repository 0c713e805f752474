"""Settings of the C library's memory allocator."""

import contextlib
import ctypes
import functools
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h


@functools.cache
def keep_freed() -> None:
    """Keep up to 256 MB of freed memory for new arrays of up to 32 MB each, instead of returning it to the system.

    By default the system zeroes each new array: half of the time that a pack from a token cache takes. Without glibc,
    or if the user has set its MALLOC_… variables, nothing is changed.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        if library.gnu_get_libc_version:  # AttributeError in another C library
            library.mallopt(_MMAP_THRESHOLD, 2**25)
            library.mallopt(_TRIM_THRESHOLD, 2**28)
