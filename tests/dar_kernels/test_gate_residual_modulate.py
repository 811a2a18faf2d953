"""gate_residual_modulate against its definition in fp64, PyTorch and Triton from one file."""

from functools import partial

import pytest
import torch
from truth import DEVICE, DTYPES, TRITON, check_against_truth

from dar_kernels.gate_residual_modulate import (
    _gate_residual_modulate,
    _gate_residual_modulate_backward,
    gate_residual_modulate,
    gate_residual_modulate_ref,
)

needs_triton = pytest.mark.skipif(not TRITON, reason="Triton cannot run here")
either = pytest.mark.parametrize(
    "implementation", ["torch", pytest.param("triton", marks=needs_triton)]
)
triton_op = partial(gate_residual_modulate, implementation="triton")
SHAPES = [(1, 1, 768), (2, 3, 512), (1, 5, 1000), (2, 2, 1)]


def draw(shape, seed=0, modulate=True):
    tensors = torch.randn(5, *shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    x, y, gate, shift, scale = tensors
    return [x, y, gate, shift, scale] if modulate else [x, y, gate, None, None]


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("modulate", [True, False], ids=["modulated", "plain"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_less_accurate_than_torch(shape, modulate, dtype):
    check_against_truth(
        triton_op, gate_residual_modulate_ref, draw(shape, 0, modulate), dtype
    )  # fmt: skip


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("spread", "offset"), [(200.0, 0.0), (1.0, 100.0), (1e-4, 0.0)])
def test_extreme_rows(spread, offset, dtype):
    x, y, *others = draw((1, 3, 192), 1)
    inputs = [x * spread + offset, y * spread, *others]
    check_against_truth(triton_op, gate_residual_modulate_ref, inputs, dtype)


@needs_triton
@pytest.mark.parametrize("wide", [4, 6])
def test_chunks_of_one_tensor(wide):
    x, y, *_ = draw((2, 3, 64))
    m = torch.randn(2, 3, 64 * wide, device=DEVICE, requires_grad=True)
    x.requires_grad_()

    def run(op):
        outputs = op(x, y.mT.contiguous().mT, *m.chunk(wide, -1)[-3:])
        return (*outputs, *torch.autograd.grad(outputs[0].sin().sum() + outputs[1].sum(), (x, m)))

    torch.testing.assert_close(run(triton_op), run(gate_residual_modulate_ref))


@needs_triton
def test_one_output_is_enough():
    inputs = [t.requires_grad_() for t in draw((1, 2, 16))]
    for i in range(2):
        actual, expected = (
            torch.autograd.grad(op(*inputs)[i].sin().sum(), inputs, materialize_grads=True)
            for op in (triton_op, gate_residual_modulate_ref)
        )
        torch.testing.assert_close(actual, expected)


@needs_triton
def test_no_rows():
    assert triton_op(*draw((0, 3, 8))).modulated.shape == (0, 3, 8)


@pytest.mark.parametrize("modulate", [True, False], ids=["modulated", "plain"])
def test_torch_gradients(modulate):
    inputs = [t.double().requires_grad_() for t in draw((2, 2, 5), 0, modulate) if t is not None]
    padding = [] if modulate else [None, None]
    assert torch.autograd.gradcheck(lambda *t: gate_residual_modulate(*t, *padding), inputs)


@needs_triton
@pytest.mark.parametrize("modulate", [True, False], ids=["modulated", "plain"])
def test_registration(modulate):
    x, y, gate, shift, scale = draw((2, 3, 32), 0, modulate)
    torch.library.opcheck(_gate_residual_modulate_backward, (x, y, x, y, gate, scale))
    inputs = [t if t is None else t.requires_grad_() for t in (x, y, gate, shift, scale)]
    torch.library.opcheck(_gate_residual_modulate, inputs)


@either
def test_compiles_whole(implementation):
    op = partial(gate_residual_modulate, implementation=implementation)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    inputs = [t.requires_grad_() for t in draw((2, 3, 32))]
    y, expected = compiled(*inputs), op(*inputs)
    torch.testing.assert_close(tuple(y), tuple(expected))
    dy = [torch.randn_like(t) for t in y]
    torch.testing.assert_close(
        torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy)
    )


@either
def test_autocast_may_mix_dtypes(implementation):
    x, y, *others = draw((2, 3, 32))
    with torch.autocast(DEVICE, torch.bfloat16):
        actual = gate_residual_modulate(x, y.bfloat16(), *others, implementation=implementation)
    expected = gate_residual_modulate_ref(x, y, *others)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.float(), e, rtol=0.03, atol=0.08)


def test_bad_input_is_named():
    x, y, gate, shift, scale = draw((2, 3, 8))
    with pytest.raises(ValueError, match=r"expected shift and scale or neither, got \['shift'\]"):
        gate_residual_modulate(x, y, gate, shift, None)
    with pytest.raises(TypeError, match="expected y a tensor, got NoneType"):
        gate_residual_modulate(x, None, gate, shift, scale)
    with pytest.raises(TypeError, match=r"expected gate in torch.float32, got torch.bfloat16"):
        gate_residual_modulate(x, y, gate.bfloat16(), shift, scale)
    with pytest.raises(ValueError, match=r"expected x \[B, N, .*\], got \[3, 8\]"):
        gate_residual_modulate(x[0], y, gate, shift, scale)
    with pytest.raises(ValueError, match=r"expected y \[2, 3, 8\], got \[2, 3, 7\]"):
        gate_residual_modulate(x, y[..., 1:], gate, shift, scale)
    with pytest.raises(ValueError, match=r"expected scale on .*, got meta"):
        gate_residual_modulate(x, y, gate, shift, scale.to("meta"))
