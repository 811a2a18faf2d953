"""The threads of engines."""

import threading

ENGINE_THREADS = ("dar tokens", "dar diffusion", "dar delivery", "dar closing")
CLOSING = 60.0  # seconds at most, on a busy machine


def engine_threads() -> set[threading.Thread]:
    """Threads of engines that are not closed."""
    return {thread for thread in threading.enumerate() if thread.name in ENGINE_THREADS}
