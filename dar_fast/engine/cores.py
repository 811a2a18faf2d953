"""Processor cores between two lanes: reading weights and multiplying matrices at the same time.

A decode step is bound by memory, which one core of two nearly saturates (two cores read 1.1 times
as fast as one on the machine of bench/results/cpu-zen4-2-cores); a solver step by arithmetic. So
while both lanes have work each keeps a share, and a lane that is alone has all cores. The diffusion
lane changes its number of threads between blocks, so it gives way, and takes over, within
a fraction of a step.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Cores:
    """Splits `total` cores: the token lane has a quarter, at least one, while both lanes work.

    With `fixed` always: small fp32 products have other bits with another number of threads.
    """

    def __init__(self, total: int, fixed: bool = False) -> None:
        if total < 1:
            raise ValueError(f"threads: expected at least 1, got {total}")
        self.total, self.fixed = total, fixed
        self.default = torch.get_num_threads()  # what threads that are not ours should have
        self.tokens_share = max(1, total // 4)
        self._changed = threading.Condition()
        self._tokens = 0  # cores that the token lane has
        self._diffusion = 0
        self._wanted = False  # the token lane waits for its share

    @contextmanager
    def tokens(self, alone: bool) -> Iterator[int]:
        """Cores of the token lane for one group: all where it is `alone` and they are free.

        Waits for the diffusion lane to give way.
        """
        with self._changed:
            self._wanted = True
            try:
                self._changed.wait_for(self._share_free)
            finally:
                self._wanted = False
            free = max(1, self.total - self._diffusion)  # one core is for both
            self._tokens = free if alone and not self.fixed else min(free, self.tokens_share)
            self._changed.notify_all()
        try:
            torch.set_num_threads(self._tokens)  # of this thread
            yield self._tokens
        finally:
            with self._changed:
                self._tokens = 0
                self._changed.notify_all()

    def _share_free(self) -> bool:
        return self.total == 1 or self.total - self._diffusion >= self.tokens_share

    @contextmanager
    def diffusion(self) -> Iterator[None]:
        """Cores of the diffusion lane for one batch of steps; `adjust` follows the token lane."""
        with self._changed:
            self._changed.wait_for(lambda: self.total == 1 or self._tokens < self.total)
            self._take()
        try:
            yield
        finally:
            with self._changed:
                self._diffusion = 0
                self._changed.notify_all()

    def adjust(self) -> None:
        """Take what is free, or leave the token lane its share; called by the diffusion lane."""
        with self._changed:
            self._take()

    def _take(self) -> None:
        taken = max(self._tokens, self.tokens_share if self._wanted or self.fixed else 0)
        cores = max(1, self.total - taken)
        if cores != self._diffusion:
            self._diffusion = cores
            torch.set_num_threads(cores)
            self._changed.notify_all()


__all__ = ["Cores"]
