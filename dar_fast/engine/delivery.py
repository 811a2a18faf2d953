"""Events leave here: one thread waits for what the device has shipped, and calls the users' code.

A listener or scorer that raises fails its own request; the lanes never wait for either.
"""

import contextvars
import logging
import queue
import threading
from collections.abc import Callable

from dar_fast.engine.tasks import Job

log = logging.getLogger(__name__)
Fail = Callable[[Job, BaseException], None]


class Delivery:
    """Runs what it is given in order, one after the other, in its own thread, once that is started.

    Args:
        fail: called with the job and the exception where an item raises.
    """

    def __init__(self, fail: Fail) -> None:
        self._fail = fail
        self._items: queue.SimpleQueue[tuple[Job | None, Callable[[], None]] | None]
        self._items = queue.SimpleQueue()
        self.thread = threading.Thread(
            target=contextvars.copy_context().run,
            args=(self._main,),
            name="dar delivery",
            daemon=True,
        )

    def put(self, job: Job | None, item: Callable[[], None]) -> None:
        """Run `item` after all that was put before; where it raises, `job` fails."""
        self._items.put((job, item))

    def close(self) -> None:
        """Deliver what was put, then stop."""
        self._items.put(None)

    def _main(self) -> None:
        while (entry := self._items.get()) is not None:
            job, item = entry
            try:
                item()
            except BaseException as error:  # SystemExit too: others wait for this thread
                if job is None:
                    log.exception("dar_fast.engine: delivery failed")
                else:
                    self._fail(job, error)


__all__ = ["Delivery"]
