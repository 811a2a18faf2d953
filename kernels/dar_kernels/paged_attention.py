"""out[r, h] = softmax(scale · q[r, h] · Kᵀ) V over the first lengths[r] tokens of row r's pages.

Query head h reads KV head h div (H / Hkv). int8 and float8 pages are multiplied by their scales on
chip, and the softmax runs online in fp32, so nothing but the pages is read:
R·Hkv·length·2·(Dh·itemsize + 4 where quantised) bytes, for 4·R·H·length·Dh FLOPs: memory bound.
Both guidance rows of prior L at 256 tokens: 2 MiB a layer, 0.6 µs at 3.35 TB/s.
Source: Dao et al., Flash-Decoding (2023), for the split; Kwon et al., vLLM (2023), for the pages.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dar_kernels.checks import Dim, check_tensor, readable
from dar_kernels.dispatch import Op
from dar_kernels.implementations import by_torch, by_triton
from dar_kernels.paged_attention_triton import paged_attention_triton, variants
from dar_kernels.pages import (
    MAX_HEAD_DIM,
    PAGE_SIZE,
    Pages,
    check_entries,
    check_pages,
    gather,
)  # fmt: skip

MAX_ROWS = 65_535  # the second dimension of a grid


def _dense(
    q: Tensor, pages: Pages, block_table: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values `[R, Hkv, T, Dh]`, 0 where not seen, and which tokens are seen `[R, T]`."""
    keys, values, seen = gather(pages, block_table, q.dtype)
    seen = seen & (torch.arange(seen.shape[1], device=q.device) < lengths[:, None])
    hidden = ~seen[:, None, :, None]  # may hold anything, NaN too
    return keys.masked_fill(hidden, 0), values.masked_fill(hidden, 0), seen


def paged_attention_ref(
    q: Tensor, pages: Pages, block_table: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """The definition, in whatever dtype it is given; in fp64 it is the truth the tests use."""
    keys, values, seen = _dense(q, pages, block_table, lengths)
    hidden = ~seen[:, None, None]
    grouped = q.unflatten(1, (keys.shape[1], -1))  # [R, Hkv, G, Dh]
    scores = (grouped @ keys.transpose(2, 3) * scale).masked_fill(hidden, -torch.inf)
    weights = scores.softmax(-1).masked_fill(hidden, 0)
    return (weights @ values).flatten(1, 2)


def _torch(q: Tensor, pages: Pages, block_table: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """As the plain model attends, over a copy of the pages in order."""
    keys, values, seen = _dense(q, pages, block_table, lengths)
    out = F.scaled_dot_product_attention(
        q[:, :, None], keys, values, seen[:, None, None], scale=scale,
        enable_gqa=q.shape[1] != keys.shape[1],
    ).squeeze(2)  # fmt: skip
    return torch.where(seen.any(1)[:, None, None], out, 0)


def _triton(q: Tensor, pages: Pages, block_table: Tensor, lengths: Tensor, scale: float) -> Tensor:
    out: Tensor = paged_attention_triton(q, *pages, block_table, lengths, scale, 0)
    return out


OP = Op(name="paged_attention", implementations=(by_triton(_triton), by_torch(_torch)))


def paged_attention(
    q: Tensor,
    pages: Pages,
    block_table: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Attention of one query a row over the tokens in its pages. Grids depend on shapes alone.

    On the CPU a length or a used page that does not exist is an error. On a GPU nothing is read
    back: lengths are clamped, and tokens of a page that does not exist are passed over.

    Args:
        q: `[R, H, Dh]`, Dh at most 256; with guidance both rows of a request are rows.
        pages: keys and values with Hkv heads dividing H; in the dtype of `q`, or int8 or
            float8_e4m3fn.
        block_table: int32 `[R, max_pages]`; entries behind the last used page may be anything.
        lengths: int32 `[R]` in [0, max_pages·32]: tokens attended to. 0 gives zeros.
        scale: of the scores; None: 1 / sqrt(Dh).
        implementation: `triton` or `torch`; None: the first of these that can run.

    Returns:
        `[R, H, Dh]` in the dtype of `q`. Not differentiable.

    Raises:
        TypeError, ValueError: where a type, dtype, shape, stride, device or value does not fit.
        UnavailableError: where the named implementation cannot run here.
    """
    op = "paged_attention"
    check_tensor(op, "q", q, (Dim("R", 0, MAX_ROWS), Dim("H"), Dim("Dh", 1, MAX_HEAD_DIM)))
    R, H, Dh = q.shape
    check_pages(op, pages, q, None, Dh)
    if H % pages.keys.shape[1]:
        raise ValueError(
            f"{op}: expected Hkv dividing the {H} heads of q, got {pages.keys.shape[1]}"
        )
    integers = (torch.int32,)
    check_tensor(op, "block_table", block_table, (R, Dim("max_pages")), integers, q.device)
    check_tensor(op, "lengths", lengths, (R,), integers, q.device)
    if readable(q) and R:
        most = block_table.shape[1] * PAGE_SIZE
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > most:
            raise ValueError(
                f"{op}: expected lengths in [0, {most}], got {low if low < 0 else high}"
            )
        starts = torch.arange(0, most, PAGE_SIZE)
        check_entries(op, block_table, starts < lengths[:, None], len(pages.keys))
    scale = Dh**-0.5 if scale is None else float(scale)
    chosen = OP.pick(q.device.type, q.dtype, implementation)
    run = _torch if chosen == "torch" else _triton
    with torch.no_grad():
        return run(q, pages, block_table, lengths, scale)


__all__ = ["OP", "paged_attention", "paged_attention_ref", "variants"]
