"""Who waits, for how long, and how it adds up: deadlines, priorities, a bounded queue."""

from dataclasses import replace

import pytest
from engine_helpers import (
    LONG,
    check_result,
    codes_request,
    held,
    idle,
    image_request,
    plain,
    scored_by,
    until,
)

from dar_fast.engine import (
    BestOf,
    DeadlineError,
    Finished,
    QueueFullError,
    RequestFailedError,
)


def test_deadlines_of_those_who_run_and_those_who_wait(tiny_pipeline, make_engine):
    engine = make_engine(max_requests=1)
    with held(engine) as gate:
        runs = engine.submit(codes_request(1, 0, deadline=0.05))
        gate.wait()
        waits = engine.submit(codes_request(1, 1, deadline=0.05))
        patient = engine.submit(codes_request(1, 2, deadline=1000.0))
        for handle in (runs, waits):  # told though the token lane hangs
            with pytest.raises(DeadlineError, match=r"not done 0\.05 s after it came"):
                handle.result(LONG)
        gate.open.set()
        check_result(patient.result(LONG), plain(tiny_pipeline, codes_request(1, 2)))
    idle(engine)
    assert engine.stats().expired == 2


def order_of(engine, gate, requests):
    """In which order the requests end, all queued behind one that runs."""
    order, done = [], []
    for i, request in enumerate(requests):
        handle = engine.submit(
            request, lambda event, i=i: isinstance(event, Finished) and order.append(i)
        )
        done.append(handle)
    gate.open.set()
    for handle in done:
        handle.result(LONG)
    until(lambda: len(order) == len(requests))
    return order


def test_priorities_go_first_and_equals_in_order(make_engine):
    engine = make_engine(max_requests=1)
    with held(engine) as gate:
        engine.submit(codes_request())
        gate.wait()
        levels = [0, 5, 0, 5, -1, 9]
        requests = [codes_request(seed=i, priority=p) for i, p in enumerate(levels)]
        assert order_of(engine, gate, requests) == [5, 1, 3, 0, 2, 4]


def test_a_stream_of_high_priorities_does_not_starve_a_low_one(make_engine):
    """Each time one ends another of priority 3 comes: the low one waits for 8 a level, no more."""
    engine = make_engine(max_requests=1, max_queue=4)
    ended, low_at = [], []
    high = codes_request(seed=1, priority=3, num_groups=1, prefix_codes=[1, 2, 3, 4])
    low = engine.submit(replace(high, priority=0), lambda event: low_at.append(len(ended)))
    waiting = [engine.submit(high) for _ in range(2)]
    while not low.done and len(ended) < 100:
        waiting.append(engine.submit(high))
        waiting.pop(0).result(LONG)
        ended.append(None)
    low.result(LONG)
    assert low_at[0] <= 3 * 8 + 4


def test_a_large_request_is_not_passed_over_by_small_ones(make_engine):
    """Four candidates need the whole engine; singles behind them wait, though a slot is free."""
    engine = make_engine(max_requests=4)
    order = []
    with held(engine) as gate:
        first = engine.submit(codes_request(), lambda e: order.append("first"))
        gate.wait()
        best = BestOf(count=4, groups=1, scorer=scored_by([1, 0, 0, 0]))
        big = engine.submit(image_request(best_of=best), lambda e: order.append(type(e).__name__))
        small = [engine.submit(codes_request(seed=i), lambda e: order.append("s")) for i in (1, 2)]
        assert engine.stats().queued == 3
        gate.open.set()
        for handle in (first, big, *small):
            handle.result(LONG)
    until(lambda: len(order) == 5)
    assert order[:2] == ["first", "Chosen"]
    idle(engine)


def test_a_full_queue_says_so_at_once(make_engine):
    engine = make_engine(max_requests=1, max_queue=2)
    with held(engine) as gate:
        handles = [engine.submit(codes_request())]
        gate.wait()
        handles += [engine.submit(codes_request(seed=i)) for i in (1, 2)]
        with pytest.raises(QueueFullError, match="2 requests wait"):
            engine.submit(codes_request(seed=3))
        with pytest.raises(QueueFullError):
            engine.fork(handles[0], 1)
        handles[2].cancel()
        handles.append(engine.submit(codes_request(seed=4)))  # there is room again
        gate.open.set()
        for i in (0, 1, 3):
            handles[i].result(LONG)
    idle(engine)
    assert engine.stats().refused == 2


def raises_always(event):
    raise OSError("no reader")


def test_stats_add_up(make_engine):
    engine = make_engine(max_requests=2, max_queue=8)
    with held(engine) as gate:
        done = [engine.submit(image_request(1, i, num_groups=2)) for i in range(3)]
        gate.wait()
        gone = engine.submit(codes_request())
        late = engine.submit(codes_request(deadline=0.01))
        gone.cancel()
        gone.cancel()
        stats = engine.stats()
        assert (stats.submitted, stats.cancelled) == (5, 1)
        assert 1 <= stats.running <= 2
        assert stats.pages == 4
        gate.open.set()
        for handle in done:
            handle.result(LONG)
        with pytest.raises(DeadlineError):
            late.result(LONG)
    bad = engine.submit(image_request(previews=True), raises_always)
    with pytest.raises(RequestFailedError):
        bad.result(LONG)
    idle(engine)
    stats = engine.stats()
    assert (stats.finished, stats.failed, stats.cancelled, stats.expired) == (3, 1, 1, 1)
    assert stats.groups >= 3 * 2
    assert stats.steps >= 3 * 2
    assert 0 < stats.group_batches <= stats.groups
    assert 0 < stats.step_batches <= stats.steps
    assert stats.tokens_seconds > 0
    assert stats.diffusion_seconds > 0
