"""linear: the packed product equals the plain one, the one in fp8 that of its rounded operands."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from truth import EPS, relative_error

from dar_kernels import UnavailableError
from dar_kernels.adaln_modulate import adaln_modulate
from dar_kernels.linear import (
    FP8,
    fp8_missing,
    fp8_weight,
    linear,
    pack_weight,
    packs,
    quantize_rows,
)
from dar_kernels.quantize import dequantize

CAN_PACK = packs(torch.ones(2, 2, dtype=torch.bfloat16))
packing = pytest.mark.skipif(not CAN_PACK, reason="no bf16 products here")


@packing
@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize(("M", "D", "O"), [(1, 8, 5), (37, 96, 130), (1030, 64, 64)], ids=str)
def test_packed_is_no_less_accurate(activation, M, D, O):  # noqa: E741
    x, weight, bias = torch.randn(2, M, D), torch.randn(O, D), torch.randn(O)
    x, weight, bias = (t.bfloat16() for t in (x, weight, bias))
    truth = linear(x.double(), weight.double(), bias.double(), activation)
    plain = linear(x, weight, bias, activation)
    packed = linear(x, pack_weight(weight), bias, activation)
    assert relative_error(packed, truth) <= 2 * relative_error(plain, truth) + EPS
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(linear(strided, pack_weight(weight), bias, activation), packed)


@packing
def test_the_copy_is_a_copy_and_other_dtypes_use_the_weight():
    weight = torch.randn(6, 4, dtype=torch.bfloat16)
    packed = pack_weight(weight)
    x = torch.randn(3, 4)
    assert packed.weight.data_ptr() == weight.data_ptr()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(linear(x, packed), F.linear(x, weight))
    with pytest.raises(ValueError, match="expected no gradients through a packed weight"):
        linear(x.bfloat16().requires_grad_(), packed)


def test_gradients_pass_where_it_is_not_packed():
    x, weight = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (3, 5))
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: linear(*t, "silu"), (x, weight, bias))


def test_wrong_arguments_are_named():
    x, weight = torch.ones(2, 4), torch.ones(3, 4)
    with pytest.raises(ValueError, match="expected activation none or silu, got 'gelu'"):
        linear(x, weight, None, "gelu")
    with pytest.raises(ValueError, match=r"expected x \[..., 4\], got \[2, 5\]"):
        linear(torch.ones(2, 5), weight)
    with pytest.raises(ValueError, match="expected a bf16 matrix on a CPU"):
        pack_weight(weight)


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("M", "D", "O"), [(1, 16, 16), (37, 96, 144), (130, 768, 64)], ids=str)
def test_fp8_is_the_product_of_the_rounded_operands(activation, bias, dtype, M, D, O):  # noqa: E741
    x, weight = torch.randn(2, M, D).to(dtype), torch.randn(O, D).to(dtype)
    b = torch.randn(O).to(dtype) if bias else None
    packed = fp8_weight(weight)
    assert packed.quantized.values.dtype == FP8
    y = linear(x, packed, b, activation)
    assert y.dtype == dtype and y.shape == (2, M, O)
    rows = dequantize(quantize_rows(x.flatten(0, 1)), torch.float64)
    truth = rows @ dequantize(packed.quantized, torch.float64).T
    truth = (truth if b is None else truth + b.bfloat16().double()).view(2, M, O)
    rounded = truth.bfloat16()  # of the sum; SiLU follows in the dtype of x
    if activation == "silu":
        truth, rounded = F.silu(truth), F.silu(rounded.to(dtype))
    assert relative_error(y, truth) <= 2 * relative_error(rounded, truth) + EPS
    alone = linear(x[1, :1], packed, b, activation)
    torch.testing.assert_close(alone, y[1, :1], rtol=2**-7, atol=1e-6)  # its own scale, any batch


@given(
    st.integers(1, 5),
    st.sampled_from([16, 48, 256]),
    st.sampled_from([16, 80]),
    st.integers(0, 2**31),
    st.sampled_from([1e-6, 1.0, 1e4]),
)
def test_fp8_is_as_near_as_its_format_allows(M, D, O, seed, size):  # noqa: E741
    generator = torch.Generator().manual_seed(seed)
    x = size * torch.randn(M, D, generator=generator) * torch.rand(M, D, generator=generator) ** 4
    weight = torch.randn(O, D, generator=generator) / D**0.5
    weight[0], x[0] = 0, 0  # rows of zeros have a scale too
    packed = fp8_weight(weight)
    y, truth = linear(x, packed).double(), x.double() @ weight.double().T
    wide, w = x.double().abs(), weight.double().abs()
    step_x = quantize_rows(x).scale.double()[:, None] / 1024  # below the normal numbers
    step_w = packed.quantized.scale.double() / 1024
    bound = (2 / 16 + 1 / 256) * (wide @ w.T)
    bound = bound + 1.1 * (step_x * w.sum(1) + step_w * wide.sum(1)[:, None] + D * step_x * step_w)
    assert ((y - truth).abs() <= bound * (1 + 2**-7) + 2**-8 * truth.abs()).all()
    assert y.isfinite().all() and (y[0] == 0).all() and (y[:, 0] == 0).all()


def test_rows_that_are_not_finite_stay_their_own():
    weight = fp8_weight(torch.randn(16, 32))
    x = torch.randn(3, 32)
    expected = linear(x, weight)
    x[0, 3], x[2, 5] = torch.inf, torch.nan
    y = linear(x, weight)
    assert y[0].isnan().all() and y[2].isnan().all()
    assert torch.equal(y[1], expected[1])


def test_modulation_in_fp8_is_its_product_and_its_norm():
    x, features = torch.randn(2, 2, 9, 32)
    weight, bias = torch.randn(192, 32) / 6, torch.randn(192)
    packed = fp8_weight(weight)
    m = adaln_modulate(x, features, packed, bias)
    shift, scale, *rest = linear(features, packed, bias).chunk(6, -1)
    torch.testing.assert_close(m.modulated, F.layer_norm(x, (32,), eps=1e-6) * (1 + scale) + shift)
    assert all(torch.equal(a, b) for a, b in zip(m[1:], rest, strict=True))
    plain = adaln_modulate(x, features, weight, bias)
    assert relative_error(m.modulated, plain.modulated) < 0.1


def test_wrong_fp8_weights_are_named(monkeypatch):
    for shape in ((8, 16), (16, 24), (16,)):
        with pytest.raises(ValueError, match=r"expected \[O, D\], multiples of 16, got"):
            fp8_weight(torch.ones(shape))
    with pytest.raises(ValueError, match="expected finite weights"):
        fp8_weight(torch.full((16, 16), torch.nan))
    with pytest.raises(ValueError, match="expected no gradients through a packed weight"):
        linear(torch.ones(2, 16, requires_grad=True), fp8_weight(torch.ones(16, 16)))
    with pytest.raises(UnavailableError, match="fp8 products: runs on cpu and cuda only, got meta"):
        fp8_weight(torch.ones(16, 16, device="meta"))
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, wanted in (((8, 9), "9.0 or more"), ((9, 0), None), ((10, 0), None)):
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda device, value=capability: value
        )
        reason = fp8_missing(torch.device("cuda", 0))
        assert (reason is None) if wanted is None else (wanted in reason and "8.9" in reason)
