"""The forward launches of adaln_cross_attention: statistics of rows, P, and y (or dz) from P."""

from collections.abc import Iterator

import torch
from torch import Tensor

from dar_kernels.adaln_cross_attention_tiles import (
    BATCHES,
    NORM_EPS,
    Tiling,
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
from dar_kernels.triton_support import cast, dot, launch_options, tl, triton

_EPS = tl.constexpr(NORM_EPS)


@triton.jit
def _row_stats_kernel(x_ptr, stats_ptr, M, D, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Mean and 1/std of each row: stats [2, M]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)[None, :]
    mask = (row < M)[:, None] & (column < D)
    x = tl.load(x_ptr + row[:, None] * D + column, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1) / D
    mean += tl.sum(tl.where(mask, x - mean[:, None], 0.0), 1) / D  # what the first sum rounded off
    x = tl.where(mask, x - mean[:, None], 0.0)
    tl.store(stats_ptr + row, mean, mask=row < M)
    tl.store(stats_ptr + M + row, tl.rsqrt(tl.sum(x * x, 1) / D + _EPS), mask=row < M)


@triton.jit
def _probabilities_kernel(
    x_ptr, stats_ptr, weight_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr, keys_ptr, cos_ptr,
    sin_ptr, probs_ptr, M, N, D, H, Q, scale, HALF: tl.constexpr, HEADS: tl.constexpr,
    PAIRS: tl.constexpr, KEYS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):  # fmt: skip
    """P of BLOCK_M patches of one picture and HEADS heads."""
    blocks, tiles = H // HEADS, tl.cdiv(N, BLOCK_M)
    program = tl.program_id(0)  # heads first: neighbours read the same rows of x
    head = program % blocks * HEADS
    tile = program // blocks % tiles
    picture = (program // (blocks * tiles)).to(tl.int64)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.minimum(m, N - 1)  # rows beyond N repeat the last and are not stored
    row = picture * N
    even, odd, _ = query_heads(
        x_ptr + row * D, stats_ptr + row, stats_ptr + M + row, weight_ptr, bias_ptr, n, head, D,
        HALF, HEADS, PAIRS, BLOCK_M, BLOCK_K, EVEN_K,
    )  # fmt: skip
    w_even, w_odd = channels(norm_weight_ptr, HALF, PAIRS)
    b_even, b_odd = channels(norm_bias_ptr, HALF, PAIRS)
    cos, sin = rotation(cos_ptr, sin_ptr, n, HALF, PAIRS)
    even, odd = even * w_even + b_even, odd * w_odd + b_odd
    even, odd = even * cos - odd * sin, even * sin + odd * cos

    offsets, mask = key_offsets(head, Q, HALF, HEADS, PAIRS, KEYS)
    keys_ptr += picture * (H * Q * 2 * HALF)
    k_even = tl.load(keys_ptr + offsets, mask=mask, other=0.0)
    k_odd = tl.load(keys_ptr + offsets + 1, mask=mask, other=0.0)
    even = cast(tl.reshape(even, (BLOCK_M, HEADS * PAIRS)), k_even.dtype)
    odd = cast(tl.reshape(odd, (BLOCK_M, HEADS * PAIRS)), k_even.dtype)
    scores = tl.zeros([BLOCK_M, HEADS * KEYS], tl.float32)
    scores = dot(even, tl.trans(k_even), scores)
    scores = dot(odd, tl.trans(k_odd), scores)
    scores = tl.reshape(scores * scale, (BLOCK_M, HEADS, KEYS))
    key = tl.arange(0, KEYS)[None, None, :]
    scores = tl.where(key < Q, scores, float("-inf"))
    p = tl.exp(scores - tl.max(scores, 2)[:, :, None])
    p = tl.reshape(p / tl.sum(p, 2)[:, :, None], (BLOCK_M, HEADS * KEYS))

    column = tl.arange(0, HEADS * KEYS)
    key = column % KEYS
    at = n[:, None] * (H * Q) + ((head + column // KEYS) * Q + key)[None, :]
    mask = (m < N)[:, None] & (key < Q)[None, :]
    tl.store(probs_ptr + row * (H * Q) + at, cast(p, probs_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _output_kernel(
    probs_ptr, values_ptr, bias_ptr, time_ptr, dy_ptr, out_ptr, sums_ptr, N, D, HQ, stride_vb,
    stride_vh, Q: tl.constexpr, BACKWARD: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """silu(z), z = time + bias + P V'; BACKWARD: dz = dy silu'(z) and its sums over the tile."""
    blocks, tiles = tl.cdiv(D, BLOCK_D), tl.cdiv(N, BLOCK_M)
    program = tl.program_id(0)  # columns first: neighbours read the same rows of P
    tile = program // blocks % tiles
    picture = (program // (blocks * tiles)).to(tl.int64)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.minimum(m, N - 1)[:, None]  # rows beyond N repeat the last and are not stored
    d = program % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < D
    k = tl.arange(0, BLOCK_K)
    values_ptr += picture * stride_vb
    probs_ptr += picture * N * HQ
    z = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, HQ, BLOCK_K):
        at = start + k
        offset = (at // Q).to(tl.int64) * stride_vh + at % Q * D  # heads may lie far apart
        if EVEN_K:
            p = tl.load(probs_ptr + n * HQ + at[None, :])
            v = tl.load(values_ptr + offset[:, None] + d[None, :])
        else:
            some = at < HQ
            p = tl.load(probs_ptr + n * HQ + at[None, :], mask=some[None, :], other=0.0)
            some_v = some[:, None] & inside[None, :]
            v = tl.load(values_ptr + offset[:, None] + d[None, :], mask=some_v, other=0.0)
        z = dot(p, v, z)
    shift = tl.load(bias_ptr + d, mask=inside, other=0.0).to(tl.float32)
    shift += tl.load(time_ptr + picture * D + d, mask=inside, other=0.0).to(tl.float32)
    z += shift[None, :]
    gate = tl.sigmoid(tl.maximum(z, -80.0))  # exp stays finite; silu is -1e-33 there
    mask = (m < N)[:, None] & inside[None, :]
    at = n * D + d[None, :]
    out_ptr += picture * N * D
    if BACKWARD:
        dy = tl.load(dy_ptr + picture * N * D + at, mask=mask, other=0.0).to(tl.float32)
        out = dy * gate * (1.0 + z * (1.0 - gate))
        sums = sums_ptr + (picture * tiles + tile) * D + d
        tl.store(sums, tl.sum(out, 0), mask=inside)
    else:
        out = z * gate
    tl.store(out_ptr + at, cast(out, out_ptr.dtype.element_ty), mask=mask)


def _output_tiling(
    B: int, N: int, D: int, H: int, Q: int, dtype: torch.dtype, backward: bool
) -> Tiling:
    """Chosen from AOT register counts, not timed: wide tiles where they fill the chip."""
    narrow = dtype == torch.float32
    wide = not narrow and D % 128 == 0 and B * -(-N // 128) * (D // 128) >= 128
    block, block_d = (128, 128) if wide else (64, 64)
    block_k = 64 if not narrow and H * Q % 64 == 0 else 32
    constants = {
        "Q": Q, "BACKWARD": backward, "BLOCK_M": block, "BLOCK_D": block_d, "BLOCK_K": block_k,
        "EVEN_K": H * Q % block_k == 0 and D % block_d == 0,
    }  # fmt: skip
    return constants, launch_options(num_warps=8 if wide else 4, num_stages=3)


def launch_probabilities(
    x: Tensor, q_weight: Tensor, q_bias: Tensor, q_norm_weight: Tensor, q_norm_bias: Tensor,
    keys: Tensor, cos: Tensor, sin: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """P `[B, N, H Q]`; mean and 1/std of the rows of x, `[2, B N]` fp32."""
    (B, N, D), (H, Q, head_dim) = x.shape, keys.shape[1:]
    x = x.contiguous()
    inputs = (q_weight, q_bias, q_norm_weight, q_norm_bias, keys, cos, sin)
    stats = x.new_empty(2, B * N, dtype=torch.float32)
    probs = q_weight.new_empty(B, N, H * Q)
    constants, options = row_tiling(D)
    programs = -(-B * N // constants["ROWS"])
    _row_stats_kernel[(programs,)](x, stats, B * N, D, **constants, **options)
    constants, options = query_tiling(B, N, D, H, Q, q_weight.dtype, False)
    programs = B * -(-N // constants["BLOCK_M"]) * (H // constants["HEADS"])
    _probabilities_kernel[(programs,)](
        x, stats, *(t.contiguous() for t in inputs), probs, B * N, N, D, H, Q, head_dim**-0.5,
        **constants, **options,
    )  # fmt: skip
    return probs, stats


def launch_output(
    probs: Tensor, values_out: Tensor, out_bias: Tensor, time: Tensor, dy: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y `[B, N, D]`; or dz, and its sums over tiles of rows, `[B, tiles, D]` fp32 (empty for y)."""
    B, N, HQ = probs.shape
    H, Q, D = values_out.shape[1:]
    if values_out.stride()[2:] != (D, 1):
        values_out = values_out.contiguous()
    constants, options = _output_tiling(B, N, D, H, Q, probs.dtype, dy is not None)
    tiles = -(-N // constants["BLOCK_M"])
    out = probs.new_empty(B, N, D)
    sums = probs.new_empty(0 if dy is None else B, tiles, D, dtype=torch.float32)
    _output_kernel[(B * tiles * -(-D // constants["BLOCK_D"]),)](
        probs, values_out, out_bias.contiguous(), time.contiguous(), dy, out, sums, N, D, HQ,
        *values_out.stride()[:2], **constants, **options,
    )  # fmt: skip
    return out, sums


def variants(shape: DenoiserShape) -> Iterator[Variant]:
    """What is launched for this shape, the output product of the backward included."""
    N, D, H, Q = shape.patches, shape.dim, shape.heads, shape.condition_tokens
    for dtype in (torch.bfloat16, torch.float32):
        for B in BATCHES:
            integers, to = sizes(B, shape), (B, N, D, H, Q, dtype)
            yield variant(_row_stats_kernel, dtype, integers, row_tiling(D))
            yield variant(_probabilities_kernel, dtype, integers, query_tiling(*to, False))
            tiling = _output_tiling(*to, False)
            yield variant(_output_kernel, dtype, integers, tiling, none=("dy_ptr",))
            yield variant(_output_kernel, dtype, integers, _output_tiling(*to, True))
