"""Requests that cannot be, and handles and streams of those that can."""

import gc
import threading

import pytest
import torch
from engine_helpers import (
    LONG,
    K,
    Q,
    check_events,
    check_result,
    codes_request,
    held,
    idle,
    image_request,
    plain,
)

from dar_fast.engine import (
    AdmissionError,
    BestOf,
    GroupDrawn,
    Preview,
)
from dar_fast.sampling import PerGroup, Sampling


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
