"""rms_norm_residual against its definition in fp64, PyTorch and Triton from one file."""

from functools import partial

import pytest
import torch
from truth import DEVICE, DTYPES, TRITON, check_against_truth

from dar_kernels.rms_norm_residual import (
    MAX_DIM,
    _rms_norm_residual,
    rms_norm_residual,
    rms_norm_residual_ref,
)
from dar_kernels.rms_norm_residual_backward import rms_norm_residual_backward

needs_triton = pytest.mark.skipif(not TRITON, reason="Triton cannot run here")
triton_op = partial(rms_norm_residual, implementation="triton")
IMPLEMENTATIONS = ["torch", pytest.param("triton", marks=needs_triton)]


def draw(shape, seed=7, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    x, delta = spread * torch.randn(2, *shape, generator=generator)
    weight = 1 + 0.5 * torch.randn(shape[-1], generator=generator)
    return [t.to(DEVICE) for t in (x, delta, weight)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_delta", [True, False], ids=["sum", "alone"])
@pytest.mark.parametrize(
    "shape", [(1, 1024), (2, 3, 1280), (7, 2560), (13, 256), (2, 5, 100), (3, 1)], ids=str
)
def test_no_less_accurate_than_the_definition(shape, with_delta, dtype, implementation):
    x, delta, weight = draw(shape)
    ours = partial(rms_norm_residual, implementation=implementation)
    check_against_truth(
        ours, rms_norm_residual_ref, [x, delta if with_delta else None, weight], dtype
    )


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", [0.0, 1e-4, 1e3])
def test_extreme_rows(spread, dtype):
    """Against PyTorch with its norm in fp32, which in fp64 is the definition."""
    model = partial(rms_norm_residual, implementation="torch")
    check_against_truth(triton_op, model, draw((5, 192), 1, spread), dtype)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounds_as_the_model(dtype):
    """To x's dtype before the weight: all but the few that another order of summing moves."""
    inputs = [t.to(dtype) for t in draw((9, 768), 2)]
    ours, model = triton_op(*inputs), rms_norm_residual(*inputs, implementation="torch")
    assert torch.equal(ours.residual, model.residual)
    assert (ours.normed == model.normed).float().mean() > 0.99


@needs_triton
def test_rows_of_any_stride():
    x, delta, weight = (t.requires_grad_() for t in draw((3, 4, 200)))
    views = (x[..., 50:150], delta.transpose(0, 1)[..., ::2].transpose(0, 1), weight[100:])
    ours, truth = triton_op(*views), rms_norm_residual_ref(*views)
    torch.testing.assert_close(ours, truth)
    grads = torch.randn(2, 4, 3, 100, device=DEVICE).transpose(1, 2).unbind()
    actual = torch.autograd.grad(ours, (x, delta, weight), grads)
    torch.testing.assert_close(
        actual, torch.autograd.grad(truth, (x, delta, weight), grads), rtol=1e-4, atol=1e-5
    )


@needs_triton
@pytest.mark.parametrize("used", [0, 1], ids=["normed", "residual"])
def test_gradient_of_one_output(used):
    inputs = [t.requires_grad_() for t in draw((6, 64))]
    actual, expected = (
        torch.autograd.grad(fn(*inputs)[used].sin().sum(), inputs, allow_unused=True)
        for fn in (triton_op, rms_norm_residual_ref)
    )
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@needs_triton
def test_without_delta_the_residual_is_x():
    x, _, weight = draw((2, 8))
    assert triton_op(x, None, weight).residual is x


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_narrow_branch_of_a_wide_stream(implementation):
    """As under autocast; the branch's gradient has its own dtype."""
    x, delta, weight = draw((4, 64))
    delta = delta.bfloat16().requires_grad_()
    ours = rms_norm_residual(x, delta, weight, implementation=implementation)
    truth = rms_norm_residual_ref(x, delta.float(), weight)
    torch.testing.assert_close(ours, truth)
    (actual,) = torch.autograd.grad(ours.normed.square().sum() + ours.residual.sum(), delta)
    (expected,) = torch.autograd.grad(truth.normed.square().sum() + truth.residual.sum(), delta)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_fp32_weight_keeps_the_dtype_of_x(implementation):
    x, delta, weight = draw((4, 64))
    x, delta = x.bfloat16(), delta.bfloat16()
    ours = rms_norm_residual(x, delta, weight, implementation=implementation)
    assert ours.normed.dtype == torch.bfloat16
    truth = rms_norm_residual_ref(ours.residual.float(), None, weight).normed
    torch.testing.assert_close(ours.normed.float(), truth, rtol=1e-2, atol=1e-2)


@needs_triton
def test_no_rows():
    x, delta, weight = (t.requires_grad_() for t in draw((0, 3, 8)))
    ours = triton_op(x, delta, weight)
    assert ours.normed.shape == ours.residual.shape == (0, 3, 8)
    grads = torch.autograd.grad(ours.normed.sum(), (x, weight))
    assert torch.equal(grads[1], torch.zeros(8, device=DEVICE))


def test_torch_gradients():
    inputs = [t.double().requires_grad_() for t in draw((2, 2, 5))]
    assert torch.autograd.gradcheck(rms_norm_residual, inputs)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm_residual(x, None, w), inputs[::2])


@needs_triton
def test_registration():
    x, delta, weight = draw((2, 3, 32))
    rstd = x.new_ones(6)
    for added in (delta, None):
        torch.library.opcheck(rms_norm_residual_backward, (x, added, delta, weight, rstd))
        leaves = [None if t is None else t.clone().requires_grad_() for t in (x, added, weight)]
        torch.library.opcheck(_rms_norm_residual, (*leaves, 1e-5))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("with_delta", [True, False], ids=["sum", "alone"])
def test_compiles_whole(implementation, with_delta):
    op = partial(rms_norm_residual, implementation=implementation)
    x, delta, weight = (t.requires_grad_() for t in draw((2, 3, 32)))
    leaves = [x, delta, weight] if with_delta else [x, weight]
    given = (x, delta if with_delta else None, weight)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")(*given)
    expected = op(*given)
    torch.testing.assert_close(tuple(compiled), tuple(expected))
    grads = torch.randn(2, *x.shape, device=DEVICE).unbind()
    torch.testing.assert_close(
        torch.autograd.grad(compiled, leaves, grads), torch.autograd.grad(expected, leaves, grads)
    )


def test_bad_input_is_named():
    x, delta, weight = draw((2, 3, 8))
    with pytest.raises(TypeError, match="rms_norm_residual: expected delta a tensor, got float"):
        rms_norm_residual(x, 0.5, weight)
    with pytest.raises(TypeError, match=r"expected weight in torch.float32, got torch.int64"):
        rms_norm_residual(x, delta, weight.long())
    with pytest.raises(TypeError, match=r"expected weight in torch.float32, got .*float16"):
        rms_norm_residual(x, delta, weight.half())
    with pytest.raises(TypeError, match=r"expected delta in torch.float16, got torch.float32"):
        rms_norm_residual(x.half(), delta, weight)
    with pytest.raises(ValueError, match=r"expected weight \[8\], got \[7\]"):
        rms_norm_residual(x, delta, weight[1:])
    with pytest.raises(ValueError, match=r"expected delta \[2, 3, 8\], got \[2, 1, 8\]"):
        rms_norm_residual(x, delta[:, :1], weight)
    with pytest.raises(ValueError, match=rf"D <= {MAX_DIM}\], got \[1, {MAX_DIM + 1}\]"):
        rms_norm_residual(torch.ones(1, MAX_DIM + 1), None, torch.ones(MAX_DIM + 1))
    with pytest.raises(ValueError, match=r"expected x \[..., 1 <= D <= .*\], got \[\]"):
        rms_norm_residual(x[0, 0, 0], None, weight)
    with pytest.raises(ValueError, match="expected eps > 0, got 0"):
        rms_norm_residual(x, delta, weight, 0)
    with pytest.raises(ValueError, match=r"expected weight on .*, got meta"):
        rms_norm_residual(x, delta, weight.to("meta"))
    with pytest.raises(ValueError, match="expected implementation one of triton, torch"):
        rms_norm_residual(x, delta, weight, implementation="native")
