"""y = silu(h Wgᵀ) ∗ (h Wuᵀ), h = RMSNorm(x)·norm_weight or x, in a decode step: x [R, D], W [F, D].

Memory bound up to 16 rows: both weights are read once for all of them in one launch, 2·F·D·itemsize
bytes, against 4·R·F·D FLOPs; the two products stay in fp32 and on chip. As `linear_decode` else.
Source: D-AR (arXiv 2505.23660), §3.3, its Llama; Shazeer, GLU Variants Improve Transformer (2020).
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dar_kernels.aot import DecoderShape, Shape, Variant
from dar_kernels.dispatch import Op
from dar_kernels.implementations import by_torch, by_triton
from dar_kernels.linear_decode import linear_decode_ref, normalised, plain
from dar_kernels.quantize import QuantizedWeight
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


def linear_decode_swiglu_ref(
    x: Tensor,
    gate_weight: Tensor | QuantizedWeight,
    up_weight: Tensor | QuantizedWeight,
    norm_weight: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """The definition, in whatever dtype x is given; in fp64 it is the truth the tests use."""
    gate = linear_decode_ref(x, gate_weight, norm_weight, eps)
    return F.silu(gate) * linear_decode_ref(x, up_weight, norm_weight, eps)


def _torch(
    x: Tensor,
    gate_weight: Tensor | QuantizedWeight,
    up_weight: Tensor | QuantizedWeight,
    norm_weight: Tensor | None,
    eps: float,
) -> Tensor:
    h = normalised(x, norm_weight, eps)
    gate = F.linear(h, plain(gate_weight, x.dtype))
    return F.silu(gate) * F.linear(h, plain(up_weight, x.dtype))


@triton.jit(do_not_specialize=["R"])
def _linear_decode_swiglu_kernel(
    x_ptr, gate_ptr, gate_scale_ptr, up_ptr, up_scale_ptr, norm_ptr, y_ptr,
    R, OUT, D, stride_xr, stride_gate, stride_up, eps,
    ROWS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
    PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    channel = tl.minimum(o, OUT - 1)  # the last program reads the last channel again
    valid = r < R
    row = r.to(tl.int64)
    x_rows = x_ptr + row * stride_xr
    gate_rows = gate_ptr + channel.to(tl.int64) * stride_gate
    up_rows = up_ptr + channel.to(tl.int64) * stride_up
    if PREFETCH:
        prefetch(gate_rows, D)
        prefetch(up_rows, D)
    if PDL:  # weights do not depend on the kernel before; all that follows may
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    rstd = tl.zeros([ROWS], tl.float32)
    if norm_ptr is not None:
        rstd = inverse_rms(x_rows, valid, D, eps, ROWS)
    lanes = tl.arange(0, SLICES)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    gate = tl.zeros([SLICES, BLOCK_O, ROWS], tl.float32)
    up = tl.zeros([SLICES, BLOCK_O, ROWS], tl.float32)
    for start in range(0, D, SLICES * BLOCK_K):
        x = x_tile(x_rows, valid, start + lanes, D, rstd, norm_ptr)
        gate = dot(weight_tile(gate_rows, start + lanes, D, x.dtype), x, gate)
        up = dot(weight_tile(up_rows, start + lanes, D, x.dtype), x, up)
    g = channel_sums(gate, gate_scale_ptr, channel)
    e = tl.exp(-tl.abs(g))  # at most 1: no overflow
    silu = g * tl.where(g >= 0, 1.0, e) / (1.0 + e)
    y = silu * channel_sums(up, up_scale_ptr, channel)
    here = y_ptr + row[None, :] * OUT + o[:, None]
    mask = (o < OUT)[:, None] & valid[None, :]
    tl.store(here, cast(y, y_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op("dar::linear_decode_swiglu", mutates_args=())
def _linear_decode_swiglu(
    x: Tensor,
    gate_weight: Tensor,
    gate_scale: Tensor | None,
    up_weight: Tensor,
    up_scale: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
) -> Tensor:
    (R, D), OUT = x.shape, gate_weight.shape[0]
    x, gate, up = contiguous_last(x), as_stored(gate_weight), as_stored(up_weight)
    gate_scale, up_scale, norm_weight = (
        None if t is None else t.contiguous() for t in (gate_scale, up_scale, norm_weight)
    )
    y = torch.empty((R, OUT), dtype=x.dtype, device=x.device)
    hopper = capability(x.device) >= (9, 0)
    how = launch(R, OUT, x.itemsize, gate.itemsize, norm_weight is not None, hopper, weights=2)
    _linear_decode_swiglu_kernel[(triton.cdiv(R, how.rows), triton.cdiv(OUT, how.channels))](
        x, gate, gate_scale, up, up_scale, norm_weight, y, R, OUT, D,
        x.stride(0), gate.stride(0), up.stride(0), eps, **how.constants, **how.options,
    )  # fmt: skip
    return y


@_linear_decode_swiglu.register_fake
def _(
    x: Tensor,
    gate_weight: Tensor,
    gate_scale: Tensor | None,
    up_weight: Tensor,
    up_scale: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
) -> Tensor:
    return x.new_empty((x.shape[0], gate_weight.shape[0]))


def _triton(
    x: Tensor,
    gate_weight: Tensor | QuantizedWeight,
    up_weight: Tensor | QuantizedWeight,
    norm_weight: Tensor | None,
    eps: float,
) -> Tensor:
    y: Tensor = _linear_decode_swiglu(x, *parts(gate_weight), *parts(up_weight), norm_weight, eps)
    return y


OP = Op(name="linear_decode_swiglu", implementations=(by_triton(_triton), by_torch(_torch)))


def variants(shape: Shape) -> Iterator[Variant]:
    """The first half of a decode step's MLP."""
    if not isinstance(shape, DecoderShape):
        return
    for dtype, stored, itemsizes, architecture in stored_types():
        scale = None if stored == dtype else "fp32"
        for R in (2, 16):
            yield variant(
                _linear_decode_swiglu_kernel,
                {
                    "x": dtype,
                    "gate": stored,
                    "gate_scale": scale,
                    "up": stored,
                    "up_scale": scale,
                    "norm": dtype,
                    "y": dtype,
                },
                launch(R, shape.hidden_dim, *itemsizes, True, architecture >= 90, weights=2),
                architecture,
            )


def linear_decode_swiglu(
    x: Tensor,
    gate_weight: Tensor | QuantizedWeight,
    up_weight: Tensor | QuantizedWeight,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 1e-5,
    implementation: str | None = None,
) -> Tensor:
    """SwiGLU's two products of a few rows and their gating, after a norm.

    In `triton` a row's result depends on that row alone, to the bit, whatever R is, as long as rows
    of x start at multiples of 16 bytes.

    Args:
        x: `[R, D]`, R ≥ 1, best at most 16; copied where D is not contiguous.
        gate_weight: `[F, D]` in the dtype of `x`, contiguous along D; or a QuantizedWeight.
        up_weight: `[F, D]`, stored in the dtype of `gate_weight`.
        norm_weight: `[D]`: x becomes RMSNorm(x)·norm_weight first, rounded as the prior does.
        eps: added to the mean square, ≥ 0.
        implementation: `triton` (CUDA; not fp64) or `torch`; None: the first that can run.

    Returns:
        `[R, F]` in the dtype of `x`, fp32 until then. Differentiable in `torch` only.

    Raises:
        TypeError: where an argument is no tensor or has a dtype that does not fit.
        ValueError: where a shape, a stride or a device does not fit, or the name is unknown.
        UnavailableError: where the named implementation cannot run here.
    """
    weights = {"gate_weight": gate_weight, "up_weight": up_weight}
    check_inputs("linear_decode_swiglu", x, weights, norm_weight, eps)
    gate, up = parts(gate_weight)[0].dtype, parts(up_weight)[0].dtype
    if gate != up:
        raise TypeError(f"linear_decode_swiglu: expected up_weight in {gate}, got {up}")
    if OP.pick(x.device.type, x.dtype, implementation) == "torch":
        return _torch(x, gate_weight, up_weight, norm_weight, eps)
    return _triton(x, gate_weight, up_weight, norm_weight, float(eps))


__all__ = ["OP", "linear_decode_swiglu", "linear_decode_swiglu_ref", "variants"]
