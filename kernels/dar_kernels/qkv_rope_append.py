"""q, k, v = split(qkv); q, k = RoPE(q, k) at positions[r]; k, v → page, slot of that position.

RoPE rotates the interleaved pairs (0, 1), (2, 3), …: (a, b) → (a cos − b sin, a sin + b cos), fp32
inside. int8 and float8 pages are quantised on the way: a scale a head (see `pages`).
Memory bound and small: reads and writes R·(H + 2·Hkv)·Dh elements each, 24 KiB for both guidance
rows of prior L, so one launch is its whole cost. Source: Su et al., RoFormer (2021); the paged
layout is vLLM's (Kwon et al., 2023).
"""

import torch
from torch import Tensor

from dar_kernels.checks import Dim, check_tensor, readable
from dar_kernels.dispatch import Op
from dar_kernels.implementations import by_torch, by_triton
from dar_kernels.pages import (
    MAX_HEAD_DIM,
    PAGE_SIZE,
    Pages,
    check_entries,
    check_pages,
    quantise,
)  # fmt: skip
from dar_kernels.qkv_rope_append_triton import qkv_rope_append_triton, variants


def qkv_rope_append_ref(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    pages: Pages,
    block_table: Tensor,
    heads: int,
    kv_heads: int,
) -> Tensor:
    """The definition, in whatever dtype it is given; in fp64 it is the truth the tests use.

    No value is read by the host: it can be traced and captured.
    """
    Dh = pages.keys.shape[3]
    x = qkv.unflatten(-1, (heads + 2 * kv_heads, Dh))  # [R, H + 2·Hkv, Dh]
    used = positions.clamp(0, min(len(cos), block_table.shape[1] * PAGE_SIZE) - 1).long()
    page = block_table.gather(1, used[:, None] // PAGE_SIZE).squeeze(1).long()
    valid = (used == positions) & (page >= 0) & (page < len(pages.keys))  # [R]
    c, s = cos[used, None], sin[used, None]  # [R, 1, Dh / 2]
    even, odd = x[:, : heads + kv_heads].unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * c - odd * s, even * s + odd * c), dim=-1).flatten(-2)
    q, k = rotated.split((heads, kv_heads), dim=1)

    # A row that writes nothing repeats the first that writes: the same values to the same slot.
    row = torch.where(valid, torch.arange(len(x), device=x.device), valid.int().argmax())
    page, slot = page[row].clamp(0, len(pages.keys) - 1), used[row] % PAGE_SIZE
    some = valid.any()
    for new, codes, scales in (
        (k, pages.keys, pages.key_scales),
        (x[:, heads + kv_heads :], pages.values, pages.value_scales),
    ):
        new = new[row]
        if scales is not None:
            new, scale = quantise(new, codes.dtype)
            scales[page, :, slot] = torch.where(some, scale, scales[page, :, slot])
        new = new.to(codes.dtype)
        if codes.dtype == torch.float8_e4m3fn:  # indexing knows no float8
            new, codes = new.view(torch.uint8), codes.view(torch.uint8)
        codes[page, :, slot] = torch.where(some, new, codes[page, :, slot])
    return torch.where(valid[:, None, None], q, 0).to(qkv.dtype)


def _torch(
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
    pages = Pages(keys, values, key_scales, value_scales)
    return qkv_rope_append_ref(qkv, cos, sin, positions, pages, block_table, heads, kv_heads)


OP = Op(
    name="qkv_rope_append", implementations=(by_triton(qkv_rope_append_triton), by_torch(_torch))
)


def qkv_rope_append(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    pages: Pages,
    block_table: Tensor,
    *,
    heads: int,
    kv_heads: int,
    implementation: str | None = None,
) -> Tensor:
    """Rotate q and k, write k and v behind each row's sequence, return q.

    A row of position -1 is idle: its q is zero and nothing is written. On the CPU any other
    position or page that does not exist is an error; on a GPU nothing is read back, and such a row
    is idle.

    Args:
        qkv: `[R, (H + 2·Hkv)·Dh]`: q, then k, then v. Dh even, at most 256.
        cos, sin: fp32 `[N, Dh / 2]`, the rotation of each position.
        positions: int32 `[R]`, -1 or in [0, min(N, max_pages·32)).
        pages: written in place; in the dtype of `qkv`, or int8 or float8_e4m3fn. No two rows may
            share the page they write.
        block_table: int32 `[R, max_pages]`; only the entry of the position is read.
        heads, kv_heads: H and Hkv.
        implementation: `triton` or `torch`; None: the first of these that can run.

    Returns:
        q `[R, H, Dh]`. Not differentiable.

    Raises:
        TypeError, ValueError: where a type, dtype, shape, stride, device or value does not fit.
        UnavailableError: where the named implementation cannot run here.
    """
    op = "qkv_rope_append"
    check_tensor(op, "qkv", qkv, ("R", "(H + 2 Hkv) Dh"))
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"{op}: expected heads a multiple of kv_heads, got {heads} and {kv_heads}")
    total = heads + 2 * kv_heads
    Dh = qkv.shape[-1] // total
    if qkv.shape[1] != total * Dh or Dh % 2 or not 2 <= Dh <= MAX_HEAD_DIM:
        raise ValueError(
            f"{op}: expected qkv [R, {total}·Dh] with Dh even and at most {MAX_HEAD_DIM}, "
            f"got {list(qkv.shape)}"
        )
    check_pages(op, pages, qkv, kv_heads, Dh)
    R, integers = len(qkv), (torch.int32,)
    check_tensor(op, "block_table", block_table, (R, Dim("max_pages")), integers, qkv.device)
    check_tensor(op, "positions", positions, (R,), integers, qkv.device)
    check_tensor(op, "cos", cos, (Dim("N"), Dh // 2), (torch.float32,), qkv.device)
    check_tensor(op, "sin", sin, cos.shape, (torch.float32,), qkv.device)
    if readable(qkv):
        end = min(len(cos), block_table.shape[1] * PAGE_SIZE)
        bad = (positions < -1) | (positions >= end)
        if bad.any():
            raise ValueError(
                f"{op}: expected positions -1 or in [0, {end}), got {int(positions[bad][0])}"
            )
        column = torch.arange(block_table.shape[1])
        used = (positions[:, None].div(PAGE_SIZE, rounding_mode="floor")) == column
        check_entries(op, block_table, used, len(pages.keys))
    if len(qkv) == 0:
        return qkv.new_empty(0, heads, Dh)
    chosen = OP.pick(qkv.device.type, qkv.dtype, implementation)
    run = _torch if chosen == "torch" else qkv_rope_append_triton
    with torch.no_grad():  # else pages would keep the graph of every row that they hold
        q: Tensor = run(qkv, cos, sin, positions, *pages, block_table, heads, kv_heads)
    return q


__all__ = ["OP", "qkv_rope_append", "qkv_rope_append_ref", "variants"]
