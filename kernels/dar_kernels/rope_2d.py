"""y_2i = x_2i · cos_i − x_2i+1 · sin_i, y_2i+1 = x_2i · sin_i + x_2i+1 · cos_i: rotary positions.

The tables say where a token is: on a grid for the DiT and the encoder, on a line for the prior.
Memory bound: reads x, writes y, 2·B·H·N·Dh·itemsize bytes, and the fp32 tables, 4·N·Dh, from the
caches: a program rotates several heads of a token with one row of them. Backward is the rotation by
the negative angle, the same kernel. x may be a transposed view or part of a joint projection.
Source: Su et al., RoFormer (2021); interleaved pairs.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from dar_kernels.aot import Shape, Variant
from dar_kernels.checks import Dim, check_tensor
from dar_kernels.dispatch import Op
from dar_kernels.implementations import by_torch, by_triton
from dar_kernels.rows import empty_in_order
from dar_kernels.triton_support import (
    cast,
    contiguous_last,
    launch_options,
    tl,
    triton,
)

MAX_HEAD_DIM = 512
BLOCK_H = 4  # heads that share a read of the tables: 12, 16, 20, 24, 32 and 40 divide by it
NUMBERS = 2048  # of a tile: 16 a thread, two 16-byte loads in bf16; by register counts, not timed
OPTIONS = launch_options(num_warps=4)


def rope_2d_ref(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The definition; the tables' dtype is the least that it computes in: fp64 x is the truth."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


@triton.jit
def _rope_2d_kernel(
    x_ptr, cos_ptr, sin_ptr, y_ptr, stride_xb, stride_xh, stride_xn, stride_yb, stride_yh,
    stride_yn, H, N, PAIRS, INVERSE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    head_blocks = tl.cdiv(H, BLOCK_H)
    token_blocks = tl.cdiv(N, BLOCK_N)
    rest = tl.program_id(0) // head_blocks
    b = (rest // token_blocks).to(tl.int64)
    row = tl.arange(0, BLOCK_H * BLOCK_N)
    h = (tl.program_id(0) % head_blocks).to(tl.int64) * BLOCK_H + row // BLOCK_N
    n = (rest % token_blocks).to(tl.int64) * BLOCK_N + row % BLOCK_N
    there = ((h < H) & (n < N))[:, None]
    col = tl.arange(0, 2 * BLOCK_P)[None, :]
    pair = tl.arange(0, BLOCK_P)[None, :]
    table = n[:, None] * PAIRS + pair
    table_mask = there & (pair < PAIRS)
    mask = there & (col < 2 * PAIRS)

    x_at = b * stride_xb + h * stride_xh + n * stride_xn
    x = tl.load(x_ptr + x_at[:, None] + col, mask=mask, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + table, mask=table_mask, other=0.0)
    sin = tl.load(sin_ptr + table, mask=table_mask, other=0.0)
    if INVERSE:
        sin = -sin
    even, odd = tl.split(tl.reshape(x, [BLOCK_H * BLOCK_N, BLOCK_P, 2]))
    y = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    y = tl.reshape(y, [BLOCK_H * BLOCK_N, 2 * BLOCK_P])
    y_at = b * stride_yb + h * stride_yh + n * stride_yn
    tl.store(y_ptr + y_at[:, None] + col, cast(y, y_ptr.dtype.element_ty), mask=mask)


def _blocks(head_dim: int) -> dict[str, int]:
    BLOCK_P = triton.next_power_of_2(head_dim // 2)
    BLOCK_N = max(1, NUMBERS // (BLOCK_H * 2 * BLOCK_P))
    return {"BLOCK_H": BLOCK_H, "BLOCK_N": BLOCK_N, "BLOCK_P": BLOCK_P}


@torch.library.custom_op("dar::rope_2d", mutates_args=())
def _rope_2d(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    y = empty_in_order(x)
    B, H, N, Dh = x.shape
    blocks = _blocks(Dh)
    programs = B * triton.cdiv(H, BLOCK_H) * triton.cdiv(N, blocks["BLOCK_N"])
    if programs:
        x = contiguous_last(x)
        _rope_2d_kernel[(programs,)](
            x, cos.contiguous(), sin.contiguous(), y, *x.stride()[:3], *y.stride()[:3], H, N,
            Dh // 2, INVERSE=inverse, **blocks, **OPTIONS,
        )  # fmt: skip
    return y


@_rope_2d.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    return empty_in_order(x)


def _setup_context(ctx, inputs, output) -> None:
    _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _autograd(ctx, dy: Tensor) -> tuple[Tensor, None, None, None]:
    cos, sin = ctx.saved_tensors
    return _rope_2d(dy, cos, sin, not ctx.inverse), None, None, None


_rope_2d.register_autograd(_autograd, setup_context=_setup_context)


def _triton(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y: Tensor = _rope_2d(x, cos, sin, False)
    return y


OP = Op(name="rope_2d", implementations=(by_triton(_triton), by_torch(rope_2d_ref)))


def variants(shape: Shape) -> Iterator[Variant]:
    """The rotation of q and k and its backward, in bf16 and fp32."""
    strides = tuple(f"stride_{t}{d}" for t in "xy" for d in "bhn")
    pairs = shape.head_dim // 2
    for dtype in ("bf16", "fp32"):
        for inverse in (False, True):
            sizes = (*strides, "H", "N", "PAIRS")
            aligned = {*strides, "PAIRS"}
            if shape.head_dim % 16:
                aligned -= {"stride_xh", "stride_yh"}
            if pairs % 16:
                aligned -= {"PAIRS"}
            yield Variant(
                kernel=_rope_2d_kernel,
                signature={"x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}"}
                | dict.fromkeys(("cos_ptr", "sin_ptr"), "*fp32")
                | dict.fromkeys(sizes, "i32"),
                constants={"INVERSE": inverse, **_blocks(shape.head_dim)},
                aligned=tuple(sorted(aligned)),
                options=OPTIONS,
            )


def rope_2d(x: Tensor, cos: Tensor, sin: Tensor, *, implementation: str | None = None) -> Tensor:
    """Rotate the pairs (0, 1), (2, 3), … of each head by its token's angles; fp32 inside.

    Args:
        x: `[B, H, N, Dh]`, floating point, Dh even and at most 512, any strides; a copy is made
            only where the last dimension is not contiguous.
        cos: `[N, Dh / 2]` fp32, a constant: it may not require a gradient.
        sin: as `cos`.
        implementation: `triton` or `torch`; None: the first of these that can run.

    Returns:
        `[B, H, N, Dh]` in the dtype of `x`; `triton` keeps the order of its dimensions in memory.
        Differentiable in `x`.

    Raises:
        TypeError: where an argument is no tensor, or of a dtype that does not fit.
        ValueError: where a shape or a device does not fit, a table requires a gradient, or no
            implementation has that name.
        UnavailableError: where the named implementation cannot run here.
    """
    check_tensor("rope_2d", "x", x, ("B", "H", "N", Dim("Dh", 2, MAX_HEAD_DIM)))
    N, Dh = x.shape[2:]
    if Dh % 2:
        raise ValueError(f"rope_2d: expected x [B, H, N, Dh even], got {list(x.shape)}")
    for name, table in (("cos", cos), ("sin", sin)):
        check_tensor("rope_2d", name, table, (N, Dh // 2), (torch.float32,), x.device)
        if table.requires_grad:
            raise ValueError(f"rope_2d: expected {name} without gradient, got one that requires it")
    if OP.pick(x.device.type, x.dtype, implementation) == "torch":
        return rope_2d_ref(x, cos, sin)
    return _triton(x, cos, sin)
