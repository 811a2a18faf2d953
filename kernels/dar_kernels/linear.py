"""y = act(x W^T + b) for many rows: the library's product, its weight reordered once.

Compute bound: 2·M·O·D FLOPs; cuBLAS and oneDNN are at their roof, so there is no kernel of our own.
On a CPU oneDNN reorders a bf16 weight at every call of F.linear, 4 to 10 % of a product with 1024
rows; a `PackedWeight` keeps the reordered copy, O·D·2 bytes more.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dar_kernels.dispatch import needs_grad

Activation = Literal["none", "silu"]
_POINTWISE = {"none": "none", "silu": "swish"}
ROWS = 1024  # that oneDNN is told to expect: the patches of a picture; any number works


class PackedWeight(NamedTuple):
    """A weight and its copy in the order that oneDNN's product reads."""

    weight: Tensor  # [O, D]
    packed: Tensor  # opaque


def packs(weight: Tensor) -> bool:
    """Whether a reordered copy of this weight pays here: bf16 on a CPU with instructions for it."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and weight.ndim == 2
        and torch.backends.mkldnn.is_available()
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def pack_weight(weight: Tensor) -> PackedWeight:
    """`weight` `[O, D]` with its reordered copy, which later changes of `weight` do not reach.

    Raises:
        ValueError: where `packs(weight)` is false.
    """
    if not packs(weight):
        raise ValueError(
            "pack_weight: expected a bf16 matrix on a CPU with bf16 products, "
            f"got {weight.dtype} {list(weight.shape)} on {weight.device}"
        )
    weight = weight.detach()
    return PackedWeight(weight, torch.ops.mkldnn._reorder_linear_weight(weight, ROWS))


def linear(
    x: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None = None,
    activation: Activation = "none",
) -> Tensor:
    """act(x W^T + b).

    Args:
        x: `[..., D]`.
        weight: `[O, D]`, or packed: then without gradients.
        bias: `[O]`.
        activation: applied within the product where the weight is packed.

    Returns:
        `[..., O]`. Differentiable where the weight is not packed.

    Raises:
        ValueError: for another activation, shapes that do not fit, or gradients through a packed
            weight.
    """
    if activation not in _POINTWISE:
        raise ValueError(f"linear: expected activation none or silu, got {activation!r}")
    plain = weight.weight if isinstance(weight, PackedWeight) else weight
    if x.shape[-1] != plain.shape[-1]:
        raise ValueError(f"linear: expected x [..., {plain.shape[-1]}], got {list(x.shape)}")
    if isinstance(weight, PackedWeight) and x.dtype == plain.dtype:
        if needs_grad(x, bias):
            raise ValueError("linear: expected no gradients through a packed weight")
        y: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, weight.packed, bias, _POINTWISE[activation], [], ""
        )
        return y
    y = F.linear(x, plain, bias)
    return F.silu(y) if activation == "silu" else y


__all__ = ["PackedWeight", "linear", "pack_weight", "packs"]
