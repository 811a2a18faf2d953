"""Branches of a request at a group, and pictures whose first groups are kept."""

import threading
from dataclasses import replace

import pytest
from engine_helpers import (
    LONG,
    UNGUIDED,
    WARM,
    K,
    Q,
    as_prefixed,
    check_events,
    check_result,
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
    GroupDrawn,
    RequestCancelledError,
    RequestFailedError,
)
from dar_fast.sampling import Sampling

FORKS = {
    "same settings": {},
    "another label": {"label": 3},
    "another sampling": {"sampling": Sampling(guidance_scale=(1.5, 5.0), temperature=0.7)},
    "unguided": {"sampling": UNGUIDED},
    "other steps": {"num_steps": 7, "solver": "euler"},
    "another noise": {"noise_seed": 99},
    "shorter": {"num_groups": 3},
    "codes": {"output": "codes"},
}


@pytest.mark.parametrize("changes", FORKS.values(), ids=FORKS)
@pytest.mark.parametrize("when", ["before", "during", "after"])
@pytest.mark.parametrize("group", [1, 2])
def test_a_fork_is_the_request_with_its_parents_codes_given(
    tiny_pipeline, engine, changes, when, group
):
    parent = image_request(1, 3, sampling=WARM, previews=True)
    wanted = plain(tiny_pipeline, parent)
    with held(engine) as gate:
        handle = engine.submit(parent)
        gate.wait()
        if when == "before":
            fork = engine.fork(handle, group, seed=17, **changes)
        gate.open.set()
        if when == "during":
            until(lambda: engine.stats().groups >= group)
            fork = engine.fork(handle, group, seed=17, **changes)
        if when == "after":
            handle.result(LONG)
            fork = engine.fork(handle, group, seed=17, **changes)
        asked = as_prefixed(replace(parent, seed=17, **changes), wanted, group, Q)
        noise = changes.get("noise_seed", 3)
        check_events(collect(fork), plain(tiny_pipeline, asked, noise), asked, Q)
        check_events(collect(handle), wanted, parent, Q)
    idle(engine)


def test_a_fork_takes_over_pages_of_a_running_parent(tiny_pipeline, engine):
    """One whose parent stands still shares its keys and values, and nobody's codes change."""
    parent = codes_request(1, 3, sampling=WARM, previews=True)
    wanted = plain(tiny_pipeline, parent)
    two = threading.Event()

    def listener(event):
        if isinstance(event, GroupDrawn) and event.group == 1:
            two.set()

    run, batches = engine._machine.lanes[0].runner.run, []

    def slow(rows):
        batches.append([row.position for row in rows])
        if len(batches) == 3:
            assert forked.wait(LONG)
        return run(rows)

    forked = threading.Event()
    engine._machine.lanes[0].runner.run = slow
    handle = engine.submit(parent, listener)
    assert two.wait(LONG)
    forks = [engine.fork(handle, 1, seed=50), engine.fork(handle, 2, seed=51)]
    again = engine.fork(forks[1], 3, seed=52)
    forked.set()
    check_events(collect(handle), wanted, parent, Q)
    asked = [as_prefixed(replace(parent, seed=50 + i), wanted, i + 1, Q) for i in range(2)]
    for fork, request in zip(forks, asked, strict=True):
        check_events(collect(fork), plain(tiny_pipeline, request), request, Q)
    first = plain(tiny_pipeline, asked[1])
    request = as_prefixed(replace(parent, seed=52), first, 3, Q)
    check_events(collect(again), plain(tiny_pipeline, request), request, Q)
    assert batches[3] == [12, 4, 8]  # the shared groups are not drawn again
    idle(engine)


def test_a_fork_of_a_cancelled_parent(tiny_pipeline, engine):
    parent = codes_request(1, 3, previews=True)
    wanted = plain(tiny_pipeline, parent)
    with held(engine) as gate:
        handle = engine.submit(parent)
        gate.wait()
        waits = engine.fork(handle, 2, seed=8)
        handle.cancel()
        late = engine.fork(handle, 2, seed=9)  # of codes that will never come
        gate.open.set()
        for fork in (waits, late):
            with pytest.raises(RequestFailedError) as raised:
                fork.result(LONG)
            assert isinstance(raised.value.__cause__, RequestCancelledError)
    idle(engine)
    one = threading.Event()
    handle = engine.submit(parent, lambda event: one.set())
    assert one.wait(LONG)
    handle.cancel()
    fork = engine.fork(handle, 1, seed=10)  # of codes that had come
    asked = as_prefixed(replace(parent, seed=10), wanted, 1, Q)
    check_events(collect(fork), plain(tiny_pipeline, asked), asked, Q)
    idle(engine)


def test_a_cancelled_fork_leaves_its_parent_alone(tiny_pipeline, engine):
    parent = image_request(1, 3, previews=True)
    with held(engine) as gate:
        handle = engine.submit(parent)
        gate.wait()
        forks = [engine.fork(handle, 2, seed=i) for i in range(2)]
        forks[0].cancel()
        gate.open.set()
        check_events(collect(handle), plain(tiny_pipeline, parent), parent, Q)
        with pytest.raises(RequestCancelledError):
            forks[0].result(LONG)
        assert len(forks[1].result(LONG).codes) == K * Q
    idle(engine)


def test_a_fork_of_a_failed_parent_fails_with_its_cause(engine):
    def listener(event):
        raise KeyError("mine")

    with held(engine) as gate:
        handle = engine.submit(codes_request(previews=True), listener)
        gate.wait()
        fork = engine.fork(handle, 3)
        gate.open.set()
        with pytest.raises(RequestFailedError) as raised:
            fork.result(LONG)
    cause = raised.value.__cause__
    assert isinstance(cause, RequestFailedError)
    assert isinstance(cause.__cause__, KeyError)
    idle(engine)


def test_forks_of_best_of_follow_the_winner(tiny_pipeline, engine):
    best = BestOf(count=2, groups=2, scorer=scored_by([0, 1]))
    parent = image_request(1, 3, sampling=WARM, best_of=best)
    winner = plain(tiny_pipeline, replace(parent, seed=4))
    with held(engine) as gate:
        handle = engine.submit(parent)
        gate.wait()
        forks = [engine.fork(handle, group, seed=60) for group in (1, 3)]
        gate.open.set()
        for fork, group in zip(forks, (1, 3), strict=True):
            asked = as_prefixed(replace(parent, seed=60), winner, group, Q)
            check_result(fork.result(LONG), plain(tiny_pipeline, asked, 4))
    check_result(handle.result(LONG), winner)
    idle(engine)


def test_a_fork_may_choose_among_candidates(tiny_pipeline, engine):
    parent = image_request(1, 3, sampling=WARM)
    wanted = plain(tiny_pipeline, parent)
    handle = engine.submit(parent)
    best = BestOf(count=2, groups=3, scorer=scored_by([0, 1]))
    fork = engine.fork(handle, 1, seed=70, best_of=best, previews=True)
    asked = as_prefixed(replace(parent, seed=71, best_of=best, previews=True), wanted, 1, Q)
    check_events(collect(fork), plain(tiny_pipeline, asked, 3), asked, Q)
    idle(engine)


def test_a_fork_starts_from_its_parents_noise(tiny_pipeline, engine):
    handle = engine.submit(image_request(1, 3, noise_seed=5))
    assert engine.fork(handle, 1).result(LONG).noise_seed == 5
    handle = engine.submit(image_request(1, 3))
    forks = [engine.fork(handle, 1, seed=8), engine.fork(handle, 1, seed=8, noise_seed=6)]
    assert [fork.result(LONG).noise_seed for fork in forks] == [3, 6]


def test_bad_forks_are_refused(tiny_pipeline, make_engine):
    engine, other = make_engine(), make_engine()
    handle = engine.submit(image_request(num_groups=3))
    with pytest.raises(ValueError, match="handle: expected one of a request to this engine"):
        other.fork(handle, 1)
    with pytest.raises(TypeError, match="handle: expected a Handle, got NoneType"):
        engine.fork(None, 1)
    for group in (-1, 0, 3, 4):
        with pytest.raises(ValueError, match=r"group: expected an integer in \[1, 2\]"):
            engine.fork(handle, group)
    with pytest.raises(ValueError, match=r"group: expected an integer in \[1, 3\]"):
        engine.fork(handle, 4, num_groups=4)
    for group in (1.0, "1", True, None):
        with pytest.raises(TypeError, match="group: expected an integer"):
            engine.fork(handle, group)
    with pytest.raises(ValueError, match="prefix_codes"):
        engine.fork(handle, 1, prefix_codes=[1])
    with pytest.raises(ValueError, match=r"best_of.groups: expected more than the 2"):
        engine.fork(handle, 2, best_of=BestOf(count=2, groups=2))
    with pytest.raises(ValueError, match="label"):
        engine.fork(handle, 1, label=6)
    with pytest.raises(TypeError, match="colour"):
        engine.fork(handle, 1, colour="red")
    handle.result(LONG)
    idle(engine)


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_repair_keeps_the_first_groups(tiny_pipeline, engine, kept):
    first = engine.submit(image_request(2, 5, sampling=WARM)).result(LONG)
    request = image_request(
        2, 77, sampling=WARM, prefix_codes=first.codes[: kept * Q], noise_seed=5
    )
    result = engine.submit(request).result(LONG)
    check_result(result, plain(tiny_pipeline, request))
    assert result.codes[: kept * Q].tolist() == first.codes[: kept * Q].tolist()
    assert result.codes[kept * Q :].tolist() != first.codes[kept * Q :].tolist()
