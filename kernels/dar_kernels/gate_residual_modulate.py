"""residual = x + gate·y; modulated = LN(residual)·(1 + scale) + shift; LN without affine, eps 1e-6.

Memory bound, M rows: forward reads x, y, gate, shift and scale, writes residual and modulated,
7·M·D·itemsize bytes (apart: 10). Backward reads both gradients, residual, y, gate and scale, writes
dx, dy, dgate and dscale, 10·M·D·itemsize; dshift came in. Without shift and scale: 5 and 8.
The norm is that of the residual as it is stored, so backward needs nothing else.
Source: D-AR (arXiv 2505.23660), §3.2, the pixel DiT between its branches.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

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


class GateResidual(NamedTuple):
    """The residual stream and its norm, each `[B, N, D]`."""

    residual: Tensor
    modulated: Tensor


def gate_residual_modulate_ref(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor | None, scale: Tensor | None
) -> GateResidual:
    """The definition, in whatever dtype it is given; in fp64 it is the truth the tests use."""
    residual = x + gate * y
    modulated = F.layer_norm(residual, x.shape[-1:], eps=EPS)
    if shift is not None and scale is not None:
        modulated = modulated * (1 + scale) + shift
    return GateResidual(residual, modulated)


@triton.jit
def _gate_residual_modulate_kernel(
    x_ptr, y_ptr, gate_ptr, shift_ptr, scale_ptr, residual_ptr, modulated_ptr,
    stride_xm, stride_ym, stride_gate, stride_shift, stride_scale, D, eps,
    MODULATE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    mask = cols < D
    x = tl.load(x_ptr + row * stride_xm + cols, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + row * stride_ym + cols, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * stride_gate + cols, mask=mask, other=0.0).to(tl.float32)
    if MODULATE:  # asked for before the first use of what is above
        scale = tl.load(scale_ptr + row * stride_scale + cols, mask=mask, other=0.0)
        shift = tl.load(shift_ptr + row * stride_shift + cols, mask=mask, other=0.0)
    residual = cast(x + gate * y, residual_ptr.dtype.element_ty)
    tl.store(residual_ptr + row * D + cols, residual, mask=mask)
    modulated, _ = normalise_row(residual.to(tl.float32), mask, D, eps)
    if MODULATE:
        modulated = modulated * (1.0 + scale.to(tl.float32)) + shift.to(tl.float32)
    dtype = modulated_ptr.dtype.element_ty
    tl.store(modulated_ptr + row * D + cols, cast(modulated, dtype), mask=mask)


@triton.jit
def _gate_residual_modulate_backward_kernel(
    dresidual_ptr, dmodulated_ptr, residual_ptr, y_ptr, gate_ptr, scale_ptr,
    dx_ptr, dy_ptr, dgate_ptr, dscale_ptr,
    stride_dresidual, stride_dmodulated, stride_ym, stride_gate, stride_scale, D, eps,
    MODULATE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    mask = cols < D
    out = row * D + cols
    residual = tl.load(residual_ptr + out, mask=mask, other=0.0).to(tl.float32)
    dmodulated = tl.load(dmodulated_ptr + row * stride_dmodulated + cols, mask=mask, other=0.0)
    dresidual = tl.load(dresidual_ptr + row * stride_dresidual + cols, mask=mask, other=0.0)
    y = tl.load(y_ptr + row * stride_ym + cols, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * stride_gate + cols, mask=mask, other=0.0).to(tl.float32)
    dtype = dx_ptr.dtype.element_ty
    x_hat, rstd = normalise_row(residual, mask, D, eps)
    dmodulated = dmodulated.to(tl.float32)
    dx_hat = dmodulated
    if MODULATE:
        scale = tl.load(scale_ptr + row * stride_scale + cols, mask=mask, other=0.0)
        dx_hat = dmodulated * (1.0 + scale.to(tl.float32))
        tl.store(dscale_ptr + out, cast(dmodulated * x_hat, dtype), mask=mask)
    dx = dresidual.to(tl.float32) + normalise_row_backward(dx_hat, x_hat, rstd, D)
    tl.store(dx_ptr + out, cast(dx, dtype), mask=mask)
    tl.store(dy_ptr + out, cast(dx * gate, dtype), mask=mask)
    tl.store(dgate_ptr + out, cast(dx * y, dtype), mask=mask)


@torch.library.custom_op("dar::gate_residual_modulate", mutates_args=())
def _gate_residual_modulate(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    x_, y_, gate_ = matrix_of(x), matrix_of(y), matrix_of(gate)
    shift_, scale_ = (x_ if t is None else matrix_of(t) for t in (shift, scale))
    M, D = x_.shape
    residual = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    modulated = torch.empty_like(residual)
    block, options = row_launch(D)
    _gate_residual_modulate_kernel[(M,)](
        x_, y_, gate_, shift_, scale_, residual, modulated,
        x_.stride(0), y_.stride(0), gate_.stride(0), shift_.stride(0), scale_.stride(0), D, EPS,
        MODULATE=scale is not None, BLOCK_D=block, **options,
    )  # fmt: skip
    return residual, modulated


@_gate_residual_modulate.register_fake
def _(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.custom_op("dar::gate_residual_modulate_backward", mutates_args=())
def _gate_residual_modulate_backward(
    dresidual: Tensor, dmodulated: Tensor, residual: Tensor, y: Tensor, gate: Tensor,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dy, dgate and dscale, the last one empty where there is no scale; residual is dense."""
    dresidual_, dmodulated_ = matrix_of(dresidual), matrix_of(dmodulated)
    y_, gate_ = matrix_of(y), matrix_of(gate)
    scale_ = y_ if scale is None else matrix_of(scale)
    M, D = y_.shape
    dx, dy, dgate = (torch.empty_like(residual) for _ in range(3))
    dscale = residual.new_empty(0 if scale is None else residual.shape)
    block, options = row_launch(D)
    _gate_residual_modulate_backward_kernel[(M,)](
        dresidual_, dmodulated_, residual, y_, gate_, scale_, dx, dy, dgate, dscale,
        dresidual_.stride(0), dmodulated_.stride(0), y_.stride(0), gate_.stride(0),
        scale_.stride(0), D, EPS,
        MODULATE=scale is not None, BLOCK_D=block, **options,
    )  # fmt: skip
    return dx, dy, dgate, dscale


@_gate_residual_modulate_backward.register_fake
def _(
    dresidual: Tensor, dmodulated: Tensor, residual: Tensor, *others: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, dy, dgate = (torch.empty_like(residual) for _ in range(3))
    return dx, dy, dgate, residual.new_empty(0 if others[-1] is None else residual.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, y, gate, _, scale = inputs
    ctx.save_for_backward(output[0], y, gate, scale)


def _autograd(ctx: Any, dresidual: Tensor, dmodulated: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    dx, dy, dgate, dscale = _gate_residual_modulate_backward(dresidual, dmodulated, *saved)
    return (dx, dy, dgate, *((None, None) if saved[-1] is None else (dmodulated, dscale)))


_gate_residual_modulate.register_autograd(_autograd, setup_context=_setup_context)

OP = Op(
    name="gate_residual_modulate",
    implementations=(
        by_triton(_gate_residual_modulate),
        by_native(modulate_native.gate_residual_modulate, modulate_native.NATIVE_DTYPES),
        by_torch(gate_residual_modulate_ref),
    ),
)


def variants(shape: Shape) -> Iterator[Variant]:
    """What is launched for a denoiser of this shape; nothing for a decoder."""
    if not isinstance(shape, DenoiserShape):
        return
    block, options = row_launch(shape.dim)
    for kernel in (_gate_residual_modulate_kernel, _gate_residual_modulate_backward_kernel):
        strides = [n for n in kernel.arg_names if n.startswith("stride_")]
        pointers = [n for n in kernel.arg_names if n.endswith("_ptr")]
        for dtype, modulate in (("bf16", True), ("bf16", False), ("fp32", True)):
            signature = dict.fromkeys((*strides, "D"), "i32") | {"eps": "fp32"}
            yield Variant(
                kernel=kernel,
                signature=signature | dict.fromkeys(pointers, f"*{dtype}"),
                constants={"MODULATE": modulate, "BLOCK_D": block},
                aligned=(*strides, "D"),
                options=options,
            )


def gate_residual_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    *,
    implementation: str | None = None,
) -> GateResidual:
    """x + gate·y, and the modulated norm of it that the next branch reads.

    Args:
        x: `[B, N, D]`, floating point, 1 ≤ D ≤ 16384.
        y, gate: `[B, N, D]`, of the dtype and on the device of `x`.
        shift, scale: the same, or both None: the plain norm. All may be chunks of a wider tensor:
            what one row stride can express is not copied.
        implementation: `triton` (CUDA, not fp64), `native` (CPU, fp32 and bf16, without gradients)
            or `torch`; None: the first that can run.

    Returns:
        residual and modulated, in the dtype of `x`. Differentiable. Under autocast `triton` runs in
        its dtype.

    Raises:
        TypeError: where an argument is no floating point tensor, or dtypes differ.
        ValueError: where shapes or devices do not fit, one of shift and scale is missing, or no
            implementation has that name.
        UnavailableError: where the named implementation cannot run here.
    """
    modulation = {k: t for k, t in (("shift", shift), ("scale", scale)) if t is not None}
    if len(modulation) == 1:
        raise ValueError(f"{OP.name}: expected shift and scale or neither, got {list(modulation)}")
    check_alike(OP.name, x, TOKENS, y=y, gate=gate, **modulation)
    grad = needs_grad(x, y, gate, shift, scale) or modulate_native.blocked(x.device.type)
    chosen = OP.pick(x.device.type, x.dtype, implementation, grad)
    if chosen == "torch":
        return gate_residual_modulate_ref(x, y, gate, shift, scale)
    if chosen == "native":
        return GateResidual(*modulate_native.gate_residual_modulate(x, y, gate, shift, scale))
    x, y, gate = lowered(x, y, gate)
    if shift is not None and scale is not None:
        shift, scale = lowered(shift, scale)
    return GateResidual(*_gate_residual_modulate(x, y, gate, shift, scale))
