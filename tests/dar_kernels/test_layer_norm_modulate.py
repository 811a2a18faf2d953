"""layer_norm_modulate against its definition in fp64, PyTorch and Triton from one file."""

from functools import partial

import pytest
import torch
from truth import DEVICE, DTYPES, TRITON, check_against_truth

from dar_kernels.layer_norm_modulate import (
    _layer_norm_modulate,
    layer_norm_modulate,
    layer_norm_modulate_backward,
    layer_norm_modulate_ref,
)
from dar_kernels.layer_norm_rows import MAX_DIM

needs_triton = pytest.mark.skipif(not TRITON, reason="Triton cannot run here")
triton_op = partial(layer_norm_modulate, implementation="triton")
SHAPES = [(1, 1, 768), (2, 3, 512), (1, 5, 1000), (2, 2, 1), (3, 1, 33)]


def draw(shape, seed=0, spread=1.0, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    x, shift, scale = torch.randn(3, *shape, generator=generator)
    return [t.to(DEVICE) for t in (x * spread + offset, shift, scale)]


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_less_accurate_than_torch(shape, dtype):
    check_against_truth(triton_op, layer_norm_modulate_ref, draw(shape), dtype)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("spread", "offset"), [(1e3, 0.0), (1.0, 100.0), (1e-4, 0.0), (0.0, 2.0)])
def test_extreme_rows(spread, offset, dtype):
    inputs = draw((1, 3, 192), 1, spread, offset)
    check_against_truth(triton_op, layer_norm_modulate_ref, inputs, dtype)


@needs_triton
@pytest.mark.parametrize("wide", [5, 6])
def test_chunks_are_read_in_place(wide):
    x, _, _ = draw((2, 3, 64))
    m = draw((2, 3, 64 * wide), 2)[0]
    shift, scale = m[..., 64:128], m[..., 256:320]
    actual = triton_op(x, shift, scale)
    torch.testing.assert_close(actual, layer_norm_modulate_ref(x, shift, scale))


@needs_triton
def test_rows_of_any_stride():
    x, shift, scale = (t.to(DEVICE) for t in torch.randn(3, 2, 4, 40))
    x = x.transpose(0, 1).contiguous().transpose(0, 1)
    shift = shift[:, :1].expand(2, 4, 40)
    scale = scale.mT.contiguous().mT
    leaves = [t.detach().requires_grad_() for t in (x, shift, scale)]
    y = triton_op(*leaves)
    truth = layer_norm_modulate_ref(*leaves)
    torch.testing.assert_close(y, truth)
    dy = torch.randn(1, 1, 1, device=DEVICE).expand(2, 4, 40)
    actual = torch.autograd.grad(y, leaves, dy)
    torch.testing.assert_close(actual, torch.autograd.grad(truth, leaves, dy))


@needs_triton
def test_backward_packs_shift_beside_scale():
    x, dy, scale = draw((2, 3, 48))
    dx, dscale = layer_norm_modulate_backward(dy, x, scale, False)
    dx2, packed = layer_norm_modulate_backward(dy, x, scale, True)
    assert torch.equal(dx, dx2)
    assert torch.equal(packed, torch.cat((dy, dscale), -1))


@needs_triton
def test_no_rows():
    assert triton_op(*draw((0, 3, 8))).shape == (0, 3, 8)


def test_torch_gradients():
    inputs = [t.double().requires_grad_() for t in draw((2, 2, 5))]
    assert torch.autograd.gradcheck(layer_norm_modulate, inputs)


@needs_triton
def test_registration():
    inputs = [t.requires_grad_() for t in draw((2, 3, 32))]
    torch.library.opcheck(_layer_norm_modulate, inputs)
    for with_shift in (False, True):
        torch.library.opcheck(
            layer_norm_modulate_backward, (*(t.detach() for t in inputs), with_shift)
        )


@pytest.mark.parametrize("implementation", ["torch", pytest.param("triton", marks=needs_triton)])
def test_compiles_whole(implementation):
    op = partial(layer_norm_modulate, implementation=implementation)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    inputs = [t.requires_grad_() for t in draw((2, 3, 32))]
    y, expected = compiled(*inputs), op(*inputs)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy)
    )


@pytest.mark.parametrize("implementation", ["torch", pytest.param("triton", marks=needs_triton)])
def test_autocast_may_mix_dtypes(implementation):
    x, shift, scale = draw((2, 3, 32))
    x, shift = x.bfloat16(), shift.bfloat16()
    with torch.autocast(DEVICE, torch.bfloat16):
        y = layer_norm_modulate(x, shift, scale, implementation=implementation)
    expected = layer_norm_modulate_ref(x.float(), shift.float(), scale)
    torch.testing.assert_close(y.float(), expected, rtol=0.02, atol=0.05)


def test_bad_input_is_named():
    x, shift, scale = draw((2, 3, 8))
    with pytest.raises(TypeError, match="expected shift a tensor, got float"):
        layer_norm_modulate(x, 0.5, scale)
    with pytest.raises(TypeError, match=r"expected scale in torch.float32, got torch.int64"):
        layer_norm_modulate(x, shift, scale.long())
    with pytest.raises(TypeError, match=r"expected scale in torch.float32, got torch.float16"):
        layer_norm_modulate(x, shift, scale.half())
    with pytest.raises(ValueError, match=r"expected x \[B, N, .*\], got \[3, 8\]"):
        layer_norm_modulate(x[0], shift[0], scale[0])
    with pytest.raises(ValueError, match=rf"D <= {MAX_DIM}\], got \[1, 1, {MAX_DIM + 1}\]"):
        layer_norm_modulate(*torch.ones(3, 1, 1, MAX_DIM + 1))
    with pytest.raises(ValueError, match=r"expected shift \[2, 3, 8\], got \[2, 1, 8\]"):
        layer_norm_modulate(x, shift[:, :1], scale)
    with pytest.raises(ValueError, match=r"expected scale on .*, got meta"):
        layer_norm_modulate(x, shift, scale.to("meta"))
    with pytest.raises(ValueError, match=r"expected implementation one of triton, .*, got .cuda."):
        layer_norm_modulate(x, shift, scale, implementation="cuda")
