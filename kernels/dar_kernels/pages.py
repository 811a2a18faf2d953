"""Paged keys and values: what `qkv_rope_append` writes and `paged_attention` reads.

A page holds PAGE_SIZE tokens of every KV head; token t of a sequence is slot t mod 32 of page
block_table[row, t div 32]. One head's page `[32, Dh]` is contiguous: 4 to 8 KiB in bf16, read as
whole lines. int8 and float8_e4m3fn pages keep x ≈ code · scale, scale = max|x| / 127 or / 448 of a
token's head in fp32: Dh + 4 bytes where bf16 takes 2·Dh.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dar_kernels.checks import FLOATS, Dim, check_tensor

PAGE_SIZE = 32
MAX_HEAD_DIM = 256  # a tile of 32 such keys in fp32 still fits the registers of four warps
LARGEST_CODE = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
PAGE_DTYPES = (*FLOATS, *LARGEST_CODE)
TINY = 1e-30  # least max|x|: its reciprocal times 448 is finite in fp32


class Pages(NamedTuple):
    """Pages of one layer.

    keys, values: `[num_pages, Hkv, 32, Dh]`; a head's page is contiguous, pages and heads may be
    strided, alike in both: `Pages(*kv.unbind(1))` of one `[num_pages, 2, Hkv, 32, Dh]` is good.
    key_scales, value_scales: fp32 `[num_pages, Hkv, 32]` for int8 and float8_e4m3fn; else None.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None


def new_pages(
    num_pages: int, kv_heads: int, head_dim: int, *, dtype: torch.dtype, device: torch.device | str
) -> Pages:
    """Zeroed pages.

    Raises:
        TypeError: where pages cannot have that dtype.
    """
    if dtype not in PAGE_DTYPES:
        raise TypeError(f"new_pages: expected dtype one of {PAGE_DTYPES}, got {dtype}")
    shape = (num_pages, kv_heads, PAGE_SIZE)
    pages = [torch.zeros(*shape, head_dim, dtype=dtype, device=device) for _ in range(2)]
    if dtype not in LARGEST_CODE:
        return Pages(*pages)
    return Pages(*pages, *(torch.zeros(shape, device=device) for _ in range(2)))


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes of `x` `[..., Dh]` (finite) in `dtype`, to nearest even, and fp32 scales `[...]`."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    largest = x.abs().amax(-1, keepdim=True).clamp_min(TINY)
    inverse = torch.full_like(largest, LARGEST_CODE[dtype]).div(largest)  # number / x rounds twice
    codes = x * inverse
    codes = codes.round() if dtype == torch.int8 else codes
    return codes.to(dtype), (largest * (1 / LARGEST_CODE[dtype])).squeeze(-1).float()


def dequantise(codes: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Codes `[..., Dh]` times scales `[...]` where there are any, in `dtype`."""
    if scales is None:
        return codes.to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    return (codes.to(wide) * scales[..., None]).to(dtype)


def gather(pages: Pages, block_table: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values `[R, Hkv, max_pages·32, Dh]` in order, and which tokens have a page `[R, T]`.

    Entries out of range read page 0.
    """
    known = (block_table >= 0) & (block_table < len(pages.keys))
    table = torch.where(known, block_table, 0)

    def lines(codes: Tensor, scales: Tensor | None) -> Tensor:
        bits = codes.view(torch.uint8) if codes.dtype == torch.float8_e4m3fn else codes
        picked = bits[table].view(codes.dtype)  # [R, P, Hkv, 32, Dh]
        dense = dequantise(picked, None if scales is None else scales[table], dtype)
        return dense.transpose(1, 2).flatten(2, 3)

    keys = lines(pages.keys, pages.key_scales)
    values = lines(pages.values, pages.value_scales)
    return keys, values, known.repeat_interleave(PAGE_SIZE, 1)


def check_pages(op: str, pages: Pages, x: Tensor, kv_heads: int | None, head_dim: int) -> None:
    """Raise unless `pages` have such heads and can serve `x`: its device, its dtype."""
    if not isinstance(pages, Pages):
        raise TypeError(f"{op}: expected pages a Pages, got {type(pages).__name__}")
    keys = pages.keys
    shape = (Dim("num_pages"), kv_heads or Dim("Hkv"), PAGE_SIZE, head_dim)
    check_tensor(op, "keys", keys, shape, (x.dtype, *LARGEST_CODE), x.device)
    if keys.stride()[2:] != (head_dim, 1):
        raise ValueError(
            f"{op}: expected keys with strides (…, {head_dim}, 1), got {keys.stride()}"
        )
    _check_twin(op, "values", pages.values, keys)
    scaled = keys.dtype in LARGEST_CODE
    for name, scales in (("key_scales", pages.key_scales), ("value_scales", pages.value_scales)):
        if (scales is not None) != scaled:
            wanted = "a tensor" if scaled else "None"
            got = "None" if scales is None else "a tensor"
            raise ValueError(f"{op}: expected {name} {wanted} with {keys.dtype} pages, got {got}")
    if pages.key_scales is not None:
        check_tensor(op, "key_scales", pages.key_scales, keys.shape[:3], (torch.float32,), x.device)
        if pages.key_scales.stride(2) != 1:
            strides = pages.key_scales.stride()
            raise ValueError(f"{op}: expected key_scales with last stride 1, got strides {strides}")
        _check_twin(op, "value_scales", pages.value_scales, pages.key_scales)


def _check_twin(op: str, name: str, tensor: object, other: Tensor) -> None:
    check_tensor(op, name, tensor, other.shape, (other.dtype,), other.device)
    if isinstance(tensor, Tensor) and tensor.stride() != other.stride():
        raise ValueError(
            f"{op}: expected {name} with strides {other.stride()}, got {tensor.stride()}"
        )


def check_entries(op: str, block_table: Tensor, used: Tensor, num_pages: int) -> None:
    """Raise for the first entry with `used` `[R, P]` set that names no page."""
    bad = used & ((block_table < 0) | (block_table >= num_pages))
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{op}: expected block_table[{row}, {column}] in [0, {num_pages}), "
            f"got {int(block_table[row, column])}"
        )
