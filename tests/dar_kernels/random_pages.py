"""Pages in random order whose unwritten slots are poisoned, for the tests of the paged ops."""

from typing import NamedTuple

import torch
from torch import Tensor
from truth import DEVICE

from dar_kernels.pages import LARGEST_CODE, PAGE_SIZE, Pages, new_pages, quantise

PAGE_DTYPES = (None, torch.int8, torch.float8_e4m3fn)  # None: the dtype of q


class Case(NamedTuple):
    q: Tensor
    pages: Pages
    block_table: Tensor
    lengths: Tensor


def random_case(
    lengths: list[int],
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    page_dtype: torch.dtype | None = None,
    max_pages: int | None = None,
    seed: int = 0,
) -> Case:
    """One row a length; entries behind the last page are out of range."""
    generator = torch.Generator().manual_seed(seed)
    used = [-(-n // PAGE_SIZE) for n in lengths]
    max_pages = max_pages or max(1, *used)
    order = torch.randperm(sum(used) + 2, generator=generator).tolist()
    pages = new_pages(len(order), kv_heads, head_dim, dtype=page_dtype or dtype, device="cpu")
    for part in pages:
        if part is not None:
            part.fill_(torch.nan if part.dtype not in LARGEST_CODE else 1)
    table = torch.full((len(lengths), max_pages), -7, dtype=torch.int32)
    for row, length in enumerate(lengths):
        for i in range(used[row]):
            page = order.pop()
            table[row, i] = page
            n = min(PAGE_SIZE, length - i * PAGE_SIZE)
            for codes, scales in (pages[0::2], pages[1::2]):
                x = torch.randn(kv_heads, n, head_dim, generator=generator)
                if scales is not None:
                    x, scales[page, :, :n] = quantise(
                        x * torch.rand(n, 1, generator=generator) * 3, page_dtype
                    )
                codes[page, :, :n] = x.to(codes.dtype)
    q = torch.randn(len(lengths), heads, head_dim, generator=generator).to(dtype)
    moved = [None if part is None else part.to(DEVICE) for part in pages]
    numbers = torch.tensor(lengths, dtype=torch.int32)
    return Case(q.to(DEVICE), Pages(*moved), table.to(DEVICE), numbers.to(DEVICE))


def pages_in(pages: Pages, dtype: torch.dtype) -> Pages:
    """Pages of plain numbers in another dtype; quantised ones stay as they are."""
    if pages.key_scales is not None:
        return pages
    return Pages(pages.keys.to(dtype), pages.values.to(dtype))
