"""swiglu against its definition in fp64, PyTorch and Triton from one file."""

from functools import partial

import pytest
import torch
from truth import DEVICE, DTYPES, TRITON, check_against_truth

from dar_kernels.swiglu import _swiglu, _swiglu_backward, swiglu, swiglu_ref

needs_triton = pytest.mark.skipif(not TRITON, reason="Triton cannot run here")
triton_op = partial(swiglu, implementation="triton")
IMPLEMENTATIONS = ["torch", pytest.param("triton", marks=needs_triton)]


def draw(shape, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    gate, up = torch.randn(2, *shape, generator=generator)
    return [spread * gate.to(DEVICE), up.to(DEVICE)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 2816), (2, 3, 2048), (3, 100), (60, 1)], ids=str)
def test_no_less_accurate_than_the_definition(shape, dtype, implementation):
    ours = partial(swiglu, implementation=implementation)
    check_against_truth(ours, swiglu_ref, draw(shape), dtype)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", [1e-3, 30.0, 3e3])
def test_extreme_gates(spread, dtype):
    check_against_truth(triton_op, swiglu_ref, draw((3, 500), 1, spread), dtype)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("F", [2816, 100, 1])
def test_halves_where_they_lie(F, dtype):
    generator = torch.Generator().manual_seed(F)
    both = torch.randn(2, 30 if F == 1 else 3, 2 * F, generator=generator).to(DEVICE)

    def halves(op, both):
        return op(*both.chunk(2, -1))

    check_against_truth(partial(halves, triton_op), partial(halves, swiglu_ref), [both], dtype)


@needs_triton
def test_any_stride():
    gate, up = (t.requires_grad_() for t in draw((4, 6, 50)))
    views = gate.transpose(0, 1), up.expand(1, 4, 6, 50)[0].transpose(0, 1)
    y, truth = triton_op(*views), swiglu_ref(*views)
    torch.testing.assert_close(y, truth)
    dy = torch.randn(50, 4, 6, device=DEVICE).permute(2, 1, 0)
    torch.testing.assert_close(
        torch.autograd.grad(y, (gate, up), dy), torch.autograd.grad(truth, (gate, up), dy)
    )


@needs_triton
def test_no_rows():
    gate, up = (t.requires_grad_() for t in draw((0, 8)))
    y = triton_op(gate, up)
    assert y.shape == torch.autograd.grad(y.sum(), gate)[0].shape == (0, 8)


def test_torch_gradients():
    assert torch.autograd.gradcheck(swiglu, [t.double().requires_grad_() for t in draw((2, 5))])


@needs_triton
def test_registration():
    gate, up = draw((2, 3, 32))
    torch.library.opcheck(_swiglu_backward, (up, gate, up))
    torch.library.opcheck(_swiglu, (gate.requires_grad_(), up.requires_grad_()))
    torch.library.opcheck(_swiglu, torch.randn(2, 16, device=DEVICE).chunk(2, -1))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_compiles_whole(implementation):
    def halves(both):
        return swiglu(*both.chunk(2, -1), implementation=implementation)

    both = torch.randn(2, 3, 64, device=DEVICE, requires_grad=True)
    compiled = torch.compile(halves, fullgraph=True, backend="aot_eager")(both)
    expected = halves(both)
    torch.testing.assert_close(compiled, expected)
    dy = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(compiled, both, dy), torch.autograd.grad(expected, both, dy)
    )


def test_bad_input_is_named():
    gate, up = draw((2, 3, 8))
    with pytest.raises(TypeError, match="swiglu: expected up a tensor, got list"):
        swiglu(gate, [1.0])
    with pytest.raises(TypeError, match=r"expected gate in one of .*, got torch.int64"):
        swiglu(gate.long(), up)
    with pytest.raises(TypeError, match=r"expected up in torch.float32, got torch.float16"):
        swiglu(gate, up.half())
    with pytest.raises(ValueError, match=r"expected up \[2, 3, 8\], got \[3, 8\]"):
        swiglu(gate, up[0])
    with pytest.raises(ValueError, match=r"expected gate \[..., F >= 1\], got \[2, 3, 0\]"):
        swiglu(gate[..., :0], up[..., :0])
    with pytest.raises(ValueError, match=r"expected up on .*, got meta"):
        swiglu(gate, up.to("meta"))
    with pytest.raises(ValueError, match="expected implementation one of triton, torch"):
        swiglu(gate, up, implementation="native")
