"""flow_step against its definition in fp64, and a run of steps against the solvers' formulas."""

from functools import partial

import pytest
import torch
from truth import DEVICE, DTYPES, EPS, TRITON, relative_error

from dar_kernels.flow_step import _flow_step, flow_step, flow_step_ref

needs_triton = pytest.mark.skipif(not TRITON, reason="Triton cannot run here")
either = pytest.mark.parametrize(
    "implementation", ["torch", pytest.param("triton", marks=needs_triton)]
)
STD = 0.6


def draw(B=3, R=12, P=4, dtype=torch.float32, seed=0):
    """x, velocity, previous, t, next_t, the last two one a row."""
    generator = torch.Generator().manual_seed(seed)
    x, previous = torch.randn(2, B, 3, R, R, generator=generator)
    velocity = torch.randn(B, (R // P) ** 2, 3 * P * P, generator=generator).to(dtype)
    t, next_t = torch.rand(2, B, generator=generator).sort(0).values
    return [s.to(DEVICE) for s in (x, velocity, previous, t, next_t)]


def unpatchify(velocity, R, P):
    G = R // P
    picture = velocity.reshape(-1, G, G, 3, P, P).permute(0, 3, 1, 4, 2, 5)
    return picture.reshape(-1, 3, R, R)


def step(op, x, velocity, previous, t, next_t, *options, **more):
    """(x, previous, preview) after an in-place step on copies."""
    x, previous = x.clone(), None if previous is None else previous.clone()
    preview = op(x, velocity, previous, t, next_t, *options, **more)
    return [x, preview] if previous is None else [x, preview, previous]


def definition(dtype, x, velocity, previous, t, next_t, *options, first=False, preview="jump"):
    x, velocity, previous, t, next_t = (
        s.to(dtype) if isinstance(s, torch.Tensor) else s
        for s in (x, velocity, previous, t, next_t)
    )
    result = flow_step_ref(x, velocity, previous, t, next_t - t, *options, first, preview)
    return [result.x, result.preview, *([] if previous is None else [result.previous])]


@either
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("solver", ["adams2", "euler"])
@pytest.mark.parametrize("preview", ["jump", "solver"])
@pytest.mark.parametrize("first", [False, True, "some"])
def test_no_less_accurate_than_torch(implementation, dtype, solver, preview, first):
    inputs = draw(dtype=dtype)
    if first == "some":
        first = torch.tensor([True, False, True], device=DEVICE)
    options = {"first": first, "preview": preview}
    arguments = (*inputs, STD, solver, 4)
    ours = step(partial(flow_step, implementation=implementation), *arguments, **options)
    truth = definition(torch.float64, *arguments, **options)
    same = definition(torch.float32, *arguments, **options)
    for t, o, r in zip(truth, ours, same, strict=True):
        assert relative_error(o, t) <= 2 * relative_error(r, t) + EPS


@either
@pytest.mark.parametrize(("B", "R", "P"), [(1, 256, 8), (2, 32, 4), (2, 9, 3), (1, 5, 1)])
@pytest.mark.parametrize("by_row", [False, True], ids=["numbers", "rows"])
def test_sizes_and_kinds_of_time(implementation, B, R, P, by_row):
    x, velocity, previous, t, next_t = draw(B, R, P)
    if not by_row:
        t, next_t = 0.125, 0.3
    arguments = (x, velocity, previous, t, next_t, STD, "adams2", P)
    ours = step(partial(flow_step, implementation=implementation), *arguments)
    torch.testing.assert_close(ours, definition(torch.float32, *arguments))
    torch.testing.assert_close(ours[2], unpatchify(velocity, R, P), rtol=0, atol=0)


@either
@pytest.mark.parametrize("solver", ["adams2", "euler"])
@pytest.mark.parametrize("preview", ["jump", "solver"])
@pytest.mark.parametrize("by_row", [False, True], ids=["numbers", "rows"])
def test_a_run_of_steps(implementation, solver, preview, by_row):
    R, P = 12, 4
    x = draw(2, R, P)[0]
    times = [u / (u + 2 * (1 - u)) for u in (i / 5 for i in range(6))]
    state, last = x.double(), None
    previous = torch.full_like(x, torch.nan)
    for i in range(5):
        velocity = draw(2, R, P, seed=i + 1)[1]
        t, next_t = times[i : i + 2]
        if by_row:
            t, next_t = (torch.full((2,), s, device=DEVICE) for s in (t, next_t))
        estimate = flow_step(
            x, velocity, previous, t, next_t, STD, solver, P,
            first=i == 0, preview=preview, implementation=implementation,
        )  # fmt: skip
        v = unpatchify(velocity, R, P).double()
        slope = 1.5 * v - 0.5 * last if solver == "adams2" and last is not None else v
        target = state + (1 - times[i]) * (v if preview == "jump" else slope)
        state, last = state + (times[i + 1] - times[i]) * slope, v
        torch.testing.assert_close(estimate, (target / STD).float())
        torch.testing.assert_close(x, state.float())


@either
def test_rows_at_their_first_step_do_not_read_what_lies_in_previous(implementation):
    x, velocity, previous, t, next_t = draw()
    previous[1] = torch.nan
    arguments = (x, velocity, previous, t, next_t, STD, "adams2", 4)
    for dtype in (torch.bool, torch.uint8, torch.int32, torch.int64):
        first = torch.tensor([0, 1, 0], device=DEVICE).to(dtype)
        op = partial(flow_step, first=first, implementation=implementation)
        ours = step(op, *arguments, preview="solver")
        assert all(s.isfinite().all() for s in ours)
        row = [s[1:2] for s in (x, velocity)]
        alone = definition(
            torch.float32, *row, None, t[1:2], next_t[1:2], STD, "adams2", 4, preview="solver"
        )
        torch.testing.assert_close([s[1:2] for s in ours[:2]], alone)


@either
def test_without_previous_every_row_is_at_its_first_step(implementation):
    x, velocity, _, t, next_t = draw()
    op = partial(flow_step, implementation=implementation)
    ours = step(op, x, velocity, None, t, next_t, STD, "adams2", 4)
    expected = step(op, x, velocity, None, t, next_t, STD, "euler", 4)
    assert len(ours) == 2
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


@either
def test_strided_velocity_and_times(implementation):
    x, velocity, previous, t, next_t = draw(4)
    op = partial(flow_step, implementation=implementation)
    expected = step(op, x, velocity, previous, t, next_t, STD, "adams2", 4)
    wide = torch.cat((velocity, velocity), -1)[..., :48]
    times = (s.repeat_interleave(2)[::2] for s in (t, next_t))
    ours = step(op, x, wide, previous, *times, STD, "adams2", 4)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    ours = step(op, x, velocity.mT.contiguous().mT, previous, t, next_t, STD, "adams2", 4)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_no_gradients():
    x, velocity, previous, t, next_t = draw()
    preview = flow_step(x, velocity.requires_grad_(), previous, t, next_t, STD, "adams2", 4)
    assert not preview.requires_grad
    assert not x.requires_grad


@needs_triton
def test_registration():
    x, velocity, previous, t, next_t = draw()
    first = torch.tensor([True, False, False], device=DEVICE)
    torch.library.opcheck(
        _flow_step, (x, velocity, previous, t, next_t, first, 0.0, 0.0, STD, True, True, 4)
    )
    torch.library.opcheck(
        _flow_step, (x, velocity, None, None, None, None, 0.25, 0.5, STD, False, False, 4)
    )


@either
@pytest.mark.parametrize("by_row", [False, True], ids=["numbers", "rows"])
def test_compiles_whole(implementation, by_row):
    x, velocity, previous, t, next_t = draw()
    times = (t, next_t) if by_row else (0.25, 0.5)
    op = partial(flow_step, implementation=implementation)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    arguments = (x, velocity, previous, *times, STD, "adams2", 4)
    torch.testing.assert_close(step(compiled, *arguments), step(op, *arguments))


def test_bad_input_is_named():
    x, velocity, previous, t, next_t = draw()

    def call(x=x, velocity=velocity, previous=previous, t=t, next_t=next_t, P=4, **options):
        options = {"data_std": STD, "solver": "adams2"} | options
        flow_step(x, velocity, previous, t, next_t, patch_size=P, **options)

    with pytest.raises(TypeError, match=r"expected x in one of .*32, .*64, got torch.bfl"):
        call(x=x.bfloat16())
    with pytest.raises(TypeError, match=r"expected velocity a tensor, got NoneType"):
        call(velocity=None)
    with pytest.raises(TypeError, match=r"expected previous in torch.float32, got torch.float1"):
        call(previous=previous.half())
    with pytest.raises(TypeError, match=r"expected next_t a tensor, got float"):
        call(next_t=0.5)
    with pytest.raises(TypeError, match=r"expected first in one of .*, got torch.float32"):
        call(first=t)
    with pytest.raises(ValueError, match=r"expected x \[B, 3, R >= 1, R >= 1\], got \[3, 432\]"):
        call(x=x.flatten(1))
    with pytest.raises(ValueError, match=r"patch_size dividing R, got \[3, 3, 12, 12\] and 5"):
        call(P=5)
    with pytest.raises(ValueError, match=r"patch_size dividing R, got \[3, 3, 12, 8\] and 4"):
        call(x=x[..., :8])
    with pytest.raises(ValueError, match=r"expected velocity .*, got \[3, 9, 47\]"):
        call(velocity=velocity[..., 1:])
    with pytest.raises(ValueError, match=r"expected previous contiguous, got strides"):
        call(previous=previous.mT)
    with pytest.raises(ValueError, match=r"expected t \[3\], got \[2\]"):
        call(t=t[1:])
    with pytest.raises(ValueError, match=r"expected next_t in \[0, 1\], got 1.5"):
        call(t=0.5, next_t=1.5)
    with pytest.raises(ValueError, match=r"expected velocity on .*, got meta"):
        call(velocity=velocity.to("meta"))
    with pytest.raises(ValueError, match=r"expected solver in .*'heun', 'jump', 0.6"):
        call(solver="heun")
    with pytest.raises(ValueError, match=r"preview in .*'adams2', 'jmup', 0.6"):
        call(preview="jmup")
    with pytest.raises(ValueError, match=r"data_std > 0, got 'adams2', 'jump', 0"):
        call(data_std=0.0)
