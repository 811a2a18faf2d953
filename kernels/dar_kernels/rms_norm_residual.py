"""residual = x + delta; normed = residual · rsqrt(mean residual² + eps), rounded, · weight.

The prior's residual stream and the norm behind it in one pass. Memory bound: forward reads x and
delta, writes both results, 4·M·D·itemsize bytes (2 without delta) and 4·M of reciprocal norms;
backward reads dnormed, dresidual and residual, writes dx, 4·M·D·itemsize (3 without delta), and one
partial row of dweight a program.
Source: Zhang and Sennrich, Root Mean Square Layer Normalization (2019);
rounding as in Llama.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dar_kernels.aot import DecoderShape, Shape, Variant
from dar_kernels.checks import FLOATS, check_norm, check_tensor
from dar_kernels.dispatch import Op
from dar_kernels.implementations import by_torch, by_triton
from dar_kernels.rms_norm_residual_backward import (
    NUMBERS,
    backward_variant,
    rms_norm_residual_backward,
)
from dar_kernels.rows import matrix_of, row_blocks
from dar_kernels.triton_support import cast, tl, triton

MAX_DIM = 8192  # one program keeps a whole row in registers


class NormedResidual(NamedTuple):
    """What the next branch reads, and the residual stream behind it."""

    normed: Tensor
    residual: Tensor


def rms_norm_residual_ref(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float = 1e-5
) -> NormedResidual:
    """The definition, in whatever dtype it is given; in fp64 it is the truth the tests use."""
    residual = x if delta is None else x + delta
    norm = torch.rsqrt(residual.square().mean(-1, keepdim=True) + eps)
    return NormedResidual(residual * norm * weight, residual)


def _torch(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> NormedResidual:
    """As the model: the norm in fp32 at least, rounded before the weight."""
    residual = x if delta is None else x + delta
    wide = residual.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return NormedResidual((normed.to(x.dtype) * weight).to(x.dtype), residual)


@triton.jit
def _rms_norm_residual_kernel(
    x_ptr, delta_ptr, weight_ptr, normed_ptr, residual_ptr, rstd_ptr, stride_xm, stride_deltam, M,
    D, eps, HAS_DELTA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_D)[None, :]
    mask = (row < M)[:, None] & (col < D)
    at = row[:, None] * D + col
    residual = tl.load(x_ptr + row[:, None] * stride_xm + col, mask=mask, other=0.0)
    if HAS_DELTA:
        delta = tl.load(delta_ptr + row[:, None] * stride_deltam + col, mask=mask, other=0.0)
        residual = cast(residual.to(tl.float32) + delta.to(tl.float32), residual.dtype)
        tl.store(residual_ptr + at, residual, mask=mask)
    wide = residual.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(wide * wide, 1) / D + eps)
    tl.store(rstd_ptr + row, rstd, mask=row < M)
    normed = cast(wide * rstd[:, None], residual.dtype).to(tl.float32)
    weight = tl.load(weight_ptr + col, mask=col < D, other=0.0).to(tl.float32)
    tl.store(normed_ptr + at, cast(normed * weight, residual.dtype), mask=mask)


@torch.library.custom_op("dar::rms_norm_residual", mutates_args=())
def _rms_norm_residual(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows = matrix_of(x)
    M, D = rows.shape
    normed = x.new_empty(x.shape)
    residual = x.new_empty(0 if delta is None else x.shape)  # no output may be an input
    rstd = x.new_empty(M, dtype=torch.float32)
    if M:
        added = rows if delta is None else matrix_of(delta)
        blocks, options = row_blocks(D, NUMBERS)
        _rms_norm_residual_kernel[(triton.cdiv(M, blocks["BLOCK_M"]),)](
            rows, added, weight.contiguous(), normed, residual, rstd, rows.stride(0),
            added.stride(0), M, D, eps, HAS_DELTA=delta is not None, **blocks, **options,
        )  # fmt: skip
    return normed, residual, rstd


@_rms_norm_residual.register_fake
def _(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    rstd = x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(0 if delta is None else x.shape), rstd


def _setup_context(ctx, inputs, output) -> None:
    x, delta, weight, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.delta_dtype = None if delta is None else delta.dtype
    ctx.save_for_backward(x if delta is None else output[1], weight, output[2])


def _autograd(ctx, dnormed: Tensor | None, dresidual: Tensor | None, drstd: Tensor | None):
    residual, weight, rstd = ctx.saved_tensors
    if ctx.delta_dtype is None:
        dresidual = None  # the residual is x itself, and its gradient goes there
    dx, dweight = dresidual, None
    if dnormed is not None:
        dx, dweight = rms_norm_residual_backward(dnormed, dresidual, residual, weight, rstd)
    ddelta = dx.to(ctx.delta_dtype) if dx is not None and ctx.delta_dtype else None
    return dx, ddelta, dweight, None


_rms_norm_residual.register_autograd(_autograd, setup_context=_setup_context)


def _triton(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> NormedResidual:
    normed, residual, _ = _rms_norm_residual(x, delta, weight, eps)
    return NormedResidual(normed, x if delta is None else residual)


OP = Op(name="rms_norm_residual", implementations=(by_triton(_triton), by_torch(_torch)))


def variants(shape: Shape) -> Iterator[Variant]:
    """The prior's norms, in bf16 and as under autocast: an fp32 stream and bf16 branches."""
    if not isinstance(shape, DecoderShape):
        return
    blocks, options = row_blocks(shape.dim, NUMBERS)
    for stream, branch in (("bf16", "bf16"), ("fp32", "bf16")):
        sizes = {"stride_xm": "i32", "stride_deltam": "i32", "M": "i32", "D": "i32", "eps": "fp32"}
        pointers = dict.fromkeys(
            ("x_ptr", "weight_ptr", "normed_ptr", "residual_ptr"), f"*{stream}"
        )
        for added in (True, False):
            yield Variant(
                kernel=_rms_norm_residual_kernel,
                signature=pointers
                | {"delta_ptr": f"*{branch if added else stream}", "rstd_ptr": "*fp32"}
                | sizes,
                constants={"HAS_DELTA": added, **blocks},
                aligned=("stride_xm", "stride_deltam", "D"),
                options=options,
            )
            yield backward_variant(shape.dim, stream, added)


def rms_norm_residual(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    eps: float = 1e-5,
    *,
    implementation: str | None = None,
) -> NormedResidual:
    """Add a branch to the residual stream and normalise the sum.

    Args:
        x: `[..., D]`, the stream, floating point, D ≤ 8192, any strides.
        delta: `[..., D]`, the branch, of the dtype of `x` or a narrower one; None: none yet, and
            the residual is `x` itself.
        weight: `[D]`, in the dtype of `x` or fp32.
        eps: added to the mean square, > 0.
        implementation: `triton` or `torch`; None: the first of these that can run.

    Returns:
        normed and residual, both `[..., D]` in the dtype of `x`, differentiable in `x`, `delta`
        and `weight`.

    Raises:
        TypeError: where an argument is no tensor, or of a dtype that does not fit.
        ValueError: where a shape, a device or eps does not fit, or no implementation has that name.
        UnavailableError: where the named implementation cannot run here.
    """
    check_norm("rms_norm_residual", x, MAX_DIM, eps, weight=weight)
    if delta is not None:
        dtypes = [dtype for dtype in FLOATS if torch.promote_types(x.dtype, dtype) == x.dtype]
        check_tensor("rms_norm_residual", "delta", delta, x.shape, dtypes, x.device)
    if OP.pick(x.device.type, x.dtype, implementation) == "torch":
        return _torch(x, delta, weight, eps)
    return _triton(x, delta, weight, eps)
