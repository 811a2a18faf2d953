"""Gradients of adaln_cross_attention.

    dz = dy silu'(z), z = time + s recomputed from P                          2 N HQ D FLOPs
    dV' = P^T dz, dP = dz V'^T                                                4 N HQ D, cuBLAS
    dS = P (dP - sum P dP) / sqrt(Dh), dk = dS^T q, dq from dS k, q recomputed       2 N D D
    dWq = dq^T LN(x), dx = LN backward of dq Wq                                4 N D D, cuBLAS

A picture of tokenizer v1 costs 5.5 GFLOP and 29 MB in bf16, 12 of them in and out of cuBLAS:
6.9 us of arithmetic at 800 TFLOP/s, 8.7 us of memory at 3.35 TB/s. The forward saves P (half of x)
and the mean and 1/std of the rows of x.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from dar_kernels.adaln_cross_attention_forward import launch_output
from dar_kernels.adaln_cross_attention_tiles import (
    BATCHES,
    channels,
    key_offsets,
    query_heads,
    query_tiling,
    rotation,
    row_tiling,
    sizes,
    variant,
)  # fmt: skip
from dar_kernels.aot import DenoiserShape, Variant
from dar_kernels.triton_support import cast, dot, tl, triton


@triton.jit
def _query_backward_kernel(
    x_ptr, stats_ptr, weight_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr, keys_ptr, cos_ptr,
    sin_ptr, probs_ptr, dprobs_ptr, dq_ptr, dkeys_ptr, sums_ptr, M, N, D, H, Q, scale,
    HALF: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, KEYS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """dq before its bias, and over the tile: dk, and the sums behind dbq, dw and db of the norm."""
    blocks, tiles = H // HEADS, tl.cdiv(N, BLOCK_M)
    program = tl.program_id(0)
    head = program % blocks * HEADS
    tile = program // blocks % tiles
    picture = (program // (blocks * tiles)).to(tl.int64)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.minimum(m, N - 1)
    row = picture * N
    even, odd, head_rstd = query_heads(
        x_ptr + row * D, stats_ptr + row, stats_ptr + M + row, weight_ptr, bias_ptr, n, head, D,
        HALF, HEADS, PAIRS, BLOCK_M, BLOCK_K, EVEN_K,
    )  # fmt: skip
    w_even, w_odd = channels(norm_weight_ptr, HALF, PAIRS)
    b_even, b_odd = channels(norm_bias_ptr, HALF, PAIRS)
    cos, sin = rotation(cos_ptr, sin_ptr, n, HALF, PAIRS)

    column = tl.arange(0, HEADS * KEYS)
    key = column % KEYS
    at = n[:, None] * (H * Q) + ((head + column // KEYS) * Q + key)[None, :]
    mask = (m < N)[:, None] & (key < Q)[None, :]
    p = tl.load(probs_ptr + row * (H * Q) + at, mask=mask, other=0.0).to(tl.float32)
    dp = tl.load(dprobs_ptr + row * (H * Q) + at, mask=mask, other=0.0).to(tl.float32)
    p = tl.reshape(p, (BLOCK_M, HEADS, KEYS))
    dp = tl.reshape(dp, (BLOCK_M, HEADS, KEYS))
    ds = p * (dp - tl.sum(p * dp, 2)[:, :, None]) * scale  # zero beyond N and Q, as p is
    ds = cast(tl.reshape(ds, (BLOCK_M, HEADS * KEYS)), keys_ptr.dtype.element_ty)

    offsets, mask = key_offsets(head, Q, HALF, HEADS, PAIRS, KEYS)
    q_even, q_odd = even * w_even + b_even, odd * w_odd + b_odd
    r_even = cast(tl.reshape(q_even * cos - q_odd * sin, (BLOCK_M, HEADS * PAIRS)), ds.dtype)
    r_odd = cast(tl.reshape(q_even * sin + q_odd * cos, (BLOCK_M, HEADS * PAIRS)), ds.dtype)
    zero = tl.zeros([HEADS * KEYS, HEADS * PAIRS], tl.float32)
    dkeys_ptr += (picture * tiles + tile) * (H * Q * 2 * HALF)  # [B, tiles, H, Q, Dh]
    tl.store(dkeys_ptr + offsets, dot(tl.trans(ds), r_even, zero), mask=mask)
    tl.store(dkeys_ptr + offsets + 1, dot(tl.trans(ds), r_odd, zero), mask=mask)

    zero = tl.zeros([BLOCK_M, HEADS * PAIRS], tl.float32)
    keys_ptr += picture * (H * Q * 2 * HALF)
    k_even = tl.load(keys_ptr + offsets, mask=mask, other=0.0)
    k_odd = tl.load(keys_ptr + offsets + 1, mask=mask, other=0.0)
    r_even = tl.reshape(dot(ds, k_even, zero), (BLOCK_M, HEADS, PAIRS))
    r_odd = tl.reshape(dot(ds, k_odd, zero), (BLOCK_M, HEADS, PAIRS))
    d_even, d_odd = r_even * cos + r_odd * sin, r_odd * cos - r_even * sin
    sums_ptr += (picture * tiles + tile) * 3 * D  # [B, tiles, 3, D]
    _store_sums(sums_ptr + D, d_even * even, d_odd * odd, head, HALF, HEADS, PAIRS)
    _store_sums(sums_ptr + 2 * D, d_even, d_odd, head, HALF, HEADS, PAIRS)

    d_even, d_odd = d_even * w_even, d_odd * w_odd
    along = (tl.sum(d_even * even, 2) + tl.sum(d_odd * odd, 2)) / (2 * HALF)
    centre = (tl.sum(d_even, 2) + tl.sum(d_odd, 2)) / (2 * HALF)
    d_even = (d_even - centre[:, :, None] - even * along[:, :, None]) * head_rstd
    d_odd = (d_odd - centre[:, :, None] - odd * along[:, :, None]) * head_rstd
    _store_sums(sums_ptr, d_even, d_odd, head, HALF, HEADS, PAIRS)
    dq = tl.interleave(d_even, d_odd)  # [BLOCK_M, HEADS, 2 PAIRS]
    channel = tl.arange(0, 2 * PAIRS)[None, None, :]
    heads = head + tl.arange(0, HEADS)[None, :, None]
    at = n[:, None, None] * D + heads * (2 * HALF) + channel
    mask = (m < N)[:, None, None] & (channel < 2 * HALF)
    tl.store(dq_ptr + row * D + at, cast(dq, dq_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_sums(ptr, even, odd, head, HALF: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr):
    """Sums over the rows of the tile, into a vector [D] of all heads."""
    pair = tl.arange(0, PAIRS)[None, :]
    at = ((head + tl.arange(0, HEADS)[:, None]) * HALF + pair) * 2
    tl.store(ptr + at, tl.sum(even, 0), mask=pair < HALF)
    tl.store(ptr + at + 1, tl.sum(odd, 0), mask=pair < HALF)


@triton.jit
def _layer_norm_backward_kernel(
    x_ptr, stats_ptr, dnormed_ptr, dx_ptr, normed_ptr, M, D, ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx of LN(x), and LN(x) again for the gradient of Wq."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    mask = (row < M) & (column < D)
    at = row * D + column
    mean = tl.load(stats_ptr + row, mask=row < M, other=0.0)
    rstd = tl.load(stats_ptr + M + row, mask=row < M, other=0.0)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    d = tl.load(dnormed_ptr + at, mask=mask, other=0.0).to(tl.float32)
    normed = (x - mean) * rstd
    along = tl.sum(d * normed, 1)[:, None] / D  # d is zero beyond D
    dx = (d - tl.sum(d, 1)[:, None] / D - normed * along) * rstd
    tl.store(dx_ptr + at, cast(dx, dx_ptr.dtype.element_ty), mask=mask)
    tl.store(normed_ptr + at, cast(normed, normed_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op("dar::adaln_cross_attention_backward", mutates_args=())
def attention_backward(
    dy: Tensor, x: Tensor, q_weight: Tensor, q_bias: Tensor, q_norm_weight: Tensor,
    q_norm_bias: Tensor, keys: Tensor, values_out: Tensor, out_bias: Tensor, time: Tensor,
    cos: Tensor, sin: Tensor, probs: Tensor, stats: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x to time, in their order."""
    (B, N, D), (H, Q) = x.shape, keys.shape[1:3]
    dtype = q_weight.dtype
    dz, z_sums = launch_output(probs, values_out, out_bias, time, dy.contiguous())
    dtime = z_sums.sum(1)  # fp32
    dvalues = (probs.mT @ dz).view(values_out.shape)
    dprobs = dz @ values_out.flatten(1, 2).mT  # [B, N, H Q]

    x = x.contiguous()
    inputs = (q_weight, q_bias, q_norm_weight, q_norm_bias, keys, cos, sin)
    constants, options = query_tiling(B, N, D, H, Q, dtype, True)
    tiles = -(-N // constants["BLOCK_M"])
    dq = probs.new_empty(B * N, D)
    dkeys = probs.new_empty(B, tiles, *keys.shape[1:], dtype=torch.float32)
    sums = probs.new_empty(B, tiles, 3, D, dtype=torch.float32)
    _query_backward_kernel[(B * tiles * (H // constants["HEADS"]),)](
        x, stats, *(t.contiguous() for t in inputs), probs, dprobs, dq, dkeys, sums, B * N, N, D,
        H, Q, (D // H) ** -0.5, **constants, **options,
    )  # fmt: skip

    dnormed, dx, normed = dq @ q_weight, torch.empty_like(x), torch.empty_like(dq)
    constants, options = row_tiling(D)
    _layer_norm_backward_kernel[(-(-B * N // constants["ROWS"]),)](
        x, stats, dnormed, dx, normed, B * N, D, **constants, **options
    )
    by_head = sums[:, :, 1:].sum((0, 1)).view(2, H, D // H)
    return (
        dx, dq.mT @ normed, sums[:, :, 0].sum((0, 1)).to(dtype), by_head[0].sum(0).to(dtype),
        by_head[1].sum(0).to(dtype), dkeys.sum(1).to(dtype), dvalues, dtime.sum(0).to(dtype),
        dtime.to(dtype),
    )  # fmt: skip


@attention_backward.register_fake
def _(
    dy: Tensor, x: Tensor, q_weight: Tensor, q_bias: Tensor, q_norm_weight: Tensor,
    q_norm_bias: Tensor, keys: Tensor, values_out: Tensor, out_bias: Tensor, time: Tensor,
    cos: Tensor, sin: Tensor, probs: Tensor, stats: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    inputs = (
        x, q_weight, q_bias, q_norm_weight, q_norm_bias, keys, values_out, out_bias, time,
    )  # fmt: skip
    return tuple(t.new_empty(t.shape) for t in inputs)


def variants(shape: DenoiserShape) -> Iterator[Variant]:
    """What only the backward launches for this shape."""
    N, D, H, Q = shape.patches, shape.dim, shape.heads, shape.condition_tokens
    for dtype in (torch.bfloat16, torch.float32):
        for B in BATCHES:
            integers = sizes(B, shape)
            tiling = query_tiling(B, N, D, H, Q, dtype, True)
            yield variant(_query_backward_kernel, dtype, integers, tiling)
            yield variant(_layer_norm_backward_kernel, dtype, integers, row_tiling(D))
