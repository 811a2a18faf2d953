"""What the kernels of adaln_cross_attention share: a tile of queries, tilings, variants.

A tile is BLOCK_M patches of one picture and HEADS heads: 4 D Dh FLOPs a patch and pair of heads.
"""

from collections.abc import Mapping
from typing import Any

import torch

from dar_kernels.aot import DenoiserShape, Variant
from dar_kernels.triton_support import cast, dot, launch_options, tl, triton

Tiling = tuple[dict[str, Any], dict[str, Any]]  # constants and options of a launch
FP32 = ("stats_ptr", "cos_ptr", "sin_ptr", "sums_ptr", "dkeys_ptr")  # whatever the dtype of x
TRITON_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
BATCHES = (1, 32)  # one on each side of what the tilings distinguish

NORM_EPS = 1e-6
_EPS = tl.constexpr(NORM_EPS)


@triton.jit
def query_heads(
    x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, n, head, D, HALF: tl.constexpr,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):  # fmt: skip
    """(even, odd, 1/std): LN_head(LN(x) Wq^T + bq) of HEADS heads, before its scale and shift.

    Pointers of x and its statistics are the picture's: within one, int32 reaches everywhere.
    Even and odd channels come from two products, so that the rotation needs no shuffle:
    [BLOCK_M, HEADS, PAIRS] twice, zero where PAIRS pads Dh / 2.
    """
    mean = tl.load(mean_ptr + n)[:, None]
    rstd = tl.load(rstd_ptr + n)[:, None]
    column = tl.arange(0, HEADS * PAIRS)
    pair = tl.minimum(column % PAIRS, HALF - 1)
    channel = ((head + column // PAIRS) * HALF + pair) * 2  # the even one
    k = tl.arange(0, BLOCK_K)
    x_tile = x_ptr + n[:, None] * D + k[None, :]
    w_tile = weight_ptr + channel[None, :] * D + k[:, None]
    even = tl.zeros([BLOCK_M, HEADS * PAIRS], tl.float32)
    odd = tl.zeros([BLOCK_M, HEADS * PAIRS], tl.float32)
    for start in range(0, D, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_tile + start)
            w_even = tl.load(w_tile + start)
            w_odd = tl.load(w_tile + D + start)
        else:
            inside = start + k < D
            x = tl.load(x_tile + start, mask=inside[None, :], other=0.0)
            w_even = tl.load(w_tile + start, mask=inside[:, None], other=0.0)
            w_odd = tl.load(w_tile + D + start, mask=inside[:, None], other=0.0)
        x = cast((x.to(tl.float32) - mean) * rstd, w_even.dtype)
        even = dot(x, w_even, even)
        odd = dot(x, w_odd, odd)
    even += tl.load(bias_ptr + channel).to(tl.float32)[None, :]
    odd += tl.load(bias_ptr + channel + 1).to(tl.float32)[None, :]
    even = _padded(tl.reshape(even, (BLOCK_M, HEADS, PAIRS)), HALF, PAIRS)
    odd = _padded(tl.reshape(odd, (BLOCK_M, HEADS, PAIRS)), HALF, PAIRS)
    centre = ((tl.sum(even, 2) + tl.sum(odd, 2)) / (2 * HALF))[:, :, None]
    even = _padded(even - centre, HALF, PAIRS)
    odd = _padded(odd - centre, HALF, PAIRS)
    variance = (tl.sum(even * even, 2) + tl.sum(odd * odd, 2)) / (2 * HALF)
    head_rstd = tl.rsqrt(variance + _EPS)[:, :, None]
    return even * head_rstd, odd * head_rstd, head_rstd


@triton.jit
def _padded(x, HALF: tl.constexpr, PAIRS: tl.constexpr):
    """Zero in the columns that only pad Dh / 2."""
    if PAIRS != HALF:
        x = tl.where((tl.arange(0, PAIRS) < HALF)[None, None, :], x, 0.0)
    return x


@triton.jit
def channels(ptr, HALF: tl.constexpr, PAIRS: tl.constexpr):
    """Even and odd values of a vector [Dh], [1, 1, PAIRS] each, zero in the padding."""
    pair = tl.arange(0, PAIRS)
    even = tl.load(ptr + 2 * pair, mask=pair < HALF, other=0.0).to(tl.float32)
    odd = tl.load(ptr + 2 * pair + 1, mask=pair < HALF, other=0.0).to(tl.float32)
    return even[None, None, :], odd[None, None, :]


@triton.jit
def rotation(cos_ptr, sin_ptr, n, HALF: tl.constexpr, PAIRS: tl.constexpr):
    """cos and sin of rows of the tables [N, Dh / 2], [BLOCK_M, 1, PAIRS] each."""
    at = n[:, None] * HALF + tl.minimum(tl.arange(0, PAIRS), HALF - 1)[None, :]
    return tl.load(cos_ptr + at)[:, None, :], tl.load(sin_ptr + at)[:, None, :]


@triton.jit
def key_offsets(
    first, Q, HALF: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, KEYS: tl.constexpr
):
    """Offsets and mask of the even channels of HEADS heads' keys [H, Q, Dh], block diagonal.

    [HEADS KEYS, HEADS PAIRS]: one product serves all heads; the zeros cost HEADS times a product
    that is 1/24 of the projection.
    """
    row = tl.arange(0, HEADS * KEYS)[:, None]
    column = tl.arange(0, HEADS * PAIRS)[None, :]
    key, pair, head = row % KEYS, column % PAIRS, row // KEYS
    mask = (head == column // PAIRS) & (key < Q) & (pair < HALF)
    return ((first + head) * Q + key) * (2 * HALF) + 2 * pair, mask


def query_tiling(
    B: int, N: int, D: int, H: int, Q: int, dtype: torch.dtype, backward: bool
) -> Tiling:
    """For kernels of queries; chosen from AOT register counts, not timed.

    fp32 has no matrix unit: its operands live in registers, so tiles are small. The backward of two
    heads at once spills on sm_80. A forward too small for 128 multiprocessors takes half the rows.
    """
    half = D // H // 2
    keys = max(16, triton.next_power_of_2(Q))
    heads, block_k = 1, 64
    if dtype == torch.float32:
        rows, warps, block_k = (32 if keys <= 32 else 16), (8 if backward else 4), 32
    elif keys > 32:
        rows, warps = 64, 8
    elif backward:
        rows = 128 if N > 64 else 64
        warps = rows // 16
    else:
        heads = 2 if H % 2 == 0 else 1
        rows = 128 if B * -(-N // 128) * (H // heads) >= 128 else 64
        warps = rows // 16
    constants = {
        "HALF": half, "HEADS": heads, "PAIRS": max(16, triton.next_power_of_2(half)), "KEYS": keys,
        "BLOCK_M": rows, "BLOCK_K": block_k, "EVEN_K": D % block_k == 0,
    }  # fmt: skip
    return constants, launch_options(num_warps=warps, num_stages=3)


def row_tiling(D: int) -> Tiling:
    """For kernels that keep whole rows in registers: 32 values a thread."""
    block_d = triton.next_power_of_2(D)
    return {"ROWS": max(1, 4096 // block_d), "BLOCK_D": block_d}, launch_options(num_warps=4)


def sizes(B: int, shape: DenoiserShape) -> dict[str, int]:
    """Every integer argument that a kernel here may have."""
    N, D, H, Q = shape.patches, shape.dim, shape.heads, shape.condition_tokens
    strides = {"stride_vb": H * Q * D, "stride_vh": Q * D}
    return {"M": B * N, "N": N, "D": D, "H": H, "Q": Q, "HQ": H * Q} | strides


def variant(
    kernel: Any,
    dtype: torch.dtype,
    integers: Mapping[str, int],
    tiling: Tiling,
    none: tuple[str, ...] = (),
) -> Variant:
    """A launch of `kernel`, as Triton specialises it; `none`: pointers that are not passed."""
    constants, options = tiling
    used = {n: v for n, v in integers.items() if n in kernel.arg_names and n not in constants}
    pointers = [n for n in kernel.arg_names if n.endswith("_ptr") and n not in none]
    signature = {n: "*fp32" if n in FP32 else f"*{TRITON_NAMES[dtype]}" for n in pointers}
    signature |= dict.fromkeys((n for n, v in used.items() if v != 1), "i32")
    if "scale" in kernel.arg_names:
        signature["scale"] = "fp32"
    return Variant(
        kernel=kernel,
        signature=signature,
        constants=constants | {n: 1 for n, v in used.items() if v == 1} | dict.fromkeys(none),
        aligned=tuple(n for n, v in used.items() if v % 16 == 0),
        options=options,
    )
