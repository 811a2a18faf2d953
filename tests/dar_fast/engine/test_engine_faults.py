"""What fails fails alone, with its cause; the others' codes are unchanged and nothing is lost."""

import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from engine_helpers import (
    LONG,
    as_prefixed,
    check_events,
    codes_request,
    collect,
    conditions,
    diffusion,
    held,
    idle,
    image_request,
    plain,
    until,
)

from dar_fast.engine import (
    BestOf,
    EngineClosedError,
    Failed,
    RequestFailedError,
)
from dar_fast.engine.isolation import run_isolated
from dar_fast.sampling import Sampling

Q, K = 4, 4
ERRORS = {  # made in a test: one that is kept holds on to all that its frames do
    "memory": (MemoryError, "no room"),
    "device": (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB"),
    "bug": (ZeroDivisionError, "division by zero"),
}
PLACES = {
    "tokens, before": ("tokens", "before"),
    "tokens, after": ("tokens", "after"),
    "conditions": ("conditions", "before"),
    "step, before": ("step", "before"),
    "step, after": ("step", "after"),
}


def slot_of(engine, seed):
    """Where the request of a seed is, -1 where it is not in flight."""
    for task in list(engine._board.scheduler.running):
        if task.plan.seed == seed:
            return task.slot
    return -1


def break_for(engine, place, when, seed, error, at=0, times=None):
    """Make a part of the engine raise whenever the request of `seed` is in its batch.

    From its call `at` with that request on, `times` times; "after" its work is done.
    """
    runner = engine._machine.lanes[0].runner
    owner, name = {
        "tokens": (runner, "run"),
        "copies": (runner, "copy_pages"),
        "conditions": (conditions(engine), "extend"),
        "step": (diffusion(engine), "step"),
    }[place]
    work, calls = getattr(owner, name), []

    def broken(*args):
        slots = args[1] if place == "conditions" else [row.slot for row in args[0]]
        hit = slot_of(engine, seed) in slots
        if hit:
            calls.append(len(slots))
        due = hit and len(calls) > at and (times is None or len(calls) <= at + times)
        if due and when == "before":
            raise error
        result = work(*args)
        if due:
            raise error
        return result

    setattr(owner, name, broken)
    return calls


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize(("place", "when"), PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("at", [0, 2])
def test_what_fails_whenever_it_is_there_fails_alone(
    tiny_pipeline, make_engine, place, when, at, error
):
    kind, words = error
    error = kind(words)
    engine = make_engine(max_requests=5)
    requests = [image_request(i, 50 + i, previews=True, num_steps=4 + i) for i in range(5)]
    break_for(engine, place, when, 52, error, at)
    with held(engine, "pictures") as gate:
        handles = [engine.submit(request) for request in requests]
        gate.open.set()
        told = [collect(handle) for handle in handles]
    for i, (events, request) in enumerate(zip(told, requests, strict=True)):
        if i != 2:
            check_events(events, plain(tiny_pipeline, request), request, Q)
            continue
        end = events[-1]
        assert isinstance(end, Failed)
        assert isinstance(end.error, RequestFailedError)
        assert end.error.__cause__ is error
        assert type(error).__name__ in str(end.error)
        assert str(error) in str(end.error)
        wanted = plain(tiny_pipeline, request)
        for event in events[:-1]:  # what it told before is right
            assert event.codes.tolist() == wanted.reads[event.step - 1].tolist()
    idle(engine)
    assert engine.stats().failed == 1
    assert engine.stats().finished == 4


@pytest.mark.parametrize(("place", "when"), PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_batch_that_fails_once_is_run_again(tiny_pipeline, make_engine, place, when, at):
    """Also where it failed behind its work: to do that again gives the same."""
    engine = make_engine(max_requests=4, deterministic=True)  # draws on, whoever waits for steps
    requests = [image_request(i, 50 + i, previews=True, num_steps=6) for i in range(4)]
    sizes = break_for(engine, place, when, 51, MemoryError("now and then"), at, times=1)
    with held(engine) as tokens, held(engine, "pictures") as pictures:
        handles = [engine.submit(requests[0])]
        tokens.wait()  # the others are one batch, behind it
        handles += [engine.submit(request) for request in requests[1:]]
        tokens.open.set()
        until(lambda: engine.stats().groups == 4 * K)
        pictures.open.set()
        told = [collect(handle) for handle in handles]
    assert sizes[at] > 1
    for events, request in zip(told, requests, strict=True):
        check_events(events, plain(tiny_pipeline, request), request, Q)
    assert engine.stats().retries >= 1
    idle(engine)


@pytest.mark.parametrize("when", ["before", "after"])
def test_forks_in_a_batch_that_fails_keep_their_pages_apart(tiny_pipeline, make_engine, when):
    """A page is copied for the first of those who share it to write; run again, the others have
    written to it since."""
    engine = make_engine(max_requests=5)
    parent = codes_request(1, 3, previews=True, sampling=Sampling(guidance_scale=3.0))
    wanted = plain(tiny_pipeline, parent)
    two, forked = threading.Event(), threading.Event()
    runner = engine._machine.lanes[0].runner
    run, positions = runner.run, []

    def flaky(rows):
        positions.append([row.position for row in rows])
        if len(positions) == 3:
            assert forked.wait(LONG)
        if len(positions) == 4:
            if when == "after":
                run(rows)
            raise MemoryError("once")
        return run(rows)

    runner.run = flaky
    handle = engine.submit(parent, lambda e: getattr(e, "group", 0) == 1 and two.set())
    assert two.wait(LONG)
    groups = (1, 2, 1)
    forks = [engine.fork(handle, group, seed=50 + i) for i, group in enumerate(groups)]
    forked.set()
    check_events(collect(handle), wanted, parent, Q)
    for i, (fork, group) in enumerate(zip(forks, groups, strict=True)):
        request = as_prefixed(replace(parent, seed=50 + i), wanted, group, Q)
        check_events(collect(fork), plain(tiny_pipeline, request), request, Q)
    assert positions[3] == [12, 4, 8, 4]
    idle(engine)


def test_a_failed_copy_of_pages_is_repeated(tiny_pipeline, make_engine):
    engine = make_engine(max_requests=3)
    parent = codes_request(1, 3, previews=True)
    wanted = plain(tiny_pipeline, parent)
    runner = engine._machine.lanes[0].runner
    copy_pages, run, failed = runner.copy_pages, runner.run, []
    one, forked = threading.Event(), threading.Event()

    def copy_once(pairs):
        if not failed:
            failed.append(pairs)
            raise MemoryError("a copy")
        copy_pages(pairs)

    def slow(rows):
        if rows[0].position == Q:
            assert forked.wait(LONG)
        return run(rows)

    runner.copy_pages, runner.run = copy_once, slow
    handle = engine.submit(parent, lambda event: one.set())
    assert one.wait(LONG)
    forks = [engine.fork(handle, 1, seed=60 + i) for i in range(2)]
    forked.set()
    check_events(collect(handle), wanted, parent, Q)
    for i, fork in enumerate(forks):
        request = as_prefixed(replace(parent, seed=60 + i), wanted, 1, Q)
        check_events(collect(fork), plain(tiny_pipeline, request), request, Q)
    assert failed
    idle(engine)


def test_a_failing_candidate_fails_its_request(tiny_pipeline, make_engine):
    engine = make_engine(max_requests=5)
    other = image_request(4, 9, previews=True)
    break_for(engine, "step", "before", 71, MemoryError("candidate"))
    bad = engine.submit(image_request(1, 70, best_of=BestOf(count=3, groups=2)))
    good = engine.submit(other)
    with pytest.raises(RequestFailedError, match="MemoryError: candidate"):
        bad.result(LONG)
    check_events(collect(good), plain(tiny_pipeline, other), other, Q)
    idle(engine)


@pytest.mark.parametrize("lane", [0, 1], ids=["tokens", "diffusion"])
def test_a_lane_that_is_gone_fails_all_and_closes(make_engine, lane):
    engine = make_engine(max_requests=2)

    def broken():
        raise AssertionError("what cannot happen")

    with held(engine) as gate:
        handles = [engine.submit(image_request(seed=i)) for i in range(4)]
        gate.wait()
        engine._machine.lanes[lane].pick = broken
        gate.open.set()
        for handle in handles:
            end = collect(handle)[-1]
            assert isinstance(end, Failed)
            assert isinstance(end.error.__cause__.__cause__, AssertionError)
    with pytest.raises(EngineClosedError):
        engine.submit(codes_request())
    engine.close()


def test_a_process_may_end_with_an_engine_at_work():
    program = """
import torch
from dar_fast.engine import Engine, EngineConfig, GenerationRequest
engine = Engine.from_pretrained("demo", EngineConfig(threads=1, max_requests=4), "cpu")
handles = [engine.submit(GenerationRequest(label=i, seed=i, previews=True)) for i in range(8)]
print(next(iter(handles[0])).step)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=LONG, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


@pytest.mark.parametrize("bad", [set(), {0}, {3}, {1, 2}, {0, 1, 2, 3, 4}])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_halves_find_those_that_fail(bad, count):
    calls = []

    def run(items):
        calls.append(list(items))
        if bad & set(items):
            raise ValueError(f"bad: {sorted(bad & set(items))}")
        return [item * 10 for item in items]

    ran = run_isolated(run, list(range(count)))
    good = [i for i in range(count) if i not in bad]
    assert [item for part, _ in ran.done for item in part] == good
    assert [r for _, results in ran.done for r in results] == [i * 10 for i in good]
    assert [item for item, _ in ran.failed] == [i for i in range(count) if i in bad]
    assert all(str(error) == f"bad: [{item}]" for item, error in ran.failed)
    if not bad & set(range(count)):
        assert ran.retries == 0
        assert calls == [list(range(count))]
