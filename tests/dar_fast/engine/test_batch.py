"""The pipeline's calls and streams through an engine, beside the plain path's frames."""

import gc

import pytest
import torch
from engine_helpers import LONG, codes_request, held, idle, near
from hypothesis import given, settings
from hypothesis import strategies as st
from request_mixes import K, labels, samplings

from dar_fast.engine import EngineClosedError, QueueFullError
from dar_fast.engine.batch import batch_frames
from dar_fast.frames import draw_frames
from dar_fast.request import make_request


def batch(parts, count, sampling=None, **changes):
    """A checked call of the pipeline for `count` pictures."""
    given = {
        "seeds": list(range(7, 7 + count)), "guidance_scale": 3.0, "temperature": 1.0, "top_k": 0,
        "top_p": 1.0, "num_inference_steps": None, "solver": "adams2", "prefix_codes": None,
        "num_groups": None, "output_type": "pt", "callback_on_step_end": None, **changes,
    }  # fmt: skip
    if sampling is not None:
        for name in ("guidance_scale", "temperature", "top_k", "top_p"):
            given[name] = getattr(sampling, name)
    return make_request(
        [i % 6 for i in range(count)], label_names=parts.labels, num_classes=6,
        config=parts.tokenizer.config, **given,
    )  # fmt: skip


def same(got, wanted):
    """Equal frames: steps, codes, and pictures to tolerance."""
    assert [(f.step, f.final) for f in got] == [(f.step, f.final) for f in wanted]
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.codes.equal(theirs.codes)
        assert (ours.estimate is None) == (theirs.estimate is None)
        if ours.estimate is not None:
            assert all(map(near, ours.estimate, theirs.estimate))


@settings(max_examples=25)
@given(
    count=st.integers(1, 5), sampling=samplings, label=labels,
    steps=st.one_of(st.none(), st.integers(1, 12)), groups=st.one_of(st.none(), st.integers(1, K)),
    output=st.sampled_from(["pt", "codes"]), solver=st.sampled_from(["adams2", "euler"]),
    prefix=st.lists(st.integers(0, 63), max_size=16),
)  # fmt: skip
def test_frames_are_those_of_the_plain_path(
    tiny_pipeline, count, sampling, label, steps, groups, output, solver, prefix
):
    request = batch(
        tiny_pipeline, count, sampling, num_inference_steps=steps, num_groups=groups,
        output_type=output, solver=solver,
        prefix_codes=torch.tensor(prefix, dtype=torch.int64) if prefix else None,
    )  # fmt: skip
    wanted = list(draw_frames(tiny_pipeline, request))
    same(list(batch_frames(tiny_pipeline.engine, request, True)), wanted)
    (result,) = batch_frames(tiny_pipeline.engine, request, False)
    same([result._replace(step=wanted[-1].step)], wanted[-1:])


def test_a_batch_may_be_larger_than_the_queue(tiny_pipeline, make_engine):
    engine = make_engine(max_requests=2, max_queue=3)
    request = batch(tiny_pipeline, 12)
    same(list(batch_frames(engine, request, True)), list(draw_frames(tiny_pipeline, request)))
    idle(engine)


def test_a_queue_that_others_fill_is_an_error(tiny_pipeline, make_engine):
    engine = make_engine(max_requests=1, max_queue=2)
    with held(engine) as gate:
        handles = [engine.submit(codes_request())]
        gate.wait()
        handles += [engine.submit(codes_request(seed=i)) for i in (1, 2)]
        with pytest.raises(QueueFullError):
            list(batch_frames(engine, batch(tiny_pipeline, 3), True))
        gate.open.set()
        for handle in handles:
            handle.result(LONG)
    idle(engine)


@pytest.mark.parametrize("taken", [1, 2])
def test_frames_that_nobody_wants_are_cancelled(tiny_pipeline, make_engine, taken):
    engine = make_engine(max_requests=2)
    frames = batch_frames(engine, batch(tiny_pipeline, 6, num_inference_steps=12), True)
    for _ in range(taken):
        next(frames)
    del frames
    gc.collect()
    idle(engine)
    assert engine.stats().cancelled > 0


def test_what_fails_is_raised_as_it_was(tiny_pipeline, make_engine):
    engine = make_engine(max_requests=2)
    error = MemoryError("no room")

    def broken(rows):
        raise error

    engine._machine.lanes[0].runner.run = broken
    with pytest.raises(MemoryError) as raised:
        list(batch_frames(engine, batch(tiny_pipeline, 3), True))
    assert raised.value is error
    idle(engine)


def test_a_closed_engine_is_an_error(tiny_pipeline, make_engine):
    engine = make_engine()
    engine.close()
    with pytest.raises(EngineClosedError):
        list(batch_frames(engine, batch(tiny_pipeline, 1), False))
