"""An engine that is closed, used afterwards, forgotten, or never came to be."""

import gc
import threading
import time
import weakref

import pytest
from engine_helpers import (
    LONG,
    Q,
    check_events,
    codes_request,
    collect,
    held,
    idle,
    image_request,
    plain,
    scored_by,
    until,
)

from dar_fast.engine import (
    BestOf,
    Engine,
    EngineClosedError,
    EngineConfig,
    Failed,
    Finished,
    RequestCancelledError,
    RequestFailedError,
)
from engine_threads import engine_threads


def test_close_cancels_and_again_is_harmless(make_engine):
    engine = make_engine(max_requests=1)
    with held(engine) as gate:
        handles = [engine.submit(codes_request(seed=i)) for i in range(3)]
        gate.wait()
        handles.append(engine.fork(handles[0], 2))
        closer = threading.Thread(target=engine.close, daemon=True)
        closer.start()
        until(lambda: engine.closed)
        gate.open.set()
        closer.join(LONG)
        assert not closer.is_alive()
    for handle in handles[:3]:
        with pytest.raises(RequestCancelledError):
            handle.result(LONG)
    with pytest.raises((RequestCancelledError, RequestFailedError)):
        handles[3].result(LONG)
    idle(engine)
    engine.close()
    engine.close(drain=True)


def test_drain_finishes_what_there_is(tiny_pipeline, make_engine):
    engine = make_engine(max_requests=2)
    requests = [image_request(1, i, previews=True) for i in range(4)]
    best = BestOf(count=2, groups=2, scorer=scored_by([0, 1]))
    with held(engine) as gate:
        handles = [engine.submit(request) for request in requests]
        chosen = engine.submit(image_request(2, 9, best_of=best))
        fork = engine.fork(handles[0], 2, seed=33)
        closer = threading.Thread(target=engine.close, args=(True,), daemon=True)
        closer.start()
        until(lambda: engine.closed)
        with pytest.raises(EngineClosedError):
            engine.submit(requests[0])
        gate.open.set()
        closer.join(LONG)
        assert not closer.is_alive()
    for handle, request in zip(handles, requests, strict=True):
        check_events(collect(handle), plain(tiny_pipeline, request), request, Q)
    assert (chosen.result(0).seed, fork.result(0).seed) == (10, 33)
    idle(engine)


def test_close_hastens_a_drain(make_engine):
    engine = make_engine(max_requests=1)
    with held(engine) as gate:
        handles = [engine.submit(codes_request(seed=i)) for i in range(3)]
        gate.wait()
        closers = [
            threading.Thread(target=engine.close, args=(drain,), daemon=True)
            for drain in (True, False, True, False)
        ]
        for closer in closers:
            closer.start()
        until(lambda: all(handle.done for handle in handles))
        gate.open.set()
        for closer in closers:
            closer.join(LONG)
            assert not closer.is_alive()
    assert engine.stats().cancelled == 3


@pytest.mark.parametrize("drain", [False, True])
def test_a_listener_may_close_the_engine(make_engine, drain):
    engine = make_engine()
    best = BestOf(count=2, groups=2, scorer=scored_by([0, 1]))
    closed = threading.Event()

    def listener(event):
        if not closed.is_set():
            engine.close(drain)
            closed.set()

    with held(engine) as gate:
        first = engine.submit(image_request(previews=True), listener)
        gate.wait()
        others = [engine.submit(image_request(2, 9, best_of=best)), engine.fork(first, 3)]
        gate.open.set()
        assert closed.wait(LONG)
        engine.close(drain)  # from outside, meanwhile
    ends = [list(handle)[-1] for handle in (first, *others)]
    if drain:
        assert all(isinstance(end, Finished) for end in ends)
    else:
        assert isinstance(ends[1], Failed)
    idle(engine)


def test_use_after_close(engine):
    handle = engine.submit(codes_request())
    handle.result(LONG)
    engine.close()
    for use in (
        lambda: engine.submit(codes_request()),
        lambda: engine.fork(handle, 1),
        lambda: engine.stream(codes_request()),
        lambda: engine.generate([codes_request()]),
        engine.__enter__,
    ):
        with pytest.raises(EngineClosedError, match="expected an open one, got one that is closed"):
            use()
    assert handle.result(0).label == 1
    handle.cancel()
    assert engine.closed
    assert engine.stats().finished == 1


def test_leaving_a_with_block_closes(tiny_pipeline, make_engine):
    with make_engine() as engine:
        engine.submit(codes_request()).result(LONG)
    assert engine.closed


def test_a_forgotten_engine_is_closed(tiny_pipeline):
    before = set(engine_threads())
    engine = Engine(tiny_pipeline.prior, tiny_pipeline.tokenizer, EngineConfig(max_requests=2))
    running = engine.submit(image_request(num_steps=12))
    mine = set(engine_threads()) - before
    assert len(mine) == 3
    reference = weakref.ref(engine)
    del engine
    gc.collect()
    assert reference() is None
    until(lambda: not any(thread.is_alive() for thread in mine))
    until(lambda: running.done)


def test_an_engine_that_its_own_listener_drops_is_closed(tiny_pipeline):
    """The last reference goes in the engine's own thread, which cannot wait for itself."""
    before = set(engine_threads())
    box = [Engine(tiny_pipeline.prior, tiny_pipeline.tokenizer, EngineConfig(max_requests=2))]
    mine = set(engine_threads()) - before

    def listener(event):
        box.clear()
        gc.collect()

    handle = box[0].submit(image_request(previews=True), listener)
    until(lambda: not any(thread.is_alive() for thread in mine))
    assert handle.done


def test_an_engine_that_could_not_be_made_leaves_no_thread(tiny_pipeline):
    gc.collect()  # engines that a test before forgot are gone first
    until(lambda: all(thread.name != "dar closing" for thread in engine_threads()))
    before = set(engine_threads())
    with pytest.raises((ValueError, RuntimeError)):
        Engine(tiny_pipeline.prior, tiny_pipeline.tokenizer, EngineConfig(page_dtype="fp8"))
    assert set(engine_threads()) == before


def test_what_has_ended_is_gone_with_its_handle(engine):
    """Without the collector's help: pictures are large, and cycles wait long for it."""
    gc.collect()
    gc.disable()
    try:
        handle = engine.submit(image_request(previews=True), lambda event: None)
        picture = weakref.ref(handle.result(LONG).image)
        idle(engine)
        time.sleep(0.01)
        del handle
        until(lambda: picture() is None, 5)
    finally:
        gc.enable()
