"""rope_2d against its definition in fp64, PyTorch and Triton from one file."""

from functools import partial

import pytest
import torch
from truth import DEVICE, DTYPES, TRITON, check_against_truth

from dar_kernels.rope_2d import MAX_HEAD_DIM, _rope_2d, rope_2d, rope_2d_ref
from dar_kernels.rows import empty_in_order

needs_triton = pytest.mark.skipif(not TRITON, reason="Triton cannot run here")
IMPLEMENTATIONS = ["torch", pytest.param("triton", marks=needs_triton)]


def draw(shape, seed=0):
    """x `[B, H, N, Dh]` and tables of any angles."""
    generator = torch.Generator().manual_seed(seed)
    angles = 300 * torch.rand(shape[2], shape[3] // 2, generator=generator, dtype=torch.float64)
    x = torch.randn(shape, generator=generator)
    return [t.to(DEVICE) for t in (x, angles.cos().float(), angles.sin().float())]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 12, 9, 64), (1, 16, 1, 64), (2, 3, 17, 64), (1, 4, 5, 100), (1, 5, 3, 128),
              (2, 2, 35, 16), (1, 1, 40, 2)], ids=str,
)  # fmt: skip
def test_no_less_accurate_than_the_definition(shape, dtype, implementation):
    x, cos, sin = draw(shape)

    def at_these_angles(op, x):
        return op(x, cos, sin)

    ours = partial(at_these_angles, partial(rope_2d, implementation=implementation))
    check_against_truth(ours, partial(at_these_angles, rope_2d_ref), [x], dtype)


def test_definition():
    """Multiplication by e^(i angle) of even + i odd."""
    x, cos, sin = draw((1, 2, 5, 8))
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.complex(cos, sin)
    torch.testing.assert_close(rope_2d(x, cos, sin), torch.view_as_real(turned).flatten(-2))


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_values(dtype):
    x, cos, sin = draw((1, 4, 6, 64))
    x = (x.sign() * torch.finfo(dtype).max / 2).to(dtype)
    y = rope_2d(x, cos, sin, implementation="triton")
    truth = rope_2d_ref(x.double(), cos, sin)
    assert torch.isfinite(y).all()
    torch.testing.assert_close(y.double(), truth, rtol=0, atol=float(truth.abs().max()) * 0.004)


@needs_triton
@pytest.mark.parametrize("memory", ["transposed", "joint", "last", "expanded"])
def test_heads_where_they_lie(memory):
    B, H, N, D = 2, 5, 11, 64
    leaf = torch.randn(B, N, 3, H, D, device=DEVICE, requires_grad=True)
    x = {
        "transposed": lambda: leaf[:, :, 0].contiguous().transpose(1, 2),
        "joint": lambda: leaf[:, :, 1].transpose(1, 2),
        "last": lambda: leaf[:, :, 0].permute(0, 3, 1, 2)[:, ::2, :, : 2 * (H // 2)],
        "expanded": lambda: leaf[:1, :, 0].transpose(1, 2).expand(B, H, N, D),
    }[memory]()
    _, cos, sin = draw(x.shape)
    y, truth = rope_2d(x, cos, sin, implementation="triton"), rope_2d_ref(x, cos, sin)
    assert y.stride() == empty_in_order(x).stride()
    torch.testing.assert_close(y, truth)
    dy = torch.randn(D, *x.shape[:3], device=DEVICE).movedim(0, -1)[..., : x.shape[3]]
    torch.testing.assert_close(
        torch.autograd.grad(y, leaf, dy), torch.autograd.grad(truth, leaf, dy)
    )


@needs_triton
def test_a_part_of_the_tables():
    x, cos, sin = draw((1, 2, 8, 16))
    y = rope_2d(x, cos, sin, implementation="triton")
    part = rope_2d(x[:, :, 3:5], cos[3:5], sin[3:5], implementation="triton")
    assert torch.equal(part, y[:, :, 3:5])


@needs_triton
def test_no_tokens():
    x, cos, sin = draw((2, 3, 0, 8))
    assert rope_2d(x, cos, sin, implementation="triton").shape == (2, 3, 0, 8)


def test_torch_gradients():
    x, cos, sin = draw((1, 2, 3, 4))
    assert torch.autograd.gradcheck(
        lambda x: rope_2d(x, cos, sin), x.double().requires_grad_(), eps=1e-6
    )


@needs_triton
@pytest.mark.parametrize("inverse", [False, True])
def test_registration(inverse):
    x, cos, sin = draw((2, 3, 4, 8))
    for view in (x, x.transpose(1, 2).contiguous().transpose(1, 2), x[:, :, ::2]):
        tables = cos[: view.shape[2]], sin[: view.shape[2]]
        torch.library.opcheck(_rope_2d, (view.detach().requires_grad_(), *tables, inverse))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_compiles_whole(implementation):
    def heads(x, cos, sin):
        return rope_2d(x.transpose(1, 2), cos, sin, implementation=implementation)

    x, cos, sin = draw((2, 5, 3, 16))
    x = x.requires_grad_()
    tables = cos.new_ones(5, 8), sin.new_ones(5, 8)
    compiled = torch.compile(heads, fullgraph=True, backend="aot_eager")(x, *tables)
    expected = heads(x, *tables)
    torch.testing.assert_close(compiled, expected)
    dy = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(compiled, x, dy), torch.autograd.grad(expected, x, dy)
    )


def test_bad_input_is_named():
    x, cos, sin = draw((2, 3, 4, 8))
    with pytest.raises(TypeError, match="rope_2d: expected cos a tensor, got int"):
        rope_2d(x, 1, sin)
    with pytest.raises(TypeError, match=r"expected sin in torch.float32, got torch.float64"):
        rope_2d(x, cos, sin.double())
    with pytest.raises(ValueError, match=r"expected cos \[4, 4\], got \[3, 4\]"):
        rope_2d(x, cos[1:], sin)
    with pytest.raises(ValueError, match=r"expected x \[B, H, N, 2 <= Dh .*\], got \[3, 4, 8\]"):
        rope_2d(x[0], cos, sin)
    with pytest.raises(ValueError, match=r"expected x \[B, H, N, Dh even\], got \[2, 3, 4, 7\]"):
        rope_2d(x[..., :7], cos, sin)
    with pytest.raises(ValueError, match=rf"<= {MAX_HEAD_DIM}\], got \[1, 1, 1, 514\]"):
        rope_2d(torch.ones(1, 1, 1, 514), cos, sin)
    with pytest.raises(ValueError, match="expected cos without gradient, got one that requires it"):
        rope_2d(x, cos.clone().requires_grad_(), sin)
    with pytest.raises(ValueError, match=r"expected sin on .*, got meta"):
        rope_2d(x, cos, sin.to("meta"))
    with pytest.raises(ValueError, match="expected implementation one of triton, torch"):
        rope_2d(x, cos, sin, implementation="native")
