"""The Triton kernels of `paged_attention`: one query head, a group of them, the merge of splits.

A program reads its share of one row's pages in tiles, keys and values at once; asynchronous copies
keep two tiles in flight behind the one it works on, 64 KiB where programs are few: without them
ptxas asks for the values only after the keys have come.
"""

from dar_kernels.pages_triton import decode
from dar_kernels.triton_support import cast, dot, tl, triton

_STAGES = tl.constexpr(3)  # two tiles are on their way while one is worked on
_GROUP_STAGES = tl.constexpr(5)  # so they are where a product takes part
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _span(lengths_ptr, row, max_pages, PAGE: tl.constexpr):
    """First and last token of this program's share: the row's pages, evenly over the splits."""
    length = tl.load(lengths_ptr + row)
    length = tl.minimum(tl.maximum(length, 0), max_pages * PAGE)
    share = tl.cdiv(tl.cdiv(length, PAGE), tl.num_programs(2)) * PAGE
    first = tl.program_id(2) * share
    return first, tl.minimum(first + share, length)


@triton.jit
def _locate(table_ptr, tokens, last, num_pages, PAGE: tl.constexpr):
    """Page and slot of tokens, and which exist: before `last`, in a page that there is."""
    page = tl.load(table_ptr + tokens // PAGE, mask=tokens < last, other=-1)
    return page.to(tl.int64), tokens % PAGE, (page >= 0) & (page < num_pages)


@triton.jit
def _online(top, scores):
    """The new maximum, what the sums so far are multiplied by, and the weights; all in base 2."""
    new = tl.maximum(top, tl.max(scores, axis=-1))
    safe = tl.where(new == float("-inf"), 0.0, new)  # nothing seen yet: weights 0, not NaN
    return new, tl.exp2(top - safe), safe


@triton.jit(do_not_specialize=["num_pages", "max_pages"])
def head_kernel(
    q_ptr, keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr, table_ptr, lengths_ptr, out_ptr,
    lse_ptr, stride_qr, stride_qh, stride_page, stride_head, stride_scale_page, stride_scale_head,
    stride_tr, scale, num_pages, max_pages, GROUP: tl.constexpr, D: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, FP8: tl.constexpr,
    SPLIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One query head of one row: vector loads and sums, no matrix units. Grid (H, R, splits)."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    kv_head = (head // GROUP).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    q = tl.load(q_ptr + row * stride_qr + head * stride_qh + dims, mask=dims < D, other=0.0)
    q = q.to(tl.float32) * (scale * _LOG2E)
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    first, last = _span(lengths_ptr, row, max_pages, PAGE)
    for start in tl.range(first, last, BLOCK_N, num_stages=_STAGES):
        tokens = start + tl.arange(0, BLOCK_N)
        page, slot, seen = _locate(table_ptr + row * stride_tr, tokens, last, num_pages, PAGE)
        at = (page * stride_page + kv_head * stride_head + slot * D)[:, None] + dims[None, :]
        mask = seen[:, None] & (dims < D)[None, :]
        k = tl.load(keys_ptr + at, mask=mask, other=0)
        v = tl.load(values_ptr + at, mask=mask, other=0)
        scores = tl.sum(decode(k, FP8) * q[None, :], axis=1)
        scale_at = page * stride_scale_page + kv_head * stride_scale_head + slot
        if key_scales_ptr is not None:
            scores *= tl.load(key_scales_ptr + scale_at, mask=seen, other=0.0)
        scores = tl.where(seen, scores, float("-inf"))
        top, decay, safe = _online(top, scores)
        weights = tl.exp2(scores - safe)
        total = total * decay + tl.sum(weights, axis=0)
        if value_scales_ptr is not None:
            weights *= tl.load(value_scales_ptr + scale_at, mask=seen, other=0.0)
        acc = acc * decay + tl.sum(weights[:, None] * decode(v, FP8), axis=0)
    whole = tl.where(total == 0.0, 1.0, total)
    index = (row * tl.num_programs(0) + head) * tl.num_programs(2) + tl.program_id(2)
    out = cast(acc / whole, out_ptr.dtype.element_ty)
    tl.store(out_ptr + index * D + dims, out, mask=dims < D)
    if SPLIT:
        tl.store(lse_ptr + index, top + tl.log2(whole))


@triton.jit(do_not_specialize=["num_pages", "max_pages"])
def group_kernel(
    q_ptr, keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr, table_ptr, lengths_ptr, out_ptr,
    lse_ptr, stride_qr, stride_qh, stride_page, stride_head, stride_scale_page, stride_scale_head,
    stride_tr, scale, num_pages, max_pages, GROUP: tl.constexpr, D: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    FP8: tl.constexpr, SPLIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The query heads of one KV head of one row, on the matrix units. Grid (Hkv, R, splits)."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    kv_head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    member = tl.arange(0, BLOCK_G)  # GROUP of them are query heads, the others padding
    dims = tl.arange(0, BLOCK_D)
    head = kv_head * GROUP + member
    inside = (member < GROUP)[:, None] & (dims < D)[None, :]
    q_at = row * stride_qr + head[:, None] * stride_qh + dims[None, :]
    q = tl.load(q_ptr + q_at, mask=inside, other=0.0)
    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    first, last = _span(lengths_ptr, row, max_pages, PAGE)
    for start in tl.range(first, last, BLOCK_N, num_stages=_GROUP_STAGES):
        tokens = start + tl.arange(0, BLOCK_N)
        page, slot, seen = _locate(table_ptr + row * stride_tr, tokens, last, num_pages, PAGE)
        at = (page * stride_page + kv_head * stride_head + slot * D)[:, None] + dims[None, :]
        mask = seen[:, None] & (dims < D)[None, :]
        k = tl.load(keys_ptr + at, mask=mask, other=0)
        v = tl.load(values_ptr + at, mask=mask, other=0)
        factor = tl.full([BLOCK_N], 1.0, tl.float32) * (scale * _LOG2E)
        scale_at = page * stride_scale_page + kv_head * stride_scale_head + slot
        if key_scales_ptr is not None:  # codes of int8 and float8 are exact in bf16 and fp16
            factor *= tl.load(key_scales_ptr + scale_at, mask=seen, other=0.0)
            k = cast(decode(k, FP8), q.dtype)
            v = decode(v, FP8)
            v *= tl.load(value_scales_ptr + scale_at, mask=seen, other=0.0)[:, None]
            v = cast(v, q.dtype)
        scores = dot(q, tl.trans(k), tl.zeros([BLOCK_G, BLOCK_N], tl.float32)) * factor[None, :]
        scores = tl.where(seen[None, :], scores, float("-inf"))
        top, decay, safe = _online(top, scores)
        weights = tl.exp2(scores - safe[:, None])
        total = total * decay + tl.sum(weights, axis=1)
        acc = dot(cast(weights, q.dtype), v, acc * decay[:, None])
    whole = tl.where(total == 0.0, 1.0, total)
    heads = tl.num_programs(0) * GROUP
    index = (row * heads + head) * tl.num_programs(2) + tl.program_id(2)
    out = cast(acc / whole[:, None], out_ptr.dtype.element_ty)
    tl.store(out_ptr + index[:, None] * D + dims[None, :], out, mask=inside)
    if SPLIT:
        tl.store(lse_ptr + index, top + tl.log2(whole), mask=member < GROUP)


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(
    partial_ptr, lse_ptr, out_ptr, splits, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out = Σ_s 2^lse[s] partial[s] / Σ_s 2^lse[s] of one query head of one row."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    index = tl.program_id(0).to(tl.int64)
    share = tl.arange(0, BLOCK_S)
    dims = tl.arange(0, BLOCK_D)
    lse = tl.load(lse_ptr + index * splits + share, mask=share < splits, other=float("-inf"))
    at = (index * splits + share[:, None]) * D + dims[None, :]
    inside = (share < splits)[:, None] & (dims < D)[None, :]
    partial = tl.load(partial_ptr + at, mask=inside, other=0.0)
    top = tl.max(lse, axis=0)
    weights = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weights, axis=0)
    out = tl.sum(weights[:, None] * partial, axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + index * D + dims, cast(out, out_ptr.dtype.element_ty), mask=dims < D)
