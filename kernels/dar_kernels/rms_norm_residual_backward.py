"""Backward of rms_norm_residual: dx = dresidual + rstd · (g − x̂ · mean(g·x̂)).

x̂ = residual · rstd, g = dnormed · weight; dweight = Σ dnormed · x̂. Memory bound: reads dnormed,
dresidual and residual, writes dx: 4·M·D·itemsize bytes. Persistent programs each keep a row of
dweight in registers and write it at the end, 4·D bytes a program, summed by one reduction: no
atomics, the same result every time.
"""

import torch
from torch import Tensor

from dar_kernels.aot import Variant
from dar_kernels.rows import matrix_of, persistent_programs, row_blocks
from dar_kernels.triton_support import cast, tl, triton

NUMBERS = 1024  # of a tile at least: a decode step has 2 rows, which two programs should share


@triton.jit
def _rms_norm_residual_backward_kernel(
    dnormed_ptr, dresidual_ptr, residual_ptr, weight_ptr, rstd_ptr, dx_ptr, dweight_ptr,
    stride_residualm, M, D, HAS_DRESIDUAL: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    col = tl.arange(0, BLOCK_D)[None, :]
    weight = tl.load(weight_ptr + col, mask=col < D, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # the next tiles are copied to shared memory while this one is computed
    for tile in tl.range(program, tl.cdiv(M, BLOCK_M), tl.num_programs(0), num_stages=STAGES):
        row = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask = (row < M)[:, None] & (col < D)
        at = row[:, None] * D + col
        residual = tl.load(
            residual_ptr + row[:, None] * stride_residualm + col, mask=mask, other=0.0
        )
        dnormed = tl.load(dnormed_ptr + at, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < M, other=0.0)[:, None]
        x_hat = residual.to(tl.float32) * rstd
        dx_hat = dnormed * weight
        dx = rstd * (dx_hat - x_hat * (tl.sum(dx_hat * x_hat, 1) / D)[:, None])
        if HAS_DRESIDUAL:
            dx += tl.load(dresidual_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, cast(dx, dx_ptr.dtype.element_ty), mask=mask)
        dweight += dnormed * x_hat
    partial = dweight_ptr + program.to(tl.int64) * D + col
    tl.store(partial, tl.sum(dweight, 0)[None, :], mask=col < D)


def _stages(BLOCK_D: int, itemsize: int) -> int:
    """Tiles on the way in the backward loop: fewer where a row is long, for two programs' room."""
    return 3 if BLOCK_D * itemsize <= 4096 else 2


@torch.library.custom_op("dar::rms_norm_residual_backward", mutates_args=())
def rms_norm_residual_backward(
    dnormed: Tensor, dresidual: Tensor | None, residual: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    rows = matrix_of(residual)
    M, D = rows.shape
    blocks, options = row_blocks(D, NUMBERS)
    dx = residual.new_empty(residual.shape)
    programs = persistent_programs(
        dx.device, triton.cdiv(M, blocks["BLOCK_M"]), options["num_warps"]
    )
    partial = dx.new_empty((programs, D), dtype=torch.float32)
    if M:
        dnormed = dnormed.contiguous()
        _rms_norm_residual_backward_kernel[(programs,)](
            dnormed, dnormed if dresidual is None else dresidual.contiguous(), rows,
            weight.contiguous(), rstd, dx, partial, rows.stride(0), M, D,
            HAS_DRESIDUAL=dresidual is not None,
            STAGES=_stages(blocks["BLOCK_D"], dx.itemsize), **blocks, **options,
        )  # fmt: skip
    return dx, partial.sum(0).to(weight.dtype)


@rms_norm_residual_backward.register_fake
def _(
    dnormed: Tensor, dresidual: Tensor | None, residual: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    return residual.new_empty(residual.shape), weight.new_empty(weight.shape)


def backward_variant(D: int, dtype: str, has_dresidual: bool) -> Variant:
    """What it launches for rows of D, every tensor but the statistics in `dtype`."""
    blocks, options = row_blocks(D, NUMBERS)
    tensors = ("dnormed_ptr", "dresidual_ptr", "residual_ptr", "weight_ptr", "dx_ptr")
    stages = _stages(blocks["BLOCK_D"], 4 if dtype == "fp32" else 2)
    return Variant(
        kernel=_rms_norm_residual_backward_kernel,
        signature=dict.fromkeys(tensors, f"*{dtype}")
        | dict.fromkeys(("rstd_ptr", "dweight_ptr"), "*fp32")
        | dict.fromkeys(("stride_residualm", "M", "D"), "i32"),
        constants={"HAS_DRESIDUAL": has_dresidual, "STAGES": stages, **blocks},
        aligned=("stride_residualm", "D"),
        options=options,
    )
