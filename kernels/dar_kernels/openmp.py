"""The OpenMP threads that torch keeps for each thread that calls it, and how to let them go.

GNU's runtime keeps a team for every calling thread. Idle members spin for about a millisecond, so
that the next operator starts at once, but only while the teams of the whole process have no more
members than there are cores; else each operator wakes its team through the kernel: 45 to 160 us in
place of 15 on two cores. So a thread that will wait lets its team go.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

SOFT = 1  # omp_pause_soft: threads go, settings stay


@cache
def _pause() -> Callable[[int], int] | None:
    """`omp_pause_resource_all` of the GNU runtime that torch brings; None where it has another."""
    root = Path(torch.__file__).parent
    for folder in (root / "lib", root.with_name("torch.libs")):
        for path in sorted(folder.glob("libgomp*.so*")):
            try:
                pause: Callable[[int], int] = ctypes.CDLL(str(path)).omp_pause_resource_all
            except (OSError, AttributeError):  # older than OpenMP 5.0
                continue
            return pause
    return None


def release_threads() -> bool:
    """Let go of the calling thread's OpenMP team; its next parallel operator makes a new one.

    Returns:
        whether there is a runtime that can.
    """
    pause = _pause()
    return pause is not None and pause(SOFT) == 0


__all__ = ["release_threads"]
