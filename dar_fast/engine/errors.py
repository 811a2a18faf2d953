"""What can go wrong with a request, or with the engine."""


class EngineError(RuntimeError):
    """The engine or a request in it did not do what was asked."""


class EngineClosedError(EngineError):
    """The engine takes no requests any more."""


class QueueFullError(EngineError):
    """As many requests wait as the engine was made for; ask again later."""


class AdmissionError(ValueError):
    """This engine can never serve that request; the message says what it needs."""


class RequestFailedError(EngineError):
    """A request failed; `__cause__` is why."""


class RequestCancelledError(EngineError):
    """A request was cancelled before it was done."""


class DeadlineError(EngineError):
    """A request was not done when its deadline passed."""


__all__ = [
    "AdmissionError", "DeadlineError", "EngineClosedError", "EngineError", "QueueFullError",
    "RequestCancelledError", "RequestFailedError",
]  # fmt: skip
