"""y = act(x W^T + b) for many rows: the library's product, its weight reordered or rounded once.

Compute bound: 2·M·O·D FLOPs; cuBLAS and oneDNN are at their roof, so there is no kernel of our own.
On a CPU oneDNN reorders a bf16 weight at every call of F.linear, 4 to 10 % of a product with 1024
rows; a `PackedWeight` keeps the reordered copy, O·D·2 bytes more.
An `Fp8Weight` is e4m3 with a scale an output channel, O·D + 4·O bytes more; x is rounded to e4m3
with a scale a row at every call, and matrix units of sm_90 multiply e4m3 at twice the rate of bf16.
Each operand is off by 1/16 of a number at most, and y by about 4 % of its norm.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dar_kernels.dispatch import UnavailableError, needs_grad
from dar_kernels.quantize import LARGEST, QuantizedWeight, quantize_weight

Activation = Literal["none", "silu"]
_POINTWISE = {"none": "none", "silu": "swish"}
FP8, FP8_CAPABILITY = torch.float8_e4m3fn, (9, 0)
FP8_MULTIPLE = 16  # of both sizes of the weight: what cuBLAS and CUTLASS take
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


class Fp8Weight(NamedTuple):
    """A weight and what stands for it in one byte a number."""

    weight: Tensor  # [O, D]
    quantized: QuantizedWeight  # e4m3 [O, D], fp32 [O]


def fp8_missing(device: torch.device) -> str | None:
    """Why products of e4m3 with a scale a row cannot run on this device, or None.

    On the CPU they run, by oneDNN, to be tested: nothing is faster by them there.
    """
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"runs on cpu and cuda only, got {device.type}"
    if torch.version.hip is not None:
        return "needs an NVIDIA GPU: other ones have another fp8"
    capability = torch.cuda.get_device_capability(device)
    if capability < FP8_CAPABILITY:
        return (
            "needs a GPU of compute capability 9.0 or more (H100, B200), got "
            f"{capability[0]}.{capability[1]}"
        )
    return None


def takes_fp8(weight: Tensor) -> bool:
    """Whether fp8 products take a weight of this shape: `[O, D]`, multiples of 16."""
    return weight.ndim == 2 and all(size % FP8_MULTIPLE == 0 for size in weight.shape)


def fp8_weight(weight: Tensor) -> Fp8Weight:
    """`weight` `[O, D]` in e4m3, beside itself; later changes of it do not reach the copy.

    Raises:
        TypeError: where it is no floating point tensor.
        ValueError: where a size is no multiple of 16, or a number is not finite.
        UnavailableError: where its device has no fp8 products.
    """
    reason = fp8_missing(weight.device)
    if reason is not None:
        raise UnavailableError(f"fp8 products: {reason}")
    if not takes_fp8(weight):
        raise ValueError(
            f"fp8_weight: expected [O, D], multiples of {FP8_MULTIPLE}, got {list(weight.shape)}"
        )
    weight = weight.detach()
    return Fp8Weight(weight, quantize_weight(weight, FP8))


def quantize_rows(x: Tensor) -> QuantizedWeight:
    """Rows `[M, D]` in e4m3 with fp32 scales `[M]`; a row that is not finite becomes NaN."""
    wide = x.float()
    largest = LARGEST[FP8]
    scale = (wide.abs().amax(-1) / largest).clamp_min(torch.finfo(torch.float32).tiny)
    return QuantizedWeight((wide / scale[:, None]).clamp(-largest, largest).to(FP8), scale)


def _fp8_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """x W^T + b of both in e4m3, summed in fp32, rounded to bf16, in the dtype of `x`."""
    rows = quantize_rows(x.reshape(-1, x.shape[-1]))
    y: Tensor = torch._scaled_mm(
        rows.values, weight.values.t(), rows.scale[:, None], weight.scale[None],
        bias=None if bias is None else bias.bfloat16(), out_dtype=torch.bfloat16,
        use_fast_accum=True,  # of 14 bits, where an operand has 4
    )  # fmt: skip
    return y.view(*x.shape[:-1], -1).to(x.dtype)


def linear(
    x: Tensor,
    weight: Tensor | PackedWeight | Fp8Weight,
    bias: Tensor | None = None,
    activation: Activation = "none",
) -> Tensor:
    """act(x W^T + b).

    Args:
        x: `[..., D]`.
        weight: `[O, D]`, or packed, or in fp8: then without gradients.
        bias: `[O]`.
        activation: applied within the product where the weight is packed.

    Returns:
        `[..., O]` in the dtype of `x`, rounded to bf16 on the way where the weight is in fp8.
        Differentiable where the weight is a tensor.

    Raises:
        ValueError: for another activation, shapes that do not fit, or gradients through a packed
            weight.
    """
    if activation not in _POINTWISE:
        raise ValueError(f"linear: expected activation none or silu, got {activation!r}")
    plain = weight if isinstance(weight, Tensor) else weight.weight
    if x.shape[-1] != plain.shape[-1]:
        raise ValueError(f"linear: expected x [..., {plain.shape[-1]}], got {list(x.shape)}")
    packed = isinstance(weight, PackedWeight) and x.dtype == plain.dtype
    if (packed or isinstance(weight, Fp8Weight)) and needs_grad(x, bias):
        raise ValueError("linear: expected no gradients through a packed weight")
    if isinstance(weight, PackedWeight) and packed:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, weight.packed, bias, _POINTWISE[activation], [], ""
        )
        return y
    if isinstance(weight, Fp8Weight):
        y = _fp8_linear(x, weight.quantized, bias)
    else:
        y = F.linear(x, plain, bias)
    return F.silu(y) if activation == "silu" else y


__all__ = [
    "Fp8Weight", "PackedWeight", "fp8_missing", "fp8_weight", "linear", "pack_weight", "packs",
    "quantize_rows", "takes_fp8",
]  # fmt: skip
