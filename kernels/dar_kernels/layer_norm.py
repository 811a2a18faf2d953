"""y = (x − mean) · rsqrt(var + eps) · weight + bias over the last dimension; affine or not.

Over whole tokens, and over the heads of q and k (D = 64, millions of rows), which may be the
transposed view of `[B, N, H, Dh]` or a third of a joint projection: rows are read where they lie.
Memory bound: forward reads x and writes y, 2·M·D·itemsize bytes; backward reads x and dy and writes
dx, 3·M·D·itemsize. No statistics are kept: backward takes them again from the row it reads anyway,
where storing and loading them would be 5 % of the bytes at D = 64.
Source: Ba, Kiros and Hinton, Layer Normalization (2016).
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dar_kernels.aot import DecoderShape, Shape, Variant
from dar_kernels.checks import check_norm
from dar_kernels.dispatch import Op
from dar_kernels.implementations import by_torch, by_triton
from dar_kernels.layer_norm_backward import (
    backward_variant,
    layer_norm_backward,
    row_mean,
    row_offset,
)
from dar_kernels.rows import empty_in_order, memory_order, row_blocks, rows_of
from dar_kernels.triton_support import cast, tl, triton

MAX_DIM = 8192  # one program keeps a whole row in registers
NUMBERS = 2048  # of a tile at least: 16 a thread, two loads of 16 bytes on the way


def layer_norm_ref(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """The definition, in whatever dtype it is given; in fp64 it is the truth the tests use."""
    centred = x - x.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _torch(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """PyTorch's, fp32 inside; the dtype of `x` outside, under autocast too."""
    if all(t is None or t.dtype == x.dtype for t in (weight, bias)):
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps).to(x.dtype)
    dtype = torch.promote_types(x.dtype, torch.float32)
    weight, bias = (None if t is None else t.to(dtype) for t in (weight, bias))
    return F.layer_norm(x.to(dtype), x.shape[-1:], weight, bias, eps).to(x.dtype)


@triton.jit
def _layer_norm_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, inner_x, stride_xo, stride_xi, M, D, eps,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_D)[None, :]
    mask = (row < M)[:, None] & (col < D)
    x_at = row_offset(row, inner_x, stride_xo, stride_xi)[:, None] + col
    x = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(tl.float32)
    centred = tl.where(mask, x - row_mean(x, D)[:, None], 0.0)
    y = centred * tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)[:, None]
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + col, mask=col < D, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + col, mask=col < D, other=0.0).to(tl.float32)
    y_at = row.to(tl.int64)[:, None] * D + col
    tl.store(y_ptr + y_at, cast(y, y_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op("dar::layer_norm", mutates_args=())
def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    y = empty_in_order(x)
    D = x.shape[-1]
    M = x.numel() // D
    if M:
        rows = rows_of(x, memory_order(x))
        blocks, options = row_blocks(D, NUMBERS)
        _layer_norm_kernel[(triton.cdiv(M, blocks["BLOCK_M"]),)](
            rows.data, x if weight is None else weight.contiguous(),
            x if bias is None else bias.contiguous(), y, *rows[1:], M, D, eps,
            HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, **blocks, **options,
        )  # fmt: skip
    return y


@_layer_norm.register_fake
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return empty_in_order(x)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, ctx.eps = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight)


def _autograd(ctx, dy: Tensor):
    x, weight = ctx.saved_tensors
    dx, affine = layer_norm_backward(dy, x, weight, ctx.bias_dtype is not None, ctx.eps)
    dweight = None if weight is None else affine[0].to(weight.dtype)
    dbias = None if ctx.bias_dtype is None else affine[1].to(ctx.bias_dtype)
    return dx, dweight, dbias, None


_layer_norm.register_autograd(_autograd, setup_context=_setup_context)

OP = Op(name="layer_norm", implementations=(by_triton(_layer_norm), by_torch(_torch)))


def variants(shape: Shape) -> Iterator[Variant]:
    """Norms of whole tokens, with and without affine, and of heads; bf16, and fp32 under autocast.

    Under autocast the heads come in bf16 and their weights in fp32.
    """
    if isinstance(shape, DecoderShape):
        return
    for D, dtype, affine in (
        (shape.dim, "bf16", "bf16"),
        (shape.dim, "fp32", "fp32"),
        (shape.dim, "bf16", None),
        (shape.dim, "fp32", None),
        (shape.head_dim, "bf16", "bf16"),
        (shape.head_dim, "bf16", "fp32"),
    ):
        blocks, options = row_blocks(D, NUMBERS)
        constants = {"HAS_WEIGHT": affine is not None, "HAS_BIAS": affine is not None, **blocks}
        tensors = {"x_ptr": f"*{dtype}", "weight_ptr": f"*{affine or dtype}"}
        sizes = {"stride_xo": "i32", "stride_xi": "i32", "M": "i32", "D": "i32", "eps": "fp32"}
        yield Variant(
            kernel=_layer_norm_kernel,
            signature={**tensors, "bias_ptr": f"*{affine or dtype}", "y_ptr": f"*{dtype}", **sizes},
            constants={"inner_x": 1, **constants},  # dense rows, as every preset has them
            aligned=("stride_xo", "stride_xi", "D"),
            options=options,
        )
        yield backward_variant(D, dtype, affine)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    implementation: str | None = None,
) -> Tensor:
    """LayerNorm over the last dimension: of tokens `[B, N, D]`, or of heads `[B, H, N, Dh]`.

    Args:
        x: `[..., D]`, floating point, D ≤ 8192. Read without a copy where its rows have at most
            two strides: dense, sliced, transposed or a part of a joint projection.
        weight: `[D]`, in the dtype of `x` or fp32; None: 1.
        bias: `[D]`, as `weight`, and only beside one; None: 0.
        eps: added to the variance, > 0.
        implementation: `triton` or `torch`; None: the first of these that can run.

    Returns:
        `[..., D]` in the dtype of `x`; `triton` keeps the order of its dimensions in memory.
        Differentiable in `x`, `weight` and `bias`.

    Raises:
        TypeError: where an argument is no tensor, or of a dtype that does not fit.
        ValueError: where a shape, a device or eps does not fit, there is a bias without a weight,
            or no implementation has that name.
        UnavailableError: where the named implementation cannot run here.
    """
    check_norm("layer_norm", x, MAX_DIM, eps, weight=weight, bias=bias)
    if bias is not None and weight is None:
        raise ValueError("layer_norm: expected a weight beside the bias, got None")
    if OP.pick(x.device.type, x.dtype, implementation) == "torch":
        return _torch(x, weight, bias, eps)
    y: Tensor = _layer_norm(x, weight, bias, eps)
    return y
