"""The launch of `paged_attention`: which kernel, which tiles, how many splits; and its variants."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dar_kernels.aot import DecoderShape, Shape, Variant
from dar_kernels.paged_attention_kernels import group_kernel, head_kernel, merge_kernel
from dar_kernels.pages import PAGE_SIZE
from dar_kernels.pages_triton import dependent_launch, kernel_pages, page_variants
from dar_kernels.triton_support import contiguous_last, launch_options, triton

# Estimated for an H100, chosen from ahead-of-time register counts; not timed. A second launch costs
# about what one multiprocessor streams in the same 1.5 us, so a share has to be worth it.
PROCESSORS = 132
LEAST_SHARE = 64 * 1024  # bytes of keys and values
MOST_SPLITS = 32


class Plan(NamedTuple):
    """How a launch is laid out; from shapes alone, so a captured graph stays valid."""

    grouped: bool  # one program a KV head, on the matrix units; else one a query head
    block_n: int  # tokens of a tile
    num_warps: int
    splits: int


def plan(
    rows: int, heads: int, kv_heads: int, head_dim: int, max_pages: int, x: torch.dtype,
    page: torch.dtype,
) -> Plan:  # fmt: skip
    """fp32 has no matrix product that is exact enough: its query heads go one by one."""
    grouped = heads > kv_heads and x != torch.float32
    programs = rows * (kv_heads if grouped else heads)
    few = programs < 2 * PROCESSORS
    block_d = triton.next_power_of_2(head_dim)
    if grouped:
        num_warps, tile = 4, 4096
    else:
        num_warps = 8 if few else 4
        tile = num_warps * 32 * (16 if page == torch.float32 else 32)
    block_n = max(16, min(tile // block_d, triton.next_power_of_2(max_pages * PAGE_SIZE)))
    size = 2 * max_pages * PAGE_SIZE * head_dim * page.itemsize
    wanted = min(-(-2 * PROCESSORS // max(programs, 1)), size // LEAST_SHARE, MOST_SPLITS)
    return Plan(grouped, block_n, num_warps, max(wanted, 1))


def _constants(chosen: Plan, group: int, head_dim: int, pdl: bool) -> tuple[Any, dict[str, Any]]:
    """Kernel, and constants of a launch."""
    block_d = triton.next_power_of_2(head_dim)
    constants = {
        "GROUP": group, "D": head_dim, "PAGE": PAGE_SIZE, "BLOCK_N": chosen.block_n,
        "BLOCK_D": max(16, block_d) if chosen.grouped else block_d, "SPLIT": chosen.splits > 1,
        "PDL": pdl,
    }  # fmt: skip
    if not chosen.grouped:
        return head_kernel, constants
    return group_kernel, constants | {"BLOCK_G": max(16, triton.next_power_of_2(group))}


def _merge_constants(splits: int, head_dim: int, pdl: bool) -> dict[str, Any]:
    block_d = triton.next_power_of_2(head_dim)
    return {
        "D": head_dim, "BLOCK_D": block_d, "BLOCK_S": triton.next_power_of_2(splits), "PDL": pdl
    }  # fmt: skip


def _options(num_warps: int, pdl: bool) -> dict[str, Any]:
    return launch_options(num_warps=num_warps, **({"launch_pdl": True} if pdl else {}))


@torch.library.custom_op("dar::paged_attention", mutates_args=())
def paged_attention_triton(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    block_table: Tensor,
    lengths: Tensor,
    scale: float,
    splits: int,
) -> Tensor:
    """`splits` programs a row and head, then a merge; 0: as `plan` has it."""
    R, H, Dh = q.shape
    Hkv, max_pages = keys.shape[1], block_table.shape[1]
    out = torch.empty((R, H, Dh), dtype=q.dtype, device=q.device)
    if R == 0:
        return out
    chosen = plan(R, H, Hkv, Dh, max_pages, q.dtype, keys.dtype)
    chosen = chosen._replace(splits=splits or chosen.splits)
    pdl = dependent_launch(q.device)
    kernel, constants = _constants(chosen, H // Hkv, Dh, pdl)
    result, lse = out, None
    if chosen.splits > 1:
        result = torch.empty((R, H, chosen.splits, Dh), dtype=torch.float32, device=q.device)
        lse = torch.empty((R, H, chosen.splits), dtype=torch.float32, device=q.device)
    page_strides = keys.stride()[:2]
    scale_strides = (0, 0) if key_scales is None else key_scales.stride()[:2]
    keys, values, fp8 = kernel_pages(keys, values)
    q, block_table = contiguous_last(q), contiguous_last(block_table)
    kernel[(Hkv if chosen.grouped else H, R, chosen.splits)](
        q, keys, values, key_scales, value_scales, block_table, lengths.contiguous(), result, lse,
        q.stride(0), q.stride(1), *page_strides, *scale_strides, block_table.stride(0), scale,
        len(keys), max_pages, **constants, FP8=fp8,
        **_options(chosen.num_warps, pdl),
    )  # fmt: skip
    if lse is not None:
        merge_kernel[(R * H,)](
            result, lse, out, chosen.splits, **_merge_constants(chosen.splits, Dh, pdl),
            **_options(4, pdl),
        )  # fmt: skip
    return out


@paged_attention_triton.register_fake
def _(q, keys, values, key_scales, value_scales, block_table, lengths, scale, splits):
    return q.new_empty(q.shape)


def variants(shape: Shape) -> Iterator[Variant]:
    """2 to 512 rows over 8 pages, and over 128, which are split."""
    if not isinstance(shape, DecoderShape):
        return
    H, Hkv, Dh = shape.heads, shape.kv_heads, shape.head_dim
    ints = ("stride_page", "stride_head", "stride_scale_page", "stride_scale_head", "stride_qr")
    others = ("stride_qh", "stride_tr", "num_pages", "max_pages")
    types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    for page in page_variants():
        pdl = page.constants["PDL"]
        for rows, max_pages in ((2, 8), (16, 8), (128, 8), (512, 8), (2, 128)):
            chosen = plan(rows, H, Hkv, Dh, max_pages, types[page.x], page.dtype)
            kernel, constants = _constants(chosen, H // Hkv, Dh, pdl)
            signature = dict.fromkeys((*ints, *others), "i32") | page.signature
            signature |= {"q_ptr": f"*{page.x}", "out_ptr": f"*{page.x}", "scale": "fp32"}
            signature |= dict.fromkeys(("table_ptr", "lengths_ptr"), "*i32")
            if chosen.splits > 1:
                signature |= dict.fromkeys(("out_ptr", "lse_ptr"), "*fp32")
            else:
                constants["lse_ptr"] = None
            architectures = (page.architecture,)
            yield Variant(
                kernel=kernel,
                signature=signature,
                constants=constants | page.constants,
                aligned=(*ints, *(("stride_qh",) if Dh % 16 == 0 else ())),
                options=_options(chosen.num_warps, pdl),
                architectures=architectures,
            )
            if chosen.splits > 1:
                merge = {"partial_ptr": "*fp32", "lse_ptr": "*fp32", "out_ptr": f"*{page.x}"}
                yield Variant(
                    kernel=merge_kernel,
                    signature=merge | {"splits": "i32"},
                    constants=_merge_constants(chosen.splits, Dh, pdl),
                    options=_options(4, pdl),
                    architectures=architectures,
                )
