"""y = RMSNorm(x)·norm_weight Wᵀ + residual for a decode step; norm and residual are optional.

Memory bound up to 16 rows: each weight is read once for all of them, O·D·itemsize bytes, against
2·R·O·D FLOPs; x and y are little beside it. W is of the dtype of x, or in one byte with a scale a
channel: widened on chip, the scale applied to the fp32 sum. Every program normalises x for itself,
out of the second-level cache, which saves a launch. More than 16 rows read W again, 16 at a time.
Source: D-AR (arXiv 2505.23660), §3.3, its Llama; Zhang and Sennrich (2019) for the norm.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dar_kernels.aot import DecoderShape, Shape, Variant
from dar_kernels.checks import check_tensor
from dar_kernels.dispatch import Op
from dar_kernels.implementations import by_torch, by_triton
from dar_kernels.quantize import QuantizedWeight, dequantize
from dar_kernels.triton_support import cast, contiguous_last, dot, tl, triton
from dar_kernels.weight_streaming import (
    SLICES,
    as_stored,
    capability,
    channel_sums,
    check_inputs,
    inverse_rms,
    launch,
    parts,
    prefetch,
    stored_types,
    variant,
    weight_tile,
    x_tile,
)


def linear_decode_ref(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    norm_weight: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Tensor:
    """The definition, in whatever dtype x is given; in fp64 it is the truth the tests use."""
    if norm_weight is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm_weight
    y = F.linear(x, plain(weight, x.dtype))
    return y if residual is None else residual + y


def plain(weight: Tensor | QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """The weight itself, or in `dtype` what it stands for."""
    return dequantize(weight, dtype) if isinstance(weight, QuantizedWeight) else weight


def normalised(x: Tensor, norm_weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm with the prior's rounding: in fp32 (fp64 for fp64), rounded, times the weight."""
    if norm_weight is None:
        return x
    wide = x if x.dtype == torch.float64 else x.float()
    unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return unit.to(x.dtype) * norm_weight


def _torch(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    norm_weight: Tensor | None,
    eps: float,
    residual: Tensor | None,
) -> Tensor:
    y = F.linear(normalised(x, norm_weight, eps), plain(weight, x.dtype))
    return y if residual is None else residual + y


@triton.jit(do_not_specialize=["R"])
def _linear_decode_kernel(
    x_ptr, weight_ptr, scale_ptr, norm_ptr, residual_ptr, y_ptr,
    R, OUT, D, stride_xr, stride_wo, stride_rr, eps,
    ROWS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
    PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    channel = tl.minimum(o, OUT - 1)  # the last program reads the last channel again
    valid = r < R
    row = r.to(tl.int64)
    x_rows = x_ptr + row * stride_xr
    weight_rows = weight_ptr + channel.to(tl.int64) * stride_wo
    if PREFETCH:
        prefetch(weight_rows, D)
    if PDL:  # weights do not depend on the kernel before; all that follows may
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    rstd = tl.zeros([ROWS], tl.float32)
    if norm_ptr is not None:
        rstd = inverse_rms(x_rows, valid, D, eps, ROWS)
    lanes = tl.arange(0, SLICES)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    acc = tl.zeros([SLICES, BLOCK_O, ROWS], tl.float32)
    for start in range(0, D, SLICES * BLOCK_K):
        x = x_tile(x_rows, valid, start + lanes, D, rstd, norm_ptr)
        acc = dot(weight_tile(weight_rows, start + lanes, D, x.dtype), x, acc)
    y = channel_sums(acc, scale_ptr, channel)
    mask = (o < OUT)[:, None] & valid[None, :]
    if residual_ptr is not None:
        here = residual_ptr + row[None, :] * stride_rr + o[:, None]
        y += tl.load(here, mask=mask, other=0.0).to(tl.float32)
    here = y_ptr + row[None, :] * OUT + o[:, None]
    tl.store(here, cast(y, y_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op("dar::linear_decode", mutates_args=())
def _linear_decode(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    residual: Tensor | None,
) -> Tensor:
    (R, D), OUT = x.shape, weight.shape[0]
    x, w = contiguous_last(x), as_stored(weight)
    scale, norm_weight = (None if t is None else t.contiguous() for t in (scale, norm_weight))
    residual = None if residual is None else contiguous_last(residual)
    y = torch.empty((R, OUT), dtype=x.dtype, device=x.device)
    hopper = capability(x.device) >= (9, 0)
    how = launch(R, OUT, x.itemsize, w.itemsize, norm_weight is not None, hopper)
    _linear_decode_kernel[(triton.cdiv(R, how.rows), triton.cdiv(OUT, how.channels))](
        x, w, scale, norm_weight, residual, y, R, OUT, D, x.stride(0), w.stride(0),
        0 if residual is None else residual.stride(0), eps, **how.constants, **how.options,
    )  # fmt: skip
    return y


@_linear_decode.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    residual: Tensor | None,
) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def _triton(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    norm_weight: Tensor | None,
    eps: float,
    residual: Tensor | None,
) -> Tensor:
    y: Tensor = _linear_decode(x, *parts(weight), norm_weight, eps, residual)
    return y


OP = Op(name="linear_decode", implementations=(by_triton(_triton), by_torch(_torch)))


def variants(shape: Shape) -> Iterator[Variant]:
    """The products of a decode step: norm and qkv, output and residual, down and residual, head."""
    if not isinstance(shape, DecoderShape):
        return
    qkv = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    for dtype, stored, itemsizes, architecture in stored_types():
        for OUT, norm in ((qkv, True), (shape.dim, False), (shape.vocab_size, True)):
            for R in (2, 16):
                yield variant(
                    _linear_decode_kernel,
                    {
                        "x": dtype,
                        "weight": stored,
                        "scale": None if stored == dtype else "fp32",
                        "norm": dtype if norm else None,
                        "residual": None if norm else dtype,
                        "y": dtype,
                    },
                    launch(R, OUT, *itemsizes, norm, architecture >= 90),
                    architecture,
                )


def linear_decode(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """The product of a few rows with a weight matrix, after a norm, onto a residual.

    In `triton` a row's result depends on that row alone, to the bit, whatever R is, as long as rows
    of x start at multiples of 16 bytes.

    Args:
        x: `[R, D]`, R ≥ 1, best at most 16; copied where D is not contiguous.
        weight: `[O, D]` in the dtype of `x`, contiguous along D; or a QuantizedWeight, for any x.
        norm_weight: `[D]`: x becomes RMSNorm(x)·norm_weight first, rounded as the prior does.
        eps: added to the mean square, ≥ 0.
        residual: `[R, O]`, added last.
        implementation: `triton` (CUDA; not fp64) or `torch`; None: the first that can run.

    Returns:
        `[R, O]` in the dtype of `x`, summed in fp32. Differentiable in `torch` only.

    Raises:
        TypeError: where an argument is no tensor or has a dtype that does not fit.
        ValueError: where a shape, a stride or a device does not fit, or the name is unknown.
        UnavailableError: where the named implementation cannot run here.
    """
    OUT = check_inputs("linear_decode", x, {"weight": weight}, norm_weight, eps)
    if residual is not None:
        shape = (x.shape[0], OUT)
        check_tensor("linear_decode", "residual", residual, shape, (x.dtype,), x.device)
    if OP.pick(x.device.type, x.dtype, implementation) == "torch":
        return _torch(x, weight, norm_weight, eps, residual)
    return _triton(x, weight, norm_weight, float(eps), residual)


__all__ = ["OP", "linear_decode", "linear_decode_ref", "variants"]
