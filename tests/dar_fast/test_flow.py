"""The schedule, the solvers and the starts, against their formulas."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dar_fast.flow import (
    PREVIEWS,
    SOLVERS,
    Trajectory,
    drawn_group_start,
    group_start,
    sampling_times,
    shift_time,
    start_from,
)
from dar_fast.models.pixel_dit import unpatchify


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


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("preview", PREVIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_straight_path_is_exact(solver, preview, dtype):
    noise, target = torch.randn(2, 2, 3, 4, 4, dtype=dtype)
    run = Trajectory(noise, sampling_times(5, 2.0).tolist(), 0.6, solver, preview)
    while not run.done:
        run.advance((target - noise).flatten(1)[:, None])  # one patch
        torch.testing.assert_close(run.preview(), target / 0.6)
    torch.testing.assert_close(run.image(), target / 0.6)


def test_patches_of_any_size_make_the_same_step():
    x, velocity = torch.randn(2, 2, 3, 6, 6)
    images = []
    for P in (1, 2, 3, 6):
        G = 6 // P
        tokens = velocity.reshape(2, 3, G, P, G, P).permute(0, 2, 4, 1, 3, 5)
        tokens = tokens.reshape(2, G * G, 3 * P * P)
        assert torch.equal(unpatchify(tokens), velocity)
        run = Trajectory(x, [0.0, 0.25, 1.0], 0.6)
        run.advance(tokens)
        images.append(run.image())
    assert all(torch.equal(image, images[0]) for image in images)


@pytest.mark.parametrize("kind", PREVIEWS)
def test_previews_by_hand(kind):
    """Jump: x + (1 - t) v; the solver's: 1.5 v - 0.5 v_previous for v."""
    run = Trajectory(torch.zeros(1, 3, 1, 1), [0.0, 0.5, 0.75, 1.0], 0.5, "adams2", kind)
    run.advance(torch.full((1, 1, 3), 2.0))  # to x = 1
    torch.testing.assert_close(run.preview(), torch.full((1, 3, 1, 1), 2.0 / 0.5))
    first = run.preview()
    run.advance(torch.full((1, 1, 3), 4.0))
    slope = 4.0 if kind == "jump" else 1.5 * 4 - 0.5 * 2
    torch.testing.assert_close(run.preview(), torch.full((1, 3, 1, 1), (1 + 0.5 * slope) / 0.5))
    torch.testing.assert_close(first, torch.full((1, 3, 1, 1), 4.0))  # it is the caller's to keep


def test_the_state_is_the_run_s_own():
    noise = torch.randn(1, 3, 4, 4).to(memory_format=torch.channels_last)
    given = noise.clone()
    run = Trajectory(noise, [0.0, 1.0], 1.0)
    run.advance(torch.ones(1, 1, 48))
    assert torch.equal(noise, given)
    torch.testing.assert_close(run.x, given + 1)


def test_adams_bashforth_by_hand():
    times = sampling_times(3, 2.0).tolist()
    v = [torch.full((1, 1, 3), value) for value in (1.0, -2.0, 0.5)]
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
    given = [s.clone() for s in (image, noise)]
    actual = model.decode(codes, noise, init_image=image, start_step=2)
    torch.testing.assert_close(actual, run.image())
    torch.testing.assert_close([image, noise], given, rtol=0, atol=0)
    for arguments, message in (
        ({"start_step": 2}, "init_image"),
        ({"init_image": image}, "init_image"),
        ({"init_image": image, "start_step": 4}, r"start_step: expected an integer in \[0, 4\)"),
        ({"init_image": image[:1], "start_step": 1}, "init_image: expected 2, got 1"),
        ({"init_image": image, "start_step": 2, "stop_after": 2}, r"stop_after.*\[3, 4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            model.decode(codes, noise, **arguments)
