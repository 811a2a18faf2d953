"""The kernels of adaln_modulate: statistics of every row, then a product with LN as its epilogue.

On sm_90 the product starts while the statistics are still computed and waits for them only before
its epilogue (programmatic dependent launch).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dar_kernels.aot import DenoiserShape, Shape, Variant
from dar_kernels.layer_norm_rows import EPS, row_launch, row_statistics
from dar_kernels.triton_support import cast, dot, launch_options, tl, triton

LARGE_ROWS = 4096  # four pictures of 1024 patches: from here on large tiles fill every chip


@triton.jit
def _adaln_statistics_kernel(
    x_ptr, statistics_ptr, stride_xm, M, D, eps, PDL: tl.constexpr, BLOCK_D: tl.constexpr
):
    if PDL:  # the products may start: they wait for these numbers in their epilogue
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    mask = cols < D
    x = tl.load(x_ptr + row * stride_xm + cols, mask=mask, other=0.0).to(tl.float32)
    mean, left, rstd = row_statistics(x, mask, D, eps)
    tl.store(statistics_ptr + row, mean)
    tl.store(statistics_ptr + M + row, left)
    tl.store(statistics_ptr + 2 * M + row, rstd)


@triton.jit
def _adaln_modulate_kernel(
    features_ptr, weight_ptr, bias_ptr, x_ptr, statistics_ptr, modulated_ptr, rest_ptr,
    stride_fm, stride_wn, stride_xm, M, D,
    EVEN_K: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # All column tiles of some rows, then those of the next: features come from memory once, and the
    # whole weight stays in the second-level cache (7 MB at D = 768 in bf16).
    pairs = tl.cdiv(D, BLOCK_N)
    tiles = pairs + tl.cdiv(4 * D, 2 * BLOCK_N)
    tile = tl.program_id(0) % tiles
    # Two accumulators a program: the same columns of shift and scale, or neighbours of the rest.
    pair = tile < pairs
    start = tl.where(pair, tile * BLOCK_N, 2 * D + (tile - pairs) * 2 * BLOCK_N)
    cols_0 = start + tl.arange(0, BLOCK_N)
    cols_1 = cols_0 + tl.where(pair, D, BLOCK_N)
    mask_0 = cols_0 < tl.where(pair, D, 6 * D)
    mask_1 = cols_1 < tl.where(pair, 2 * D, 6 * D)
    rows = (tl.program_id(0) // tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = rows < M
    rows = tl.minimum(rows, M - 1).to(tl.int64)  # rows and columns outside repeat the last one
    safe_0 = tl.minimum(cols_0, 6 * D - 1).to(tl.int64)
    safe_1 = tl.minimum(cols_1, 6 * D - 1).to(tl.int64)
    ks = tl.arange(0, BLOCK_K)
    features_ptrs = features_ptr + rows[:, None] * stride_fm + ks[None, :]
    weight_ptrs_0 = weight_ptr + safe_0[None, :] * stride_wn + ks[:, None]
    weight_ptrs_1 = weight_ptr + safe_1[None, :] * stride_wn + ks[:, None]
    bias_0 = tl.load(bias_ptr + cols_0, mask=mask_0, other=0.0).to(tl.float32)
    bias_1 = tl.load(bias_ptr + cols_1, mask=mask_1, other=0.0).to(tl.float32)
    acc_0 = tl.broadcast_to(bias_0[None, :], [BLOCK_M, BLOCK_N])
    acc_1 = tl.broadcast_to(bias_1[None, :], [BLOCK_M, BLOCK_N])
    for k in range(0, D, BLOCK_K):
        if EVEN_K:
            features = tl.load(features_ptrs + k)
            weight_0 = tl.load(weight_ptrs_0 + k)
            weight_1 = tl.load(weight_ptrs_1 + k)
        else:
            mask_k = ks < D - k
            features = tl.load(features_ptrs + k, mask=mask_k[None, :], other=0.0)
            weight_0 = tl.load(weight_ptrs_0 + k, mask=mask_k[:, None], other=0.0)
            weight_1 = tl.load(weight_ptrs_1 + k, mask=mask_k[:, None], other=0.0)
        acc_0 = dot(features, weight_0, acc_0)
        acc_1 = dot(features, weight_1, acc_1)
    dtype = modulated_ptr.dtype.element_ty
    store_0 = mask_m[:, None] & mask_0[None, :]
    store_1 = mask_m[:, None] & mask_1[None, :]
    if pair:
        if PDL:
            tl.extra.cuda.gdc_wait()
        mean = tl.load(statistics_ptr + rows)[:, None]
        left = tl.load(statistics_ptr + M + rows)[:, None]
        rstd = tl.load(statistics_ptr + 2 * M + rows)[:, None]
        x = tl.load(x_ptr + rows[:, None] * stride_xm + cols_0[None, :], mask=store_0, other=0.0)
        modulated = (x.to(tl.float32) - mean - left) * rstd * (1.0 + acc_1) + acc_0
        out = rows[:, None] * D + cols_0[None, :]
        tl.store(modulated_ptr + out, cast(modulated, dtype), mask=store_0)
    else:
        rest_ptrs = rest_ptr + rows[:, None] * (4 * D) - 2 * D
        tl.store(rest_ptrs + cols_0[None, :], cast(acc_0, dtype), mask=store_0)
        tl.store(rest_ptrs + cols_1[None, :], cast(acc_1, dtype), mask=store_1)


def _tiles(M: int, D: int, itemsize: int, hopper: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tiles and launch options of the product; chosen from AOT register counts, not timed.

    128 rows by 2 x 128 columns take the fewest bytes a FLOP from the second-level cache, but need
    wgmma: elsewhere they spill. With few rows such tiles would leave half of the multiprocessors
    idle in the last wave.
    """
    num_warps, num_stages = 4, 3
    if itemsize == 4:
        BLOCK_M, BLOCK_N, BLOCK_K = 64, 32, 32
    elif M < LARGE_ROWS:
        BLOCK_M, BLOCK_N, BLOCK_K = 64, 64, 64
    elif hopper and D % 128 == 0:
        BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages = 128, 128, 64, 8, 4
    else:
        BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages = 128, 64, 32, 8, 4
    constants = {
        "EVEN_K": D % BLOCK_K == 0, "PDL": hopper,
        "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K,
    }  # fmt: skip
    more = {"launch_pdl": True} if hopper else {}
    return constants, launch_options(num_warps=num_warps, num_stages=num_stages, **more)


def launch(
    x: Tensor, features: Tensor, weight: Tensor, bias: Tensor, modulated: Tensor, rest: Tensor
) -> None:
    """Fill modulated `[M, D]` and rest `[M, 4 D]` from rows `[M, D]`; the outputs are dense."""
    M, D = x.shape
    statistics = torch.empty((3, M), dtype=torch.float32, device=x.device)
    hopper = x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
    block, options = row_launch(D)
    _adaln_statistics_kernel[(M,)](
        x, statistics, x.stride(0), M, D, EPS, PDL=hopper, BLOCK_D=block, **options
    )
    constants, options = _tiles(M, D, x.itemsize, hopper)
    BLOCK_M, BLOCK_N = constants["BLOCK_M"], constants["BLOCK_N"]
    tiles = triton.cdiv(D, BLOCK_N) + triton.cdiv(4 * D, 2 * BLOCK_N)
    _adaln_modulate_kernel[(triton.cdiv(M, BLOCK_M) * tiles,)](
        features, weight, bias, x, statistics, modulated, rest,
        features.stride(0), weight.stride(0), x.stride(0), M, D, **constants, **options,
    )  # fmt: skip


def variants(shape: Shape) -> Iterator[Variant]:
    """What is launched for a denoiser of this shape; nothing for a decoder."""
    if not isinstance(shape, DenoiserShape):
        return
    D = shape.dim
    sizes = {"M": "i32", "D": "i32"}
    block, options = row_launch(D)
    for dtype, itemsize, rows in (("bf16", 2, LARGE_ROWS), ("bf16", 2, 1), ("fp32", 4, 1)):
        for hopper in (False, True):
            yield Variant(
                kernel=_adaln_statistics_kernel,
                signature={"x_ptr": f"*{dtype}", "statistics_ptr": "*fp32", "stride_xm": "i32"}
                | sizes
                | {"eps": "fp32"},
                constants={"PDL": hopper, "BLOCK_D": block},
                aligned=("stride_xm", "M", "D"),
                options=options,
                architectures=(90,) if hopper else (80,),
            )
            names = ("features", "weight", "bias", "x", "modulated", "rest")
            strides = ("stride_fm", "stride_wn", "stride_xm")
            constants, tile_options = _tiles(rows, D, itemsize, hopper)
            yield Variant(
                kernel=_adaln_modulate_kernel,
                signature={f"{n}_ptr": f"*{dtype}" for n in names}
                | {"statistics_ptr": "*fp32"}
                | dict.fromkeys(strides, "i32")
                | sizes,
                constants=constants,
                aligned=(*strides, "M", "D"),
                options=tile_options,
                architectures=(90,) if hopper else (80,),
            )
