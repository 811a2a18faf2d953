"""What the row-wise kernels share: rows read where they lie, results written in the same order.

A transposed or split tensor is no reason for a copy: leading dimensions are put in the order of
their strides and merged to at most two, so that row r begins at (r // inner) · stride_outer +
(r % inner) · stride_inner.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dar_kernels.triton_support import contiguous_last, launch_options, triton


class Rows(NamedTuple):
    """Rows of D numbers in memory: what a kernel needs to find each."""

    data: Tensor  # only its address matters
    inner: int
    stride_outer: int
    stride_inner: int


def memory_order(x: Tensor) -> tuple[int, ...]:
    """All dimensions of `x`: the leading ones from the widest stride to the narrowest, the last."""
    leading = sorted(range(x.ndim - 1), key=x.stride, reverse=True)
    return (*leading, x.ndim - 1)


def empty_in_order(x: Tensor) -> Tensor:
    """An empty tensor of the shape of `x`, dense, its dimensions in memory as those of `x`."""
    order = memory_order(x)
    inverse = sorted(range(x.ndim), key=order.__getitem__)
    return x.new_empty([x.shape[d] for d in order]).permute(inverse)


def rows_of(x: Tensor, order: tuple[int, ...]) -> Rows:
    """The rows of `x` `[..., D]`, counted in `order`; a copy where they need more than two strides.

    Args:
        x: of the dimensions that `order` lists.
        order: of `memory_order`, of `x` or of what `x` must match row by row.
    """
    x = contiguous_last(x.permute(order))
    groups = _merged(x)
    if len(groups) > 2:
        x = x.contiguous()
        groups = _merged(x)
    groups += [(1, 0)] * (2 - len(groups))  # one row of memory, or one stride: the inner is 1
    (_, stride_outer), (inner, stride_inner) = groups
    return Rows(x, inner, stride_outer, stride_inner)


def _merged(x: Tensor) -> list[tuple[int, int]]:
    """(size, stride) of the leading dimensions, those that lie end to end as one."""
    groups: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if groups and groups[-1][1] == size * stride:
            groups[-1] = (groups[-1][0] * size, stride)
        else:
            groups.append((size, stride))
    return groups


def matrix_of(x: Tensor) -> Tensor:
    """`x` `[..., D]` as `[M, D]`, rows contiguous; a copy where the rows have no single stride."""
    return contiguous_last(x.reshape(-1, x.shape[-1]))


def row_blocks(D: int, numbers: int) -> tuple[dict[str, int], dict[str, Any]]:
    """Tile and launch options of a kernel over whole rows: as many rows as reach `numbers`.

    8 to 16 numbers of each tensor a thread: one or two 16-byte loads in bf16. Chosen from
    ahead-of-time register counts; not timed.
    """
    BLOCK_D = triton.next_power_of_2(D)
    blocks = {"BLOCK_M": max(1, numbers // BLOCK_D), "BLOCK_D": BLOCK_D}
    return blocks, launch_options(num_warps=max(4, BLOCK_D // 512))


def persistent_programs(device: torch.device, tiles: int, num_warps: int) -> int:
    """Programs of a kernel that walks over `tiles` tiles: 16 warps a multiprocessor.

    They fit with 128 registers a thread. With two tiles of two or three tensors on the way each,
    32 to 48 KiB a multiprocessor are: about a microsecond of an H200's bandwidth.
    """
    if device.type != "cuda":
        return min(tiles, 4)  # interpreted: enough for several, and several tiles each
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return min(tiles, multiprocessors * max(1, 16 // num_warps))
