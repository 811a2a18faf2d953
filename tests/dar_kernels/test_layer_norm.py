"""layer_norm against its definition in fp64, PyTorch and Triton from one file."""

from functools import partial

import pytest
import torch
from truth import DEVICE, DTYPES, TRITON, check_against_truth

from dar_kernels.layer_norm import MAX_DIM, _layer_norm, layer_norm, layer_norm_ref
from dar_kernels.layer_norm_backward import layer_norm_backward
from dar_kernels.rows import empty_in_order, memory_order, rows_of

needs_triton = pytest.mark.skipif(not TRITON, reason="Triton cannot run here")
triton_op = partial(layer_norm, implementation="triton")
IMPLEMENTATIONS = ["torch", pytest.param("triton", marks=needs_triton)]
AFFINE = pytest.mark.parametrize("affine", [0, 1, 2], ids=["plain", "weight", "weight and bias"])


def draw(shape, seed=7, spread=1.0, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    x = spread * torch.randn(shape, generator=generator) + offset
    weight, bias = torch.randn(2, shape[-1], generator=generator)
    return [t.to(DEVICE) for t in (x, 1 + 0.5 * weight, bias)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@AFFINE
@pytest.mark.parametrize(
    "shape", [(1, 1, 768), (2, 3, 512), (11, 192), (2, 3, 25, 64), (3, 1000), (33, 3)], ids=str
)
def test_no_less_accurate_than_the_definition(shape, affine, dtype, implementation):
    ours = partial(layer_norm, implementation=implementation)
    check_against_truth(
        ours,
        layer_norm_ref,
        draw(shape)[: 1 + affine],
        dtype,
        # PyTorch sums the gradient of the weight in its dtype on a CPU
        gradients=implementation == "triton" or dtype == torch.float32,
    )


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("spread", "offset"), [(1e3, 0.0), (1.0, 100.0), (1e-4, 0.0), (0.0, 2.0)], ids=str
)
def test_extreme_rows(spread, offset, dtype):
    """Against PyTorch with its norm in fp32, which in fp64 is the definition."""
    model = partial(layer_norm, implementation="torch")
    check_against_truth(triton_op, model, draw((5, 192), 1, spread, offset), dtype)


HEADS = {  # q of [B, H, N, Dh], as it lies in memory: no copy of any of these
    "dense": lambda B, H, N, D: torch.randn(B, H, N, D, device=DEVICE),
    "transposed": lambda B, H, N, D: torch.randn(B, N, H, D, device=DEVICE).transpose(1, 2),
    "joint": lambda B, H, N, D: (
        torch.randn(B, N, 3 * H * D, device=DEVICE).chunk(3, -1)[1].unflatten(-1, (H, D))
    ).transpose(1, 2),
    "sliced": lambda B, H, N, D: torch.randn(B, H, N + 4, D, device=DEVICE)[:, :, 4:],
}


@needs_triton
@pytest.mark.parametrize("memory", HEADS)
@pytest.mark.parametrize("size", [(2, 3, 19, 64), (1, 1, 5, 64)], ids=str)
def test_heads_where_they_lie(memory, size):
    x = HEADS[memory](*size).requires_grad_()
    _, weight, bias = (t.requires_grad_() for t in draw((1, 64)))
    rows = rows_of(x, memory_order(x))
    assert rows.data.data_ptr() == x.data_ptr()
    y, truth = triton_op(x, weight, bias), layer_norm_ref(x, weight, bias)
    assert y.stride() == empty_in_order(x).stride()
    torch.testing.assert_close(y, truth)
    for dy in (torch.randn(size, device=DEVICE), HEADS["joint"](*size)):
        actual, expected = (
            torch.autograd.grad(t, (x, weight, bias), dy, retain_graph=True) for t in (y, truth)
        )
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@needs_triton
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0), (2, 1, 0)], ids=str)
def test_rows_of_any_stride(order):
    x = torch.randn(4, 6, 10, 3, device=DEVICE)[::2, ::2, ::2].permute(*order, 3)
    torch.testing.assert_close(triton_op(x), layer_norm_ref(x))
    x = torch.randn(3, 6, 10, device=DEVICE).mT[:, :, :2].expand(3, 10, 2)
    torch.testing.assert_close(triton_op(x), layer_norm_ref(x))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast_keeps_the_dtype_of_x(implementation):
    x, weight, bias = draw((2, 3, 64))
    x = x.bfloat16().requires_grad_()
    weight.requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        y = layer_norm(x, weight, bias, implementation=implementation)
    truth = layer_norm_ref(x.float(), weight, bias)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), truth, rtol=1e-2, atol=1e-2)
    dx, dweight = torch.autograd.grad(y, (x, weight), torch.ones_like(y))
    assert (dx.dtype, dweight.dtype) == (torch.bfloat16, torch.float32)
    (expected,) = torch.autograd.grad(truth, weight, torch.ones_like(truth))
    torch.testing.assert_close(dweight, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_fp32_weight_of_narrow_rows(implementation):
    x, weight, _ = draw((2, 64))
    y = layer_norm(x.half(), weight, implementation=implementation)
    assert y.dtype == torch.float16
    truth = layer_norm_ref(x.half().double(), weight.double())
    torch.testing.assert_close(y.double(), truth, rtol=1e-3, atol=1e-3)


@needs_triton
def test_no_rows():
    x, weight, bias = (t.requires_grad_() for t in draw((0, 3, 8)))
    y = triton_op(x, weight, bias)
    assert y.shape == (0, 3, 8)
    for gradient in torch.autograd.grad(y.sum(), (weight, bias)):
        assert torch.equal(gradient, torch.zeros(8, device=DEVICE))


def test_torch_gradients():
    inputs = [t.double().requires_grad_() for t in draw((2, 2, 5))]
    assert torch.autograd.gradcheck(layer_norm, inputs)
    x, weight, bias = inputs
    assert torch.autograd.gradcheck(layer_norm, (x, weight.float().detach(), bias))


@needs_triton
@AFFINE
def test_registration(affine):
    x, weight, bias = draw((2, 3, 32))
    weight, bias = weight if affine else None, bias if affine > 1 else None
    torch.library.opcheck(layer_norm_backward, (x, x, weight, affine > 1, 1e-6))
    leaves = [None if t is None else t.requires_grad_() for t in (x.mT.mT, weight, bias)]
    torch.library.opcheck(_layer_norm, (*leaves, 1e-6))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_compiles_whole(implementation):
    op = partial(layer_norm, implementation=implementation)
    leaves = [t.requires_grad_() for t in draw((2, 5, 3, 64))]

    def heads(x, weight, bias):
        return op(x.transpose(1, 2), weight, bias), op(x)

    compiled = torch.compile(heads, fullgraph=True, backend="aot_eager")(*leaves)
    expected = heads(*leaves)
    torch.testing.assert_close(compiled, expected)
    grads = [torch.randn_like(y) for y in expected]
    torch.testing.assert_close(
        torch.autograd.grad(compiled, leaves, grads), torch.autograd.grad(expected, leaves, grads)
    )


def test_bad_input_is_named():
    x, weight, bias = draw((2, 3, 8))
    with pytest.raises(TypeError, match="layer_norm: expected x a tensor, got list"):
        layer_norm([1.0])
    with pytest.raises(TypeError, match=r"expected x in one of .*, got torch.int64"):
        layer_norm(x.long())
    with pytest.raises(TypeError, match=r"expected bias in torch.float32, got .*bfloat16"):
        layer_norm(x, weight, bias.bfloat16())
    with pytest.raises(ValueError, match="expected a weight beside the bias, got None"):
        layer_norm(x, None, bias)
    with pytest.raises(ValueError, match=r"expected weight \[8\], got \[1, 8\]"):
        layer_norm(x, weight[None])
    with pytest.raises(ValueError, match=rf"D <= {MAX_DIM}\], got \[1, {MAX_DIM + 1}\]"):
        layer_norm(torch.ones(1, MAX_DIM + 1))
    with pytest.raises(ValueError, match="expected eps > 0, got -1"):
        layer_norm(x, eps=-1)
    with pytest.raises(ValueError, match=r"expected weight on .*, got meta"):
        layer_norm(x, weight.to("meta"))
    with pytest.raises(ValueError, match="expected implementation one of triton, torch"):
        layer_norm(x, implementation="native")
