"""One-byte weights: error bounds, ranges, rows of zeros, messages."""

import pytest
import torch

from dar_kernels.quantize import QuantizedWeight, dequantize, quantize_weight

DTYPES = [torch.int8, torch.float8_e4m3fn]


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_within_half_a_step(dtype, source):
    weight = (torch.randn(7, 33) * torch.logspace(-6, 3, 7)[:, None]).to(source)
    quantized = quantize_weight(weight, dtype)
    assert quantized.values.dtype == dtype and quantized.scale.dtype == torch.float32
    error = (dequantize(quantized, torch.float64) - weight.double()).abs()
    step = quantized.scale.double()[:, None].expand_as(weight)
    if dtype == torch.int8:
        bound = step / 2
    else:
        bound = torch.maximum(weight.double().abs() / 16, step / 1024)
    assert (error <= bound * (1 + 1e-6)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_weight_uses_the_whole_range(dtype):
    quantized = quantize_weight(torch.tensor([[0.5, -2.0, 1.0]]), dtype)
    largest = 127.0 if dtype == torch.int8 else 448.0
    assert quantized.values.float().tolist()[0][1] == -largest
    assert dequantize(quantized)[0, 1] == -2.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_and_extremes_stay_finite(dtype):
    weight = torch.zeros(4, 8)
    weight[1], weight[2, 0], weight[3, 3] = 3e38, -1e-44, 1e-30
    quantized = quantize_weight(weight, dtype)
    assert (quantized.scale > 0).all() and quantized.scale.isfinite().all()
    back = dequantize(quantized)
    assert back.isfinite().all() and (back[0] == 0).all()
    torch.testing.assert_close(back[1], weight[1])
    torch.testing.assert_close(back[3, 3], weight[3, 3], atol=0, rtol=1e-6)


def test_messages():
    weight = torch.randn(3, 4)
    with pytest.raises(TypeError, match=r"expected weight in one of .*, got torch.int64"):
        quantize_weight(weight.long())
    with pytest.raises(TypeError, match=r"expected dtype one of .*, got torch.float16"):
        quantize_weight(weight, torch.float16)
    with pytest.raises(ValueError, match=r"expected weight \[O >= 1, D >= 1\], got \[4\]"):
        quantize_weight(weight[0])
    with pytest.raises(ValueError, match="expected finite weights"):
        quantize_weight(weight / 0)
    with pytest.raises(TypeError, match="expected a QuantizedWeight, got Tensor"):
        dequantize(weight)
    with pytest.raises(TypeError, match=r"expected dtype one of .*, got torch.int8"):
        dequantize(QuantizedWeight(weight.to(torch.int8), torch.ones(3)), torch.int8)
