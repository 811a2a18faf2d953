"""y = LN(x)·(1 + scale) + shift over the last dimension; LN without affine, eps 1e-6.

Memory bound, M rows: forward reads x, shift and scale, writes y, 4·M·D·itemsize bytes; backward
reads dy, x and scale, writes dx and dscale, 5·M·D·itemsize; dshift is dy. Only inputs are saved:
the row is in registers anyway, so its mean and deviation cost two reductions and no memory.
Source: D-AR (arXiv 2505.23660), §3.2, the adaptive norms of the pixel DiT.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dar_kernels import modulate_native
from dar_kernels.aot import DenoiserShape, Shape, Variant
from dar_kernels.checks import check_alike, lowered
from dar_kernels.dispatch import Op, needs_grad
from dar_kernels.implementations import by_native, by_torch, by_triton
from dar_kernels.layer_norm_rows import (
    EPS,
    TOKENS,
    normalise_row,
    normalise_row_backward,
    row_launch,
)
from dar_kernels.rows import matrix_of
from dar_kernels.triton_support import cast, tl, triton


def layer_norm_modulate_ref(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """The definition, in whatever dtype it is given; in fp64 it is the truth the tests use."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift


@triton.jit
def _layer_norm_modulate_kernel(
    x_ptr, shift_ptr, scale_ptr, y_ptr,
    stride_xm, stride_shift, stride_scale, D, eps,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    mask = cols < D
    x = tl.load(x_ptr + row * stride_xm + cols, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + row * stride_scale + cols, mask=mask, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + row * stride_shift + cols, mask=mask, other=0.0).to(tl.float32)
    x_hat, _ = normalise_row(x, mask, D, eps)
    y = x_hat * (1.0 + scale) + shift
    tl.store(y_ptr + row * D + cols, cast(y, y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _layer_norm_modulate_backward_kernel(
    dy_ptr, x_ptr, scale_ptr, dx_ptr, dmodulation_ptr,
    stride_dym, stride_xm, stride_scale, D, eps,
    WITH_SHIFT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    mask = cols < D
    dy_stored = tl.load(dy_ptr + row * stride_dym + cols, mask=mask, other=0.0)
    x = tl.load(x_ptr + row * stride_xm + cols, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + row * stride_scale + cols, mask=mask, other=0.0).to(tl.float32)
    dy = dy_stored.to(tl.float32)
    x_hat, rstd = normalise_row(x, mask, D, eps)
    dx = normalise_row_backward(dy * (1.0 + scale), x_hat, rstd, D)
    tl.store(dx_ptr + row * D + cols, cast(dx, dx_ptr.dtype.element_ty), mask=mask)
    dmodulation_row = dmodulation_ptr + row * D
    if WITH_SHIFT:  # [dshift, dscale] side by side: one operand of the products that follow
        dmodulation_row += row * D
        tl.store(dmodulation_row + cols, dy_stored, mask=mask)
        dmodulation_row += D
    tl.store(dmodulation_row + cols, cast(dy * x_hat, dx_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op("dar::layer_norm_modulate", mutates_args=())
def _layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    x_, shift_, scale_ = matrix_of(x), matrix_of(shift), matrix_of(scale)
    M, D = x_.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block, options = row_launch(D)
    _layer_norm_modulate_kernel[(M,)](
        x_, shift_, scale_, y, x_.stride(0), shift_.stride(0), scale_.stride(0), D, EPS,
        BLOCK_D=block, **options,
    )  # fmt: skip
    return y


@_layer_norm_modulate.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("dar::layer_norm_modulate_backward", mutates_args=())
def layer_norm_modulate_backward(
    dy: Tensor, x: Tensor, scale: Tensor, with_shift: bool
) -> tuple[Tensor, Tensor]:
    """dx, and dscale `[B, N, D]` or, `with_shift`, dshift and dscale side by side `[B, N, 2 D]`."""
    dy_, x_, scale_ = matrix_of(dy), matrix_of(x), matrix_of(scale)
    M, D = x_.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dmodulation = dx.new_empty((*x.shape[:-1], D * (2 if with_shift else 1)))
    block, options = row_launch(D)
    _layer_norm_modulate_backward_kernel[(M,)](
        dy_, x_, scale_, dx, dmodulation, dy_.stride(0), x_.stride(0), scale_.stride(0), D, EPS,
        WITH_SHIFT=with_shift, BLOCK_D=block, **options,
    )  # fmt: skip
    return dx, dmodulation


@layer_norm_modulate_backward.register_fake
def _(dy: Tensor, x: Tensor, scale: Tensor, with_shift: bool) -> tuple[Tensor, Tensor]:
    dmodulation = x.new_empty((*x.shape[:-1], x.shape[-1] * (2 if with_shift else 1)))
    return x.new_empty(x.shape), dmodulation


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    x, _, scale = inputs
    ctx.save_for_backward(x, scale)


def _autograd(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dx, dscale = layer_norm_modulate_backward(dy, *ctx.saved_tensors, False)
    return dx, dy, dscale


_layer_norm_modulate.register_autograd(_autograd, setup_context=_setup_context)

OP = Op(
    name="layer_norm_modulate",
    implementations=(
        by_triton(_layer_norm_modulate),
        by_native(modulate_native.modulate, modulate_native.NATIVE_DTYPES),
        by_torch(layer_norm_modulate_ref),
    ),
)


def variants(shape: Shape) -> Iterator[Variant]:
    """What is launched for a denoiser of this shape; nothing for a decoder."""
    if not isinstance(shape, DenoiserShape):
        return
    block, options = row_launch(shape.dim)
    scalars = {"stride_xm": "i32", "stride_scale": "i32", "D": "i32", "eps": "fp32"}
    for dtype in ("bf16", "fp32"):
        p = f"*{dtype}"
        pointers = {"x_ptr": p, "shift_ptr": p, "scale_ptr": p, "y_ptr": p}
        yield Variant(
            kernel=_layer_norm_modulate_kernel,
            signature=pointers | scalars | {"stride_shift": "i32"},
            constants={"BLOCK_D": block},
            aligned=("stride_xm", "stride_shift", "stride_scale", "D"),
            options=options,
        )
        pointers = {"dy_ptr": p, "x_ptr": p, "scale_ptr": p, "dx_ptr": p, "dmodulation_ptr": p}
        for with_shift in (False, True):
            yield Variant(
                kernel=_layer_norm_modulate_backward_kernel,
                signature=pointers | scalars | {"stride_dym": "i32"},
                constants={"WITH_SHIFT": with_shift, "BLOCK_D": block},
                aligned=("stride_dym", "stride_xm", "stride_scale", "D"),
                options=options,
            )


def layer_norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, *, implementation: str | None = None
) -> Tensor:
    """LN(x)·(1 + scale) + shift over the last dimension.

    Args:
        x: `[B, N, D]`, floating point, 1 ≤ D ≤ 16384.
        shift, scale: `[B, N, D]`, of the dtype and on the device of `x`. All three may be chunks of
            a wider tensor: what one row stride can express is not copied.
        implementation: `triton` (CUDA, not fp64), `native` (CPU, fp32 and bf16, without gradients)
            or `torch`; None: the first that can run.

    Returns:
        `[B, N, D]`, contiguous, in the dtype of `x`. Differentiable. Under autocast `triton` runs
        in its dtype.

    Raises:
        TypeError: where an argument is no floating point tensor, or dtypes differ.
        ValueError: where shapes or devices do not fit, or no implementation has that name.
        UnavailableError: where the named implementation cannot run here.
    """
    check_alike("layer_norm_modulate", x, TOKENS, shift=shift, scale=scale)
    grad = needs_grad(x, shift, scale) or modulate_native.blocked(x.device.type)
    chosen = OP.pick(x.device.type, x.dtype, implementation, grad)
    if chosen == "torch":
        return layer_norm_modulate_ref(x, shift, scale)
    if chosen == "native":
        return modulate_native.modulate(x, shift, scale)
    return _layer_norm_modulate(*lowered(x, shift, scale))
