"""Memory of the host that a training step frees, kept for the next one.

glibc maps a large block anew with each allocation, until it has learned not to, and unmaps it when
it is freed; the kernel then clears every page again: up to 800 MB and 2 s of a CPU step of 6 s.
"""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
GIB = 1 << 30
OLD_LIMIT = 1 << 25  # the most that an older glibc takes


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, up to its peak; True where that could be arranged.

    A setting of the whole process. Nothing happens without glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    mapped = mallopt(M_MMAP_THRESHOLD, GIB) or mallopt(M_MMAP_THRESHOLD, OLD_LIMIT)
    return bool(mapped and mallopt(M_TRIM_THRESHOLD, 2 * GIB - 1))
