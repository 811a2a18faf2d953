"""Tensors of a prior whose products are stored in one byte: the values, and a scale a channel.

    <name>.weight          [O, K]  int8 or float8_e4m3fn
    <name>.weight_scale    [O]     fp32, finite, > 0

All else is stored as in any folder. What is read is checked against these before it is used.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dar_fast.checkpoint.errors import CheckpointError
from dar_fast.models import Prior
from dar_fast.quantization import Quantization, products, quantization_dtype, stored_quantization
from dar_kernels.quantize import QuantizedWeight, dequantize

SCALE = "_scale"
LIKE = "token_embedding.weight"  # in whose dtype a prior computes by default


def stored_state(module: nn.Module) -> dict[str, Tensor]:
    """What a folder holds: the state dict, quantised where all products still are."""
    state: dict[str, Tensor] = module.state_dict()
    if isinstance(module, Prior) and stored_quantization(module) is not None:
        for name, product in products(module).items():
            operand = product.quantized
            assert operand is not None  # stored_quantization says so
            state[f"{name}.weight"], state[f"{name}.weight{SCALE}"] = operand
    return state


def expected_state(module: nn.Module, quantization: Quantization | None) -> dict[str, Tensor]:
    """Names, shapes and, of products and scales, dtypes of a folder's tensors: all "meta"."""
    state: dict[str, Tensor] = module.state_dict()
    if quantization is not None and isinstance(module, Prior):
        dtype = quantization_dtype(quantization)
        for name in products(module):
            weight = state[f"{name}.weight"]
            state[f"{name}.weight"] = weight.to("meta", dtype)
            state[f"{name}.weight{SCALE}"] = weight.new_empty(
                len(weight), device="meta", dtype=torch.float32
            )
    return state


def scale_names(expected: dict[str, Tensor]) -> set[str]:
    """Those of scales, which are no parameters."""
    return {name for name in expected if name.endswith(f".weight{SCALE}")}


def check_dtypes(expected: dict[str, Tensor], got: Mapping[str, torch.dtype | None]) -> None:
    """Raise CheckpointError at the first tensor of a dtype that cannot be.

    Products in one byte and scales have one; any other weight is floating point.
    """
    scales = scale_names(expected)
    exact = scales | {name.removesuffix(SCALE) for name in scales}
    for name, dtype in got.items():
        if name in exact and dtype != expected[name].dtype:
            raise CheckpointError(f"{name}: expected {expected[name].dtype}, got {dtype}")
        if name not in exact and not (dtype and dtype.is_floating_point):
            raise CheckpointError(f"{name}: expected floating point, got {dtype}")


def dequantize_state(
    module: nn.Module,
    tensors: dict[str, Tensor],
    quantization: Quantization | None,
    dtype: torch.dtype | None,
) -> dict[str, QuantizedWeight]:
    """Put into `tensors` what quantised products stand for, and take out their bytes, by name.

    Args:
        tensors: of checked names, shapes and dtypes.
        dtype: of the products then; None: that of the token embedding.

    Raises:
        CheckpointError: at the first tensor that holds a value which is not finite, or a scale that
            is not positive.
    """
    if quantization is None or not isinstance(module, Prior):
        return {}
    operands = {}
    for name in products(module):
        weight = f"{name}.weight"
        operand = QuantizedWeight(tensors[weight], tensors.pop(weight + SCALE))
        _check_values(weight, operand)
        operands[name] = operand
        tensors[weight] = dequantize(operand, dtype or tensors[LIKE].dtype)
    return operands


def _check_values(name: str, operand: QuantizedWeight) -> None:
    if not bool(((operand.scale > 0) & (operand.scale < torch.inf)).all()):
        raise CheckpointError(f"{name}{SCALE}: expected finite scales > 0, got others")
    if operand.values.dtype == torch.float8_e4m3fn and bool(
        ((operand.values.view(torch.uint8) & 0x7F) == 0x7F).any()  # all that is not finite
    ):
        raise CheckpointError(f"{name}: expected finite values, got NaN")


def keep_operands(module: nn.Module, operands: dict[str, QuantizedWeight]) -> None:
    """Let the products of a prior whose weights these stand for keep them at hand."""
    if isinstance(module, Prior) and operands:
        for name, product in products(module).items():
            product.keep_quantized(operands[name])


__all__ = [
    "check_dtypes", "dequantize_state", "expected_state", "keep_operands", "scale_names",
    "stored_state",
]  # fmt: skip
