"""adaln_modulate against its definition in fp64, PyTorch and Triton from one file."""

from functools import partial

import pytest
import torch
from truth import DEVICE, DTYPES, TRITON, check_against_truth

from dar_kernels import adaln_modulate_triton
from dar_kernels.adaln_modulate import _adaln_modulate, adaln_modulate, adaln_modulate_ref

needs_triton = pytest.mark.skipif(not TRITON, reason="Triton cannot run here")
either = pytest.mark.parametrize(
    "implementation", ["torch", pytest.param("triton", marks=needs_triton)]
)
triton_op = partial(adaln_modulate, implementation="triton")


def draw(B, N, D, seed=0, spread=1.0, offset=0.0):
    """x, features, weight of the size that keeps modulations near one, bias."""
    generator = torch.Generator().manual_seed(seed)
    x, features = torch.randn(2, B, N, D, generator=generator)
    weight = torch.randn(6 * D, D, generator=generator) / D**0.5
    bias = torch.randn(6 * D, generator=generator)
    return [t.to(DEVICE) for t in (x * spread + offset, features, weight, bias)]


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 33, 24), (1, 3, 72), (3, 1, 7)], ids=str)
def test_no_less_accurate_than_torch(shape, dtype):
    check_against_truth(triton_op, adaln_modulate_ref, draw(*shape), dtype)


@needs_triton
@pytest.mark.parametrize("D", [768, 192])
def test_preset_widths(D):
    check_against_truth(triton_op, adaln_modulate_ref, draw(1, 2, D), torch.bfloat16)


@needs_triton
@pytest.mark.parametrize("hopper", [False, True])
def test_large_tiles(hopper, monkeypatch):
    tiles = adaln_modulate_triton._tiles(10**6, 128, 2, hopper)[0] | {"PDL": False}
    options = adaln_modulate_triton.launch_options(num_warps=8, num_stages=3)
    monkeypatch.setattr(adaln_modulate_triton, "_tiles", lambda *sizes: (tiles, options))
    inputs = draw(1, 130, 128)
    check_against_truth(triton_op, adaln_modulate_ref, inputs, torch.float16, gradients=False)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("spread", "offset"), [(1e3, 0.0), (1.0, 100.0), (0.0, 2.0)])
def test_extreme_rows(spread, offset, dtype):
    inputs = draw(1, 3, 64, 1, spread, offset)
    check_against_truth(triton_op, adaln_modulate_ref, inputs, dtype)


@needs_triton
def test_rows_of_any_stride():
    x, features, weight, bias = draw(2, 4, 40)
    x = x.transpose(0, 1).contiguous().transpose(0, 1)
    features = torch.cat((features, features), -1)[..., 20:60]
    inputs = x, features, weight.mT.contiguous().mT, bias.repeat_interleave(2)[::2]
    torch.testing.assert_close(tuple(triton_op(*inputs)), tuple(adaln_modulate_ref(*inputs)))


@either
def test_the_rest_is_one_tensor(implementation):
    _, *rest = adaln_modulate(*draw(1, 2, 16), implementation=implementation)
    assert len({t.untyped_storage().data_ptr() for t in rest}) == 1
    assert all(t.stride(-1) == 1 for t in rest)


@needs_triton
def test_one_output_is_enough():
    inputs = [t.requires_grad_() for t in draw(1, 2, 16)]
    for i in range(5):
        actual, expected = (
            torch.autograd.grad(op(*inputs)[i].sin().sum(), inputs, materialize_grads=True)
            for op in (triton_op, adaln_modulate_ref)
        )
        torch.testing.assert_close(actual, expected)


def test_torch_gradients():
    inputs = [t.double().requires_grad_() for t in draw(1, 2, 3)]
    assert torch.autograd.gradcheck(adaln_modulate, inputs)


@needs_triton
def test_registration():
    torch.library.opcheck(_adaln_modulate, [t.requires_grad_() for t in draw(1, 2, 8)])


@either
def test_compiles_whole(implementation):
    op = partial(adaln_modulate, implementation=implementation)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    inputs = [t.requires_grad_() for t in draw(1, 3, 16)]
    y, expected = compiled(*inputs), op(*inputs)
    torch.testing.assert_close(tuple(y), tuple(expected))
    dy = [torch.randn_like(t) for t in y]
    torch.testing.assert_close(
        torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy)
    )


@either
def test_autocast_may_mix_dtypes(implementation):
    x, features, weight, bias = draw(1, 3, 32)
    weight.requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        actual = adaln_modulate(
            x.bfloat16(), features.bfloat16(), weight, bias, implementation=implementation
        )
    expected = adaln_modulate_ref(x, features, weight, bias)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.float(), e, rtol=0.03, atol=0.1)
    (gradient,) = torch.autograd.grad(actual.modulated.float().sum(), weight)
    assert gradient.dtype == torch.float32


def test_bad_input_is_named():
    x, features, weight, bias = draw(2, 3, 8)
    with pytest.raises(TypeError, match="expected bias a tensor, got NoneType"):
        adaln_modulate(x, features, weight, None)
    with pytest.raises(TypeError, match=r"expected weight in torch.float32, got torch.float16"):
        adaln_modulate(x, features, weight.half(), bias)
    with pytest.raises(ValueError, match=r"expected features \[2, 3, 8\], got \[2, 1, 8\]"):
        adaln_modulate(x, features[:, :1], weight, bias)
    with pytest.raises(ValueError, match=r"expected weight \[48, 8\], got \[40, 8\]"):
        adaln_modulate(x, features, weight[8:], bias)
    with pytest.raises(ValueError, match=r"expected bias \[48\], got \[47\]"):
        adaln_modulate(x, features, weight, bias[1:])
    with pytest.raises(ValueError, match=r"expected bias on .*, got meta"):
        adaln_modulate(x, features, weight, bias.to("meta"))
