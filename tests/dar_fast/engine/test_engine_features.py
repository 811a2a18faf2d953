"""best_of, forks, repair, deadlines, priorities, the queue, closing, statistics, bad input."""

import gc
import threading
import time
import weakref
from dataclasses import replace

import pytest
import torch
from engine_helpers import (
    LONG,
    UNGUIDED,
    as_prefixed,
    check_events,
    check_result,
    codes_request,
    collect,
    engine_threads,
    held,
    idle,
    image_request,
    near,
    plain,
    until,
)

from dar_fast.engine import (
    AdmissionError,
    BestOf,
    Candidates,
    Chosen,
    DeadlineError,
    Engine,
    EngineClosedError,
    EngineConfig,
    Failed,
    Finished,
    GroupDrawn,
    Preview,
    QueueFullError,
    RequestCancelledError,
    RequestFailedError,
)
from dar_fast.engine.scoring import detail
from dar_fast.sampling import PerGroup, Sampling

Q, K = 4, 4
WARM = Sampling(guidance_scale=3.0, temperature=1.3)


# -- best_of -----------------------------------------------------------------------------------


def scored_by(values, seen=None):
    """A scorer that gives what it was told, and keeps what it was shown."""

    def score(candidates):
        if seen is not None:
            seen.append(candidates)
        return values

    return score


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("previews", [False, True])
def test_best_of_finishes_the_candidate_that_scores_highest(
    tiny_pipeline, engine, groups, previews
):
    seen = []
    best = BestOf(count=3, groups=groups, scorer=scored_by([0.0, 5.0, 1.0], seen))
    request = image_request(2, 40, sampling=WARM, best_of=best, previews=previews)
    events = collect(engine.submit(request))
    wanted = [plain(tiny_pipeline, replace(request, seed=40 + i)) for i in range(3)]
    check_events(events, wanted[1], request, Q)
    result = events[-1].result
    assert (result.seed, result.noise_seed, result.scores) == (41, 41, (0.0, 5.0, 1.0))
    (candidates,) = seen
    assert candidates.label == 2
    assert candidates.codes.tolist() == [w.codes[: groups * Q].tolist() for w in wanted]
    done = max(i for i, read in enumerate(wanted[0].reads) if len(read) <= groups * Q)
    for got, want in zip(candidates.previews, wanted, strict=True):
        assert near(got, want.previews[done])
    assert isinstance(events[0], Chosen)
    assert (events[0].seed, events[0].scores) == (41, (0.0, 5.0, 1.0))
    if previews:  # from the one that won on
        assert [e.step for e in events[1:-1]] == list(range(done + 1, K + 1))
    idle(engine)


def test_equal_scores_choose_the_first(tiny_pipeline, engine):
    best = BestOf(count=3, groups=2, scorer=scored_by(torch.ones(3)))
    request = image_request(1, 7, best_of=best)
    result = engine.submit(request).result(LONG)
    assert result.seed == 7
    check_result(result, plain(tiny_pipeline, request))


@pytest.mark.parametrize("num_groups", [2, 3])
@pytest.mark.parametrize("num_steps", [1, 3, 9])
def test_best_of_stops_early_too(tiny_pipeline, engine, num_groups, num_steps):
    best = BestOf(count=2, groups=1, scorer=scored_by([0, 1]))
    request = image_request(
        1, 7, best_of=best, num_groups=num_groups, num_steps=num_steps, previews=True
    )
    events = collect(engine.submit(request))
    check_events(events, plain(tiny_pipeline, replace(request, seed=8)), request, Q)


def test_built_in_scorers_choose_what_they_say(tiny_pipeline, engine):
    request = image_request(3, 11, sampling=WARM)
    drawn = [plain(tiny_pipeline, replace(request, seed=11 + i)) for i in range(4)]
    codes = torch.stack([d.codes[: 2 * Q] for d in drawn])
    pictures = torch.stack([d.previews[1] for d in drawn])
    prior = tiny_pipeline.prior
    with torch.no_grad():  # log p(codes | class) - log p(codes), from whole sequences
        logs = [
            prior(codes, torch.full((4,), label)).log_softmax(-1).gather(2, codes[..., None])
            for label in (3, prior.config.null_class)
        ]
    by_class = (logs[0] - logs[1]).sum((1, 2))
    across = (pictures[..., 1:] - pictures[..., :-1]).abs().mean((1, 2, 3))
    edges = across + (pictures[:, :, 1:] - pictures[:, :, :-1]).abs().mean((1, 2, 3))
    for name, wanted in (("class_score", by_class), ("detail", edges)):
        best = BestOf(count=4, groups=2, scorer=name)
        result = engine.submit(replace(request, best_of=best)).result(LONG)
        assert result.scores == pytest.approx(wanted.tolist(), rel=1e-3, abs=1e-4)
        assert result.seed == 11 + int(wanted.argmax())


def test_losers_give_back_their_slots_at_once(engine):
    best = BestOf(count=3, groups=1, scorer=scored_by([1, 0, 0]))
    chosen, on = threading.Event(), threading.Event()

    def listener(event):
        if isinstance(event, Chosen):
            chosen.set()
            assert on.wait(LONG)

    with held(engine) as gate:
        handle = engine.submit(image_request(1, 0, best_of=best), listener)
        gate.wait()
        gate.open.set()
        assert chosen.wait(LONG)
        until(lambda: engine.stats().running <= 1)
        assert engine.stats().pages_used <= 2  # the winner's rows
        on.set()
    handle.result(LONG)
    idle(engine)


@pytest.mark.parametrize(
    ("scorer", "cause"),
    [
        (lambda c: 1 / 0, ZeroDivisionError),
        (scored_by([1.0, float("nan"), 0.0]), ValueError),
        (scored_by([1.0]), ValueError),
        (scored_by(None), TypeError),
        (scored_by(["a", "b", "c"]), ValueError),
        (scored_by(torch.zeros(3, 2)), (RuntimeError, ValueError)),
    ],
    ids=["raises", "nan", "too few", "none", "words", "two a candidate"],
)
def test_a_scorer_that_fails_fails_its_request_alone(tiny_pipeline, engine, scorer, cause):
    best = BestOf(count=3, groups=2, scorer=scorer)
    other = image_request(4, 5, previews=True)
    bad = engine.submit(image_request(2, 40, best_of=best))
    good = engine.submit(other)
    with pytest.raises(RequestFailedError) as raised:
        bad.result(LONG)
    assert isinstance(raised.value.__cause__, cause)
    check_events(collect(good), plain(tiny_pipeline, other), other, Q)
    idle(engine)


# -- forks and repair --------------------------------------------------------------------------

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


# -- deadlines, priorities, the queue ----------------------------------------------------------


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


def test_impossible_requests_are_refused_with_the_reason(make_engine):
    engine = make_engine(max_requests=3, num_pages=2)
    with pytest.raises(AdmissionError, match=r"at most 2 pages, all there are, got 4 for 2 of 4"):
        engine.submit(image_request(best_of=BestOf(count=2, groups=1)))
    with pytest.raises(AdmissionError, match="pages"):
        engine.submit(image_request(best_of=BestOf(count=4, groups=1)))
    roomy = make_engine(max_requests=3, num_pages=20)
    with pytest.raises(AdmissionError, match="at most 3 candidates, the engine's max_requests"):
        roomy.submit(image_request(best_of=BestOf(count=4, groups=1)))
    assert engine.submit(codes_request()).result(LONG).codes.shape == (K * Q,)
    assert engine.stats().refused == 2
    idle(engine)


BAD = {
    "label too large": ({"label": 6}, ValueError, r"label: expected an integer in \[0, 5\], got 6"),
    "label no integer": ({"label": 1.0}, TypeError, "label: expected an integer, got float"),
    "seed negative": ({"seed": -1}, ValueError, "seed: expected"),
    "seed too large": ({"seed": 2**63}, ValueError, "seed: expected"),
    "seed bool": ({"seed": True}, TypeError, "seed: expected an integer"),
    "seed list": ({"seed": [5]}, TypeError, "seed: expected an integer"),
    "noise seed": ({"noise_seed": 2**63}, ValueError, "noise_seed: expected"),
    "seeds of candidates": (
        {"seed": 2**63 - 1, "best_of": BestOf(count=2, groups=1)}, ValueError, "seed: expected",
    ),
    "sampling": ({"sampling": {"top_k": 1}}, TypeError, "sampling: expected a Sampling, got dict"),
    "scales a group": (
        {"sampling": Sampling(guidance_scale=PerGroup((1.0, 2.0)))}, ValueError,
        "guidance_scale: expected 4 values, one a group, got 2",
    ),
    "temperatures a group": (
        {"sampling": Sampling(temperature=PerGroup((1.0,) * 8))}, ValueError,
        "temperature: expected 4 values, one a group, got 8",
    ),
    "steps": ({"num_steps": 0}, ValueError, "num_steps"),
    "solver": ({"solver": "heun"}, ValueError, "solver: expected one of"),
    "prefix too long": ({"prefix_codes": [0] * 17}, ValueError, "at most 16 codes, got 17"),
    "prefix out of range": ({"prefix_codes": [64]}, ValueError, "prefix_codes"),
    "prefix of floats": ({"prefix_codes": torch.zeros(2)}, ValueError, "prefix_codes"),
    "groups": ({"num_groups": 5}, ValueError, r"num_groups: expected an integer in \[1, 4\]"),
    "output": ({"output": "video"}, ValueError, "output: expected one of"),
    "previews": ({"previews": 1}, TypeError, "previews: expected a bool"),
    "priority": ({"priority": 0.5}, TypeError, "priority"),
    "deadline zero": ({"deadline": 0}, ValueError, "deadline: expected seconds > 0"),
    "deadline nan": ({"deadline": float("nan")}, ValueError, "deadline"),
    "best_of": ({"best_of": 3}, TypeError, "best_of: expected a BestOf, got int"),
    "one candidate": ({"best_of": BestOf(count=1, groups=1)}, ValueError, "best_of.count"),
    "all groups": ({"best_of": BestOf(count=2, groups=4)}, ValueError, "best_of.groups"),
    "scorer": ({"best_of": BestOf(count=2, groups=1, scorer="x")}, ValueError, "best_of.scorer"),
    "no scorer": ({"best_of": BestOf(count=2, groups=1, scorer=3)}, TypeError, "best_of.scorer"),
    "codes of the best": (
        {"best_of": BestOf(count=2, groups=1), "output": "codes"}, ValueError, "best_of",
    ),
}  # fmt: skip


def test_bad_requests_are_refused(engine):
    for changes, kind, message in BAD.values():
        with pytest.raises(kind, match=message):
            engine.submit(image_request(**{"seed": 0, **changes}))
    with pytest.raises(TypeError, match="request: expected a GenerationRequest, got dict"):
        engine.submit({"label": 1})
    with pytest.raises(TypeError, match="listener: expected a callable, got int"):
        engine.submit(image_request(), 3)
    assert engine.stats().submitted == 0
    idle(engine)


def test_seeds_are_drawn_where_none_is_given(tiny_pipeline, engine):
    results = [engine.submit(codes_request(1, None)).result(LONG) for _ in range(2)]
    assert results[0].seed != results[1].seed
    for result in results:
        check_result(result, plain(tiny_pipeline, codes_request(1, result.seed)))


# -- handles, streams, generate ----------------------------------------------------------------


def test_a_handle_can_be_read_from_many_threads(engine):
    """No reader hangs at the end, whoever took the last event."""
    taken, threads = [], []
    with held(engine) as gate:
        handle = engine.submit(image_request(previews=True))
        gate.wait()
        for _ in range(4):
            threads.append(threading.Thread(target=lambda: taken.extend(handle), daemon=True))
            threads[-1].start()
        gate.open.set()
        for thread in threads:
            thread.join(LONG)
            assert not thread.is_alive()
    assert sorted(type(e).__name__ for e in taken) == ["Finished"] + ["Preview"] * K
    assert list(handle) == []
    assert handle.done


def test_a_result_that_takes_too_long(engine):
    with held(engine) as gate:
        handle = engine.submit(codes_request())
        gate.wait()
        assert not handle.done
        with pytest.raises(TimeoutError, match=r"request 0: not done after 0\.01 s"):
            handle.result(0.01)
        gate.open.set()
        assert handle.result(LONG) is handle.result(LONG)
    handle.cancel()  # too late, and harmless
    assert handle.result(LONG).label == 1


def test_events_are_the_readers_own(tiny_pipeline, engine):
    """Whoever writes to what it was given changes nobody's codes."""
    request = codes_request(previews=True)
    handle = engine.submit(request, lambda event: None)
    wanted = plain(tiny_pipeline, request)
    codes = []
    for event in handle:
        if isinstance(event, GroupDrawn):
            codes += event.codes.tolist()
            event.codes.zero_()
    assert codes == wanted.codes.tolist()
    check_result(handle.result(LONG), wanted)


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_a_stream_that_is_closed_early_cancels(engine, taken):
    with held(engine, "diffusion") as gate:
        stream = engine.stream(image_request(previews=True, num_steps=12))
        gate.wait()
        if taken:
            gate.open.set()
            for _ in range(taken):
                assert isinstance(next(stream), Preview)
            gate.open.clear()
        stream.close()
        gate.open.set()
        idle(engine)
    assert engine.stats().cancelled == 1


def test_a_stream_that_is_dropped_cancels(engine):
    with held(engine) as gate:
        stream = engine.stream(codes_request())
        gate.wait()
        del stream
        gc.collect()
        gate.open.set()
        idle(engine)
    assert engine.stats().cancelled == 1


def test_a_stream_to_the_end(tiny_pipeline, engine):
    request = image_request(2, 8, previews=True, num_steps=5)
    check_events(list(engine.stream(request)), plain(tiny_pipeline, request), request, Q)
    with pytest.raises(ValueError, match="label"):
        engine.stream(image_request(99))  # at once, not at the first event


def test_generate_gives_results_in_order(tiny_pipeline, engine):
    requests = [image_request(i % 6, i, num_groups=1 + i % 4) for i in range(9)]
    for request, result in zip(requests, engine.generate(requests), strict=True):
        check_result(result, plain(tiny_pipeline, request))
    with pytest.raises(ValueError, match="label"):
        engine.generate([image_request(1), image_request(99)])
    idle(engine)


# -- closing -----------------------------------------------------------------------------------


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


# -- statistics --------------------------------------------------------------------------------


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


def test_the_detail_of_flat_pictures_is_zero():
    flat = Candidates(torch.ones(2, 3, 8, 8), torch.zeros(2, 4, dtype=torch.int64), 0)
    assert detail(flat).tolist() == [0.0, 0.0]
