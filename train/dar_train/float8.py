"""Products of training in float8, by torchao: y = x W^T with x, W and dy rounded as they are read.

x and W in e4m3, dy in e5m2, a scale a tensor found in the same pass; weights stay as they are.
The matrix units of sm_89 and later multiply it at twice the rate of bf16; rounding costs a pass
over each operand, so it pays for large products only, and compiled.
Source: arXiv 2209.05433; torchao.float8.
"""

from collections.abc import Iterable
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from dar_fast.models.layers import Linear
from dar_fast.models.quantized import Product
from dar_kernels.linear import Activation, takes_fp8

CAPABILITY = (8, 9)  # the first with products of float8: L4, RTX 40; then H100, B200


def float8_missing(device: torch.device) -> str | None:
    """Why training products cannot be in float8 on `device`, or None."""
    try:
        import torchao.float8  # noqa: F401
    except ImportError as error:
        return f"needs torchao ({error}): pip install 'dar-fast[float8]'"
    if device.type != "cuda":
        return f"runs on cuda only, got {device.type}"
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        major, minor = torch.cuda.get_device_capability(device)
        return f"needs a GPU of compute capability 8.9 or more, got {major}.{minor}"
    return None


@cache
def _rounded(emulate: bool) -> nn.Module:
    """torchao's layer, without a weight: each call brings one."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    with torch.device("meta"):
        holder = nn.Sequential(nn.Linear(16, 16, bias=False))
    config = Float8LinearConfig(emulate=emulate, pad_inner_dim=True)  # any number of rows
    return convert_to_float8_training(holder, config=config)[0]


class Float8(nn.Module):
    """What a layer becomes while it trains; it stays what it was for everything else.

    torchao would put a layer of its own in place, which knows neither our activations nor the
    weights that decoding reads; and `rounded` must be no part of the module, nor of its state.
    """

    emulate = False

    def product(self, x: Tensor) -> Tensor:
        """x W^T by torchao."""
        y: Tensor = functional_call(
            _rounded(self.emulate), {"weight": cast(Tensor, self.weight)}, (x,)
        )
        return y


class Float8Linear(Float8, Linear):
    def forward(self, x: Tensor, activation: Activation = "none") -> Tensor:
        if not torch.is_grad_enabled():
            return Linear.forward(self, x, activation)
        y = self.product(x)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return F.silu(y) if activation == "silu" else y


class Float8Product(Float8, Product):
    def forward(self, input: Tensor) -> Tensor:
        return self.product(input) if torch.is_grad_enabled() else Product.forward(self, input)


def convert(blocks: Iterable[nn.Module], device: torch.device, emulate: bool = False) -> int:
    """Make the large products of `blocks` train in float8, in place; returns how many do.

    Those with both sizes a multiple of 16. Embeddings, heads and the codebook are outside of blocks
    and stay. Without gradients a layer computes as before. `emulate` rounds and multiplies in
    fp32, on any device.

    Raises:
        ValueError: where torchao is missing, or the device has no such products.
    """
    reason = float8_missing(device)
    if reason is not None and not (emulate and "torchao" not in reason):
        raise ValueError(f"float8: {reason}")
    kinds: dict[type[nn.Module], type[Float8]] = {Linear: Float8Linear, Product: Float8Product}
    converted = 0
    for block in blocks:
        for layer in block.modules():
            kind = kinds.get(type(layer))
            weight: Any = layer.weight if kind is not None else None
            if kind is None or not takes_fp8(weight):
                continue
            layer.__class__ = kind
            layer.emulate = emulate  # type: ignore[assignment]
            converted += 1
    return converted


__all__ = ["Float8Linear", "Float8Product", "convert", "float8_missing"]
