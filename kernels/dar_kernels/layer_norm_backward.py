"""Backward of layer_norm: dx = rstd · (g − mean(g) − x̂ · mean(g · x̂)), g = dy · weight.

x̂ = (x − mean) · rstd; dweight = Σ dy · x̂, dbias = Σ dy. Memory bound: reads x and dy, writes dx:
3·M·D·itemsize bytes. Persistent programs each keep a row of dweight and dbias in registers and
write them at the end, 8·D bytes a program, summed by one reduction: no atomics, the same result
every time.
"""

import torch
from torch import Tensor

from dar_kernels.aot import Variant
from dar_kernels.rows import empty_in_order, memory_order, persistent_programs, row_blocks, rows_of
from dar_kernels.triton_support import cast, tl, triton

NUMBERS = 1024  # of a tile at least: twice as many need 168 registers, which is three programs
STAGES = 3  # two tiles on the way while one is computed


@triton.jit
def row_offset(row, inner, stride_outer, stride_inner):
    """Where a row begins (rows.py); the division stays in 32 bits."""
    outer = row // inner
    return outer.to(tl.int64) * stride_outer + (row - outer * inner).to(tl.int64) * stride_inner


@triton.jit
def row_mean(x, D):
    """Rounded once: an approximate division would leave rows of equal numbers a variance."""
    return tl.div_rn(tl.sum(x, 1), D * 1.0)


@triton.jit
def _layer_norm_backward_kernel(
    dy_ptr, x_ptr, weight_ptr, dx_ptr, dweight_ptr, dbias_ptr, inner_dy, stride_dyo, stride_dyi,
    inner_x, stride_xo, stride_xi, M, D, eps, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    STAGES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    col = tl.arange(0, BLOCK_D)[None, :]
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + col, mask=col < D, other=0.0).to(tl.float32)
        dweight = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        dbias = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # the next tiles are copied to shared memory while this one is computed
    for tile in tl.range(program, tl.cdiv(M, BLOCK_M), tl.num_programs(0), num_stages=STAGES):
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (row < M)[:, None] & (col < D)
        x_at = row_offset(row, inner_x, stride_xo, stride_xi)[:, None] + col
        dy_at = row_offset(row, inner_dy, stride_dyo, stride_dyi)[:, None] + col
        x = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + dy_at, mask=mask, other=0.0).to(tl.float32)
        centred = tl.where(mask, x - row_mean(x, D)[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)[:, None]
        x_hat = centred * rstd
        if HAS_WEIGHT:
            dweight += dy * x_hat
            if HAS_BIAS:
                dbias += dy
            dy *= weight
        mean = (tl.sum(dy, 1) / D)[:, None]
        dx = rstd * (dy - mean - x_hat * (tl.sum(dy * x_hat, 1) / D)[:, None])
        dx_at = row.to(tl.int64)[:, None] * D + col
        tl.store(dx_ptr + dx_at, cast(dx, dx_ptr.dtype.element_ty), mask=mask)
    partial = program.to(tl.int64) * D + col
    if HAS_WEIGHT:
        tl.store(dweight_ptr + partial, tl.sum(dweight, 0)[None, :], mask=col < D)
    if HAS_BIAS:
        tl.store(dbias_ptr + partial, tl.sum(dbias, 0)[None, :], mask=col < D)


@torch.library.custom_op("dar::layer_norm_backward", mutates_args=())
def layer_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, has_bias: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """dx, and the gradients of weight and bias as `[2, D]` fp32 (`[0, D]` where there is none)."""
    dx = empty_in_order(x)
    D = x.shape[-1]
    M = x.numel() // D
    order = memory_order(x)
    blocks, options = row_blocks(D, NUMBERS)
    programs = persistent_programs(
        x.device, triton.cdiv(M, blocks["BLOCK_M"]), options["num_warps"]
    )
    planes = 0 if weight is None else 1 + has_bias
    partial = x.new_empty((planes, programs, D), dtype=torch.float32)
    if M:
        rows, drows = rows_of(x, order), rows_of(dy, order)
        _layer_norm_backward_kernel[(programs,)](
            drows.data, rows.data, x if weight is None else weight.contiguous(), dx,
            partial[0] if planes else partial, partial[-1] if planes else partial, *drows[1:],
            *rows[1:], M, D, eps, HAS_WEIGHT=weight is not None, HAS_BIAS=has_bias, STAGES=STAGES,
            **blocks, **options,
        )  # fmt: skip
    return dx, partial.sum(1)


@layer_norm_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor | None, has_bias: bool, eps: float
) -> tuple[Tensor, Tensor]:
    planes = 0 if weight is None else 1 + has_bias
    return empty_in_order(x), x.new_empty((planes, x.shape[-1]), dtype=torch.float32)


def backward_variant(D: int, dtype: str, affine: str | None) -> Variant:
    """What it launches for dense rows of D in `dtype`, weight and bias in `affine`."""
    blocks, options = row_blocks(D, NUMBERS)
    strides = ("stride_dyo", "stride_dyi", "stride_xo", "stride_xi")
    return Variant(
        kernel=_layer_norm_backward_kernel,
        signature=dict.fromkeys(("dy_ptr", "x_ptr", "dx_ptr"), f"*{dtype}")
        | {"weight_ptr": f"*{affine or dtype}", "dweight_ptr": "*fp32", "dbias_ptr": "*fp32"}
        | dict.fromkeys((*strides, "M", "D"), "i32")
        | {"eps": "fp32"},
        constants={"inner_dy": 1, "inner_x": 1, "STAGES": STAGES, **blocks}
        | {"HAS_WEIGHT": affine is not None, "HAS_BIAS": affine is not None},
        aligned=(*strides, "D"),
        options=options,
    )
