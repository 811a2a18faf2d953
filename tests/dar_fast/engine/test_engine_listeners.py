"""Listeners that raise or sleep, readers that die: the others do not notice."""

import threading

import pytest
from engine_helpers import (
    LONG,
    check_events,
    codes_request,
    collect,
    idle,
    image_request,
    plain,
    until,
)

from dar_fast.engine import (
    Failed,
    RequestFailedError,
)

Q, K = 4, 4


@pytest.mark.parametrize("nth", range(4))
@pytest.mark.parametrize("output", ["codes", "image"])
@pytest.mark.parametrize("error", [OSError, SystemExit], ids=["error", "exit"])
def test_a_listener_that_raises_fails_its_request(tiny_pipeline, make_engine, output, nth, error):
    """At whichever event: the lanes may be done with the request long before it is told."""
    error = error("mine")
    engine = make_engine()
    requests = [image_request(i, 20 + i, previews=True, output=output) for i in range(2)]
    calls = []

    def listener(event):
        calls.append(event)
        if len(calls) == nth + 1:
            until(lambda: engine.stats().running <= 1)  # the lanes have gone on
            raise error

    handles = [engine.submit(requests[0], listener), engine.submit(requests[1])]
    told = [collect(handle) for handle in handles]
    assert isinstance(told[0][-1], Failed)
    assert told[0][-1].error.__cause__ is error
    with pytest.raises(RequestFailedError):
        handles[0].result(LONG)
    check_events(told[1], plain(tiny_pipeline, requests[1]), requests[1], Q)
    idle(engine)
    assert (engine.stats().failed, engine.stats().finished) == (1, 1)


def test_a_listener_that_raises_at_the_end_is_too_late(tiny_pipeline, engine, caplog):
    request = codes_request()

    def listener(event):
        raise OSError("at the end")

    handle = engine.submit(request, listener)
    events = collect(handle)
    check_events(events, plain(tiny_pipeline, request), request, Q)
    until(lambda: "raised after its end" in caplog.text)
    idle(engine)
    assert engine.stats().finished == 1


def test_a_listener_that_raises_at_a_failure_is_too_late(engine):
    calls = []

    def listener(event):
        calls.append(event)
        raise OSError("again")

    handle = engine.submit(codes_request(previews=True), listener)
    assert isinstance(collect(handle)[-1], Failed)
    until(lambda: calls and isinstance(calls[-1], Failed))
    idle(engine)
    assert engine.stats().failed == 1


def test_a_slow_listener_does_not_hold_the_lanes(engine):
    """Others are drawn to the end while it sleeps; they are told when it wakes."""
    slept, go = threading.Event(), threading.Event()

    def listener(event):
        slept.set()
        assert go.wait(LONG)

    try:
        slow = engine.submit(codes_request(previews=True), listener)
        assert slept.wait(LONG)
        others = [engine.submit(image_request(seed=i)) for i in range(8)]
        until(lambda: engine.stats().running == engine.stats().queued == 0)
        assert not any(handle.done for handle in others)
    finally:
        go.set()
    for handle in (slow, *others):
        handle.result(LONG)


def test_a_reader_that_dies_harms_nobody(tiny_pipeline, engine):
    """A thread that ends without reading, and a handle that nobody keeps."""
    requests = [image_request(i, i, previews=True) for i in range(3)]

    def reader():
        for _ in engine.submit(requests[0]):
            return

    dying = threading.Thread(target=reader)
    dying.start()
    engine.submit(requests[1])
    handle = engine.submit(requests[2])
    dying.join(LONG)
    check_events(collect(handle), plain(tiny_pipeline, requests[2]), requests[2], Q)
    idle(engine)
    assert engine.stats().finished == 3
