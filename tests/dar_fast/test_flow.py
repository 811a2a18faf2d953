"""The schedule, the solvers and the starts, against their formulas."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dar_fast.flow import (
    Trajectory,
    drawn_group_start,
    group_start,
    sampling_times,
    shift_time,
    start_from,
)


@given(st.integers(1, 64), st.floats(0.1, 10))
def test_times_rise_from_zero_to_one(num_steps, beta):
    times = sampling_times(num_steps, beta)
    assert len(times) == num_steps + 1
    assert times[0] == 0
    assert times[-1] == 1
    assert (times.diff() > 0).all()


def test_published_times():
    expected = [u / (u + 2 * (1 - u)) for u in (i / 8 for i in range(9))]
    torch.testing.assert_close(sampling_times(8, 2.0), torch.tensor(expected))


@given(st.integers(1, 100), st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from([16, 64, 256]))
def test_steps_read_whole_groups_in_order(num_steps, num_groups, num_tokens):
    size = num_tokens // num_groups
    starts = [group_start(i, num_steps, num_groups, num_tokens) for i in range(num_steps)]
    assert starts == sorted(starts)
    assert starts[0] == 0
    assert all(s % size == 0 and s + size <= num_tokens for s in starts)
    if num_steps == num_groups:
        assert starts == list(range(0, num_tokens, size))


@given(st.floats(0, 1, exclude_max=True, width=32), st.sampled_from([1, 4, 8, 16]))
def test_drawn_groups_follow_the_formula(u, num_groups):
    size = 256 // num_groups
    expected = min(math.floor(u * num_groups + 0.5) * size, 256 - size)
    assert drawn_group_start(torch.tensor([u]), num_groups, 256).tolist() == [expected]


@pytest.mark.parametrize("solver", ["euler", "adams2"])
def test_a_straight_path_is_exact(solver):
    noise, target = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    run = Trajectory(noise, sampling_times(5, 2.0).tolist(), 0.6, solver)
    while not run.done:
        run.advance(target - noise)
        torch.testing.assert_close(run.preview("jump"), target / 0.6)
        torch.testing.assert_close(run.preview("solver"), target / 0.6)
    torch.testing.assert_close(run.image(), target / 0.6)


def test_adams_bashforth_by_hand():
    times = sampling_times(3, 2.0).tolist()
    v = [torch.full((1, 3, 1, 1), value) for value in (1.0, -2.0, 0.5)]
    run = Trajectory(torch.zeros(1, 3, 1, 1), times, 1.0)
    for velocity in v:
        run.advance(velocity)
    h = [b - a for a, b in pairwise(times)]
    expected = h[0] * 1.0 + h[1] * (1.5 * -2.0 - 0.5 * 1.0) + h[2] * (1.5 * 0.5 - 0.5 * -2.0)
    torch.testing.assert_close(run.image(), torch.full((1, 3, 1, 1), expected))


def test_no_preview_before_the_first_step():
    run = Trajectory(torch.zeros(1, 3, 1, 1), [0.0, 1.0], 1.0)
    with pytest.raises(ValueError, match="at least one step"):
        run.preview()


def test_a_start_from_a_picture():
    image, noise = torch.rand(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(start_from(image, noise, 0.0, 0.6), noise)
    torch.testing.assert_close(start_from(image, noise, 1.0, 0.6), 0.6 * image)


def test_decoding_from_a_picture(tiny_pipeline):
    model = tiny_pipeline.tokenizer
    codes = torch.arange(16)[None].repeat(2, 1)
    image, noise = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 3, 16, 16)
    t = float(shift_time(torch.tensor(0.5), model.config.dit.time_shift))
    run = model.trajectory(start_from(image, noise, t, model.config.dit.data_std), step=2)
    cond = model.conditions(codes)
    with torch.no_grad():
        while not run.done:
            model.advance(run, cond)
    actual = model.decode(codes, noise, init_image=image, start_step=2)
    torch.testing.assert_close(actual, run.image())
    for arguments, message in (
        ({"start_step": 2}, "init_image"),
        ({"init_image": image}, "init_image"),
        ({"init_image": image, "start_step": 4}, r"start_step: expected an integer in \[0, 4\)"),
        ({"init_image": image[:1], "start_step": 1}, "init_image: expected 2, got 1"),
        ({"init_image": image, "start_step": 2, "stop_after": 2}, r"stop_after.*\[3, 4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            model.decode(codes, noise, **arguments)
