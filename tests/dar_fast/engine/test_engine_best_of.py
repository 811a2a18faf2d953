"""The best of several candidates: who wins, what is told, what scorers may get wrong."""

import threading
from dataclasses import replace

import pytest
import torch
from engine_helpers import (
    LONG,
    WARM,
    K,
    Q,
    check_events,
    check_result,
    collect,
    held,
    idle,
    image_request,
    near,
    plain,
    scored_by,
    until,
)

from dar_fast.engine import (
    BestOf,
    Candidates,
    Chosen,
    RequestFailedError,
)
from dar_fast.engine.scoring import detail


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


def test_the_detail_of_flat_pictures_is_zero():
    flat = Candidates(torch.ones(2, 3, 8, 8), torch.zeros(2, 4, dtype=torch.int64), 0)
    assert detail(flat).tolist() == [0.0, 0.0]
