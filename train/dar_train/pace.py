"""When things are due in a run, and whether somebody asked it to stop."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import NamedTuple

from dar_train.reporting import logger


class Now(NamedTuple):
    """Where a run is; every rank acts on the same one."""

    step: int  # optimizer steps done
    seconds: float  # of training, over all calls
    stop: str | None = None  # why to stop, where somebody asked


@dataclass
class Every:
    """Every so many steps where they are given, else every so many minutes of training."""

    minutes: float
    steps: int | None
    last: Now

    def due(self, now: Now) -> bool:
        """Whether it is time again; then the wait begins anew."""
        if self.steps is not None:
            due = now.step // self.steps > self.last.step // self.steps
        else:
            due = now.seconds - self.last.seconds >= 60 * self.minutes
        if due:
            self.last = now
        return due


class Stop:
    """Notes SIGINT and SIGTERM while a run lasts, so that it ends between two steps."""

    def __init__(self) -> None:
        self.reason: str | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals over meanwhile; outside the main thread nothing is taken."""

        def handler(number: int, frame: FrameType | None) -> None:
            self.reason = signal.Signals(number).name

        old = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                old[number] = signal.signal(number, handler)
        except ValueError:  # only the main thread may listen; elsewhere signals are not ours
            logger.debug("not in the main thread: no signal handlers")
        try:
            yield
        finally:
            for number, previous in old.items():
                signal.signal(number, previous)
