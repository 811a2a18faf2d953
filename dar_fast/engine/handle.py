"""A submitted request, in the hands of who submitted it."""

import threading
from collections import deque
from collections.abc import Callable, Iterator

from dar_fast.engine.events import Event, Failed, Finished, Result

Listener = Callable[[Event], None]


class Handle:
    """Iterate over it for the events up to the end, or wait for the `result`; from any thread.

    An iteration that stops early leaves the request running: `cancel` ends it.
    """

    def __init__(self, number: int, cancel: Callable[[], None], listener: Listener | None) -> None:
        self.number = number  # of the request, in order of submission
        self._cancel = cancel
        self._listener = listener
        self._changed = threading.Condition()
        self._events: deque[Event] = deque()
        self._end: Finished | Failed | None = None

    def cancel(self) -> None:
        """Ask the engine to drop the request at its next boundary; harmless where it is done."""
        self._cancel()

    @property
    def done(self) -> bool:
        """Whether the request has ended, well or not."""
        return self._end is not None

    def __iter__(self) -> Iterator[Event]:
        """Events that no other iteration has taken; the last one is Finished or Failed."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._events or self._end)
                if not self._events:
                    return
                event = self._events.popleft()
            yield event

    def result(self, timeout: float | None = None) -> Result:
        """The result, once there is one.

        Raises:
            TimeoutError: where it takes longer than `timeout` seconds; the request goes on.
            RequestFailedError, RequestCancelledError, DeadlineError: where there will be none.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._end, timeout)
        if self._end is None:
            raise TimeoutError(f"request {self.number}: not done after {timeout} s")
        if isinstance(self._end, Failed):
            raise self._end.error
        return self._end.result

    def _tell(self, event: Event) -> None:
        """Pass an event on, and to the listener; what that raises goes to the engine."""
        with self._changed:
            if self._end is not None:
                return
            if isinstance(event, Finished | Failed):
                self._end = event
            self._events.append(event)
            listener = self._listener
            if self._end is not None:
                self._listener = None  # which may hold on to this handle
            self._changed.notify_all()
        if listener is not None:
            listener(event)


__all__ = ["Handle", "Listener"]
