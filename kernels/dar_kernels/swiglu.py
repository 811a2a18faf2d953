"""y = silu(gate) · up, elementwise: between the two products of the prior's MLP.

Memory bound: forward reads gate and up, writes y, 3·M·F·itemsize bytes (unfused 5); backward reads
gate, up and dy, writes both gradients, 5·M·F·itemsize: silu is computed again, not kept.
gate and up may be the halves of one `[..., 2 F]` tensor, read where they lie.
Source: Shazeer, GLU Variants Improve Transformer (2020).
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dar_kernels.aot import DecoderShape, Shape, Variant
from dar_kernels.checks import Dim, check_tensor
from dar_kernels.dispatch import Op
from dar_kernels.implementations import by_torch, by_triton
from dar_kernels.rows import matrix_of
from dar_kernels.triton_support import cast, launch_options, tl, triton

# 8 of each tensor a thread, one 16-byte load in bf16; dense rows are one long row, so only halves
# of 2 F leave a part of their last block idle. By ahead-of-time register counts; not timed
BLOCK = 1024
OPTIONS = launch_options(num_warps=4)


def swiglu_ref(gate: Tensor, up: Tensor) -> Tensor:
    """The definition, in whatever dtype it is given; in fp64 it is the truth the tests use."""
    return gate * torch.sigmoid(gate) * up


def _torch(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


@triton.jit
def _place(stride_gatem, stride_upm, F, BLOCK: tl.constexpr):
    """Where this program's numbers are: in gate, in up, in dense rows, and which there are."""
    blocks = tl.cdiv(F, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return row * stride_gatem + col, row * stride_upm + col, row * F + col, col < F


@triton.jit
def _sigmoid(x):
    """Of any x without overflow: the exponential is of a number that is not positive."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x < 0, small, 1.0) / (1 + small)


@triton.jit
def _swiglu_kernel(
    gate_ptr, up_ptr, y_ptr, stride_gatem, stride_upm, F, BLOCK: tl.constexpr
):  # fmt: skip
    gate_at, up_at, at, mask = _place(stride_gatem, stride_upm, F, BLOCK)
    gate = tl.load(gate_ptr + gate_at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + up_at, mask=mask, other=0.0).to(tl.float32)
    y = gate * _sigmoid(gate) * up
    tl.store(y_ptr + at, cast(y, y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_backward_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, stride_gatem, stride_upm, F, BLOCK: tl.constexpr
):  # fmt: skip
    gate_at, up_at, at, mask = _place(stride_gatem, stride_upm, F, BLOCK)
    gate = tl.load(gate_ptr + gate_at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + up_at, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
    sigmoid = _sigmoid(gate)
    dgate = dy * up * sigmoid * (1 + gate * (1 - sigmoid))
    tl.store(dgate_ptr + at, cast(dgate, dgate_ptr.dtype.element_ty), mask=mask)
    dup = dy * gate * sigmoid
    tl.store(dup_ptr + at, cast(dup, dup_ptr.dtype.element_ty), mask=mask)


def _launched(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """gate and up as matrices, their rows and the length of a row: one long row if all is dense."""
    gate, up = matrix_of(gate), matrix_of(up)
    if gate.is_contiguous() and up.is_contiguous():
        return gate.view(1, -1), up.view(1, -1), 1, gate.numel()
    return gate, up, *gate.shape


@torch.library.custom_op("dar::swiglu", mutates_args=())
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    y = gate.new_empty(gate.shape)
    if y.numel():
        gate, up, M, F = _launched(gate, up)
        _swiglu_kernel[(M * triton.cdiv(F, BLOCK),)](
            gate, up, y, gate.stride(0), up.stride(0), F, BLOCK=BLOCK, **OPTIONS
        )
    return y


@_swiglu.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("dar::swiglu_backward", mutates_args=())
def _swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = gate.new_empty(gate.shape), up.new_empty(up.shape)
    if dgate.numel():
        gate, up, M, F = _launched(gate, up)
        _swiglu_backward_kernel[(M * triton.cdiv(F, BLOCK),)](
            dy.contiguous(), gate, up, dgate, dup, gate.stride(0), up.stride(0), F, BLOCK=BLOCK,
            **OPTIONS,
        )  # fmt: skip
    return dgate, dup


@_swiglu_backward.register_fake
def _(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
    return _swiglu_backward(dy, *ctx.saved_tensors)


_swiglu.register_autograd(_autograd, setup_context=_setup_context)

OP = Op(name="swiglu", implementations=(by_triton(_swiglu), by_torch(_torch)))


def variants(shape: Shape) -> Iterator[Variant]:
    """The prior's MLP; the sizes are arguments, so that all presets share one kernel."""
    if not isinstance(shape, DecoderShape):
        return
    for dtype in ("bf16", "fp32"):
        for kernel, tensors in (
            (_swiglu_kernel, ("gate_ptr", "up_ptr", "y_ptr")),
            (_swiglu_backward_kernel, ("dy_ptr", "gate_ptr", "up_ptr", "dgate_ptr", "dup_ptr")),
        ):
            sizes = ("stride_gatem", "stride_upm", "F")
            yield Variant(
                kernel=kernel,
                signature=dict.fromkeys(tensors, f"*{dtype}") | dict.fromkeys(sizes, "i32"),
                constants={"BLOCK": BLOCK},
                aligned=sizes,
                options=OPTIONS,
            )


def swiglu(gate: Tensor, up: Tensor, *, implementation: str | None = None) -> Tensor:
    """silu(gate) · up; `triton` rounds once, `torch` after silu too.

    Args:
        gate: `[..., F]`, floating point. Read without a copy where its rows have one stride: dense,
            or half of a `[..., 2 F]` tensor.
        up: as `gate`, of its shape and dtype.
        implementation: `triton` or `torch`; None: the first of these that can run.

    Returns:
        `[..., F]` in the dtype of `gate`, differentiable in both.

    Raises:
        TypeError: where an argument is no floating-point tensor, or their dtypes differ.
        ValueError: where shapes or devices differ, or no implementation has that name.
        UnavailableError: where the named implementation cannot run here.
    """
    check_tensor("swiglu", "gate", gate, (..., Dim("F")))
    check_tensor("swiglu", "up", up, gate.shape, (gate.dtype,), gate.device)
    if OP.pick(gate.device.type, gate.dtype, implementation) == "torch":
        return _torch(gate, up)
    y: Tensor = _swiglu(gate, up)
    return y
