"""Weights in one byte: W[o, d] ≈ scale[o]·values[o, d], symmetric, one fp32 scale a channel.

int8: scale = max |W[o]| / 127, error at most scale / 2. float8_e4m3fn: scale = max |W[o]| / 448,
error at most 1/16 of each weight, or scale / 1024. O·D + 4·O bytes in place of 2·O·D in bf16.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dar_kernels.checks import FLOATS, Dim, check_tensor

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # what max |W[o]| becomes
QUANTIZED_DTYPES = tuple(LARGEST)


class QuantizedWeight(NamedTuple):
    """Rows of a weight as `scale[o] · values[o]`."""

    values: Tensor  # [O, D] int8 or float8_e4m3fn, finite
    scale: Tensor  # [O] fp32, > 0


def quantize_weight(weight: Tensor, dtype: torch.dtype = torch.int8) -> QuantizedWeight:
    """`weight` in one byte an element; reads back from a device once, to refuse what is not finite.

    Args:
        weight: `[O, D]`, floating point, finite.
        dtype: torch.int8 or torch.float8_e4m3fn.

    Raises:
        TypeError: where `weight` is no floating point tensor, or `dtype` is neither of the two.
        ValueError: where `weight` has another number of dimensions or a value that is not finite.
    """
    check_tensor("quantize_weight", "weight", weight, (Dim("O"), Dim("D")))
    if dtype not in LARGEST:
        raise TypeError(f"quantize_weight: expected dtype one of {QUANTIZED_DTYPES}, got {dtype}")
    wide = weight.detach().to(torch.float64)  # a scale may be small: fp32 quotients could overflow
    largest = wide.abs().amax(1)
    if not bool(largest.isfinite().all()):
        raise ValueError("quantize_weight: expected finite weights, got NaN or infinity")
    smallest = torch.finfo(torch.float32).tiny  # a row of zeros has a scale too
    scale = (largest / LARGEST[dtype]).clamp_min(smallest).float()
    scaled = (wide / scale.double()[:, None]).clamp_(-LARGEST[dtype], LARGEST[dtype])
    values = scaled.round_().to(dtype) if dtype == torch.int8 else scaled.float().to(dtype)
    return QuantizedWeight(values, scale)


def dequantize(weight: QuantizedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """`[O, D]` in `dtype`: the products of values and scales in fp32 (fp64 for fp64), rounded once.

    Raises:
        TypeError: where `weight` is no QuantizedWeight or `dtype` is no floating point dtype.
    """
    if not isinstance(weight, QuantizedWeight):
        raise TypeError(f"dequantize: expected a QuantizedWeight, got {type(weight).__name__}")
    if dtype not in FLOATS:
        raise TypeError(f"dequantize: expected dtype one of {FLOATS}, got {dtype}")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (weight.values.to(wide) * weight.scale.to(wide)[:, None]).to(dtype)


__all__ = ["QUANTIZED_DTYPES", "QuantizedWeight", "dequantize", "quantize_weight"]
