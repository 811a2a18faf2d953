"""The Triton kernel of `qkv_rope_append`, its launch and its ahead-of-time variants.

A program takes 2048 elements of a row's heads, whichever of q, k and v they belong to: one load,
and stores under three masks, so a row is never waited for twice.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dar_kernels.aot import DecoderShape, Shape, Variant
from dar_kernels.pages import LARGEST_CODE, PAGE_SIZE, TINY
from dar_kernels.pages_triton import dependent_launch, encode, kernel_pages, page_variants
from dar_kernels.triton_support import cast, contiguous_last, launch_options, tl, triton

_TINY = tl.constexpr(TINY)
PROGRAM = 2048  # elements of one program: 16 a thread, two 16-byte loads of bf16; not timed


@triton.jit(do_not_specialize=["positions", "num_pages", "max_pages", "heads", "kv_heads"])
def _append_kernel(
    qkv_ptr, cos_ptr, sin_ptr, positions_ptr, table_ptr, q_ptr, keys_ptr, values_ptr,
    key_scales_ptr, value_scales_ptr, stride_xr, stride_page, stride_head, stride_scale_page,
    stride_scale_head, stride_tr, positions, num_pages, max_pages, heads, kv_heads,
    D: tl.constexpr, PAGE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    LARGEST: tl.constexpr, FP8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    dims = tl.arange(0, BLOCK_D)
    pairs = tl.arange(0, BLOCK_D // 2)
    inside = (head < heads + 2 * kv_heads)[:, None] & (dims < D)[None, :]
    x = tl.load(qkv_ptr + row * stride_xr + head[:, None] * D + dims[None, :], inside, other=0.0)

    position = tl.load(positions_ptr + row)
    valid = (position >= 0) & (position < positions) & (position < max_pages * PAGE)
    page = tl.load(table_ptr + row * stride_tr + position // PAGE, mask=valid, other=-1)
    valid = valid & (page >= 0) & (page < num_pages)
    at = position.to(tl.int64) * (D // 2) + pairs
    turning = pairs < tl.where(valid, D // 2, 0)  # none: q of an idle row is zero
    cos = tl.load(cos_ptr + at, mask=turning, other=0.0)[None, :]
    sin = tl.load(sin_ptr + at, mask=turning, other=0.0)[None, :]

    even, odd = tl.split(tl.reshape(x.to(tl.float32), (BLOCK_H, BLOCK_D // 2, 2)))
    turned = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (BLOCK_H, BLOCK_D))
    y = tl.where((head < heads + kv_heads)[:, None], turned, x.to(tl.float32))

    q_at = (row * heads + head[:, None]) * D + dims[None, :]
    q_mask = inside & (head < heads)[:, None]
    tl.store(q_ptr + q_at, cast(y, q_ptr.dtype.element_ty), mask=q_mask)

    written = tl.where(valid, kv_heads, 0)
    key, value = head - heads, head - heads - kv_heads
    is_key = (key >= 0) & (key < written)
    is_value = (value >= 0) & (value < written)
    kv_head = tl.where(value < 0, key, value).to(tl.int64)
    slot = position % PAGE
    at = page.to(tl.int64) * stride_page + kv_head * stride_head + slot * D
    if LARGEST is not None:
        largest = tl.maximum(tl.max(tl.abs(y), axis=1), _TINY)
        y = y * tl.div_rn(LARGEST + tl.zeros_like(largest), largest)[:, None]
        scale = largest * (1 / LARGEST)
        scale_at = page.to(tl.int64) * stride_scale_page + kv_head * stride_scale_head + slot
        tl.store(key_scales_ptr + scale_at, scale, mask=is_key)
        tl.store(value_scales_ptr + scale_at, scale, mask=is_value)
    y = encode(y, keys_ptr.dtype.element_ty, FP8)
    at = at[:, None] + dims[None, :]
    tl.store(keys_ptr + at, y, mask=inside & is_key[:, None])
    tl.store(values_ptr + at, y, mask=inside & is_value[:, None])


def _launch(head_dim: int, page_dtype: torch.dtype, pdl: bool) -> tuple[dict[str, Any], ...]:
    """Constants and options of a launch, and of its ahead-of-time variant."""
    block = triton.next_power_of_2(head_dim)
    constants = {
        "D": head_dim, "PAGE": PAGE_SIZE, "BLOCK_H": max(1, PROGRAM // block), "BLOCK_D": block,
        "LARGEST": LARGEST_CODE.get(page_dtype), "PDL": pdl,
    }  # fmt: skip
    return constants, launch_options(num_warps=4, **({"launch_pdl": True} if pdl else {}))


@torch.library.custom_op(
    "dar::qkv_rope_append", mutates_args=("keys", "values", "key_scales", "value_scales")
)
def qkv_rope_append_triton(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    block_table: Tensor,
    heads: int,
    kv_heads: int,
) -> Tensor:
    R, Dh = len(qkv), keys.shape[3]
    q = torch.empty((R, heads, Dh), dtype=qkv.dtype, device=qkv.device)
    if R == 0:
        return q
    constants, options = _launch(Dh, keys.dtype, dependent_launch(qkv.device))
    page_strides = keys.stride()[:2]
    scale_strides = (0, 0) if key_scales is None else key_scales.stride()[:2]
    keys, values, fp8 = kernel_pages(keys, values)
    qkv, block_table = contiguous_last(qkv), contiguous_last(block_table)
    grid = (R, triton.cdiv(heads + 2 * kv_heads, constants["BLOCK_H"]))
    _append_kernel[grid](
        qkv, cos.contiguous(), sin.contiguous(), positions.contiguous(), block_table, q, keys,
        values, key_scales, value_scales, qkv.stride(0), *page_strides, *scale_strides,
        block_table.stride(0), len(cos), len(keys), block_table.shape[1], heads, kv_heads,
        **constants, FP8=fp8, **options,
    )  # fmt: skip
    return q


@qkv_rope_append_triton.register_fake
def _(qkv, cos, sin, positions, keys, values, key_scales, value_scales, table, heads, kv_heads):
    return qkv.new_empty(len(qkv), heads, keys.shape[3])


def variants(shape: Shape) -> Iterator[Variant]:
    """Rows and heads are run-time arguments: one kernel a head width and dtype of pages."""
    if not isinstance(shape, DecoderShape):
        return
    strides = ("stride_xr", "stride_page", "stride_head", "stride_scale_page", "stride_scale_head")
    counts = ("stride_tr", "positions", "num_pages", "max_pages", "heads", "kv_heads")
    for page in page_variants():
        constants, options = _launch(shape.head_dim, page.dtype, page.constants["PDL"])
        signature = dict.fromkeys((*strides, *counts), "i32") | page.signature
        signature |= dict.fromkeys(("qkv_ptr", "q_ptr"), f"*{page.x}")
        signature |= dict.fromkeys(("cos_ptr", "sin_ptr"), "*fp32")
        signature |= dict.fromkeys(("positions_ptr", "table_ptr"), "*i32")
        yield Variant(
            kernel=_append_kernel,
            signature=signature,
            constants=constants | page.constants,
            aligned=strides,
            options=options,
            architectures=(page.architecture,),
        )
