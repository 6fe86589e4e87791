"""Memory that a step frees is there for the next one: on a CPU, glibc would give it back to the system in between.

A step makes and drops hundreds of tensors of a few megabytes. glibc maps each of them anew, and the system fills it
with zeros page by page before the step may write to it.
"""

from __future__ import annotations

import ctypes
import sys

# malloc.h's names for the parameters of mallopt.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST = 32 << 20  # bytes; glibc accepts no greater threshold. What is larger is mapped as ever, and so given back.


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, up to 2 GiB at a time; whether the allocator could be told so."""
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
