"""vq_losses on CUDA: one program a tile of rows; C channels are 32 bytes, so whole rows are loaded.

Forward: one kernel. Backward: one for dz; for dcodebook a stable sort of the codes and one program
an entry, which adds its rows in their order. A codebook that collapsed to one entry makes that one
program long: 65536 rows in 2048 steps. Norms are taken in fp64, as vq_nearest does.
"""

from typing import Any

import torch
from torch import Tensor

from dar_kernels.triton_support import cast, contiguous_last, launch_options, tl, triton

TILE = 512  # values a program: 4 a thread
SEGMENT = 256  # values of the rows of an entry at a time: 32 rows of 8; most entries have few
OPTIONS = launch_options(num_warps=4, num_stages=1)  # chosen from AOT registers; not timed
SEGMENT_OPTIONS = launch_options(num_warps=1, num_stages=1)


@triton.jit
def _unit(x):
    """Unit rows in fp32, 1 / max(norm, 1e-12), and which norms are not below; norms in fp64."""
    x = x.to(tl.float64)
    norm = tl.sqrt(tl.sum(x * x, 1))
    inverse = 1.0 / tl.maximum(norm, 1e-12)
    return (x * inverse[:, None]).to(tl.float32), inverse.to(tl.float32), norm >= 1e-12


@triton.jit
def _through_unit(du, u, inverse, above):
    """The gradient of rows from that of the unit rows; rows below 1e-12 are only scaled."""
    radial = tl.where(above, tl.sum(du * u, 1), 0.0)
    return (du - u * radial[:, None]) * inverse[:, None]


@triton.jit
def _rows_and_entries(
    z_ptr, codebook_ptr, codes_ptr, mask_ptr, M, V, stride_zm, stride_ev, C,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program's rows of z and of their entries, NaN where a code is none, and weights 0 or 1."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_C)[None, :]
    inside = (m < M)[:, None] & (c < C)
    code = tl.load(codes_ptr + m, mask=m < M, other=0)
    known = ((code >= 0) & (code < V))[:, None]
    z = tl.load(z_ptr + m[:, None] * stride_zm + c, mask=inside, other=0.0)
    e_ptr = codebook_ptr + code[:, None] * stride_ev + c
    e = tl.load(e_ptr, mask=inside & known, other=0.0).to(tl.float32)
    e = tl.where(known, e, float("nan"))
    weight = tl.where(m < M, 1.0, 0.0)
    if mask_ptr is not None:
        weight = tl.load(mask_ptr + m, mask=m < M, other=0).to(tl.float32)
    return m, m[:, None] * C + c, inside, z, e, weight


@triton.jit
def vq_losses_kernel(
    z_ptr, codebook_ptr, codes_ptr, mask_ptr, out_ptr, vq_ptr, commit_ptr,
    M, V, stride_zm, stride_ev, C, commitment,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    m, at, inside, z, e, weight = _rows_and_entries(
        z_ptr, codebook_ptr, codes_ptr, mask_ptr, M, V, stride_zm, stride_ev, C,
        BLOCK_M, BLOCK_C,
    )  # fmt: skip
    z, _, _ = _unit(z)
    e, _, _ = _unit(e)
    difference = e - z
    loss = weight * tl.sum(difference * difference, 1) / C
    tl.store(out_ptr + at, e, mask=inside)
    tl.store(vq_ptr + m, loss, mask=m < M)
    tl.store(commit_ptr + m, commitment * loss, mask=m < M)


@triton.jit
def vq_losses_dz_kernel(
    z_ptr, codebook_ptr, codes_ptr, mask_ptr, dout_ptr, dcommit_ptr, dz_ptr,
    M, V, stride_zm, stride_ev, C, commitment,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    m, at, inside, z, e, weight = _rows_and_entries(
        z_ptr, codebook_ptr, codes_ptr, mask_ptr, M, V, stride_zm, stride_ev, C,
        BLOCK_M, BLOCK_C,
    )  # fmt: skip
    z, inverse, above = _unit(z)
    e, _, _ = _unit(e)
    weight *= 2.0 * commitment / C * tl.load(dcommit_ptr + m, mask=m < M, other=0.0)
    du = tl.load(dout_ptr + at, mask=inside, other=0.0) + weight[:, None] * (z - e)
    dz = _through_unit(du, z, inverse, above)
    tl.store(dz_ptr + at, cast(dz, dz_ptr.dtype.element_ty), mask=inside)


@triton.jit
def vq_losses_dcodebook_kernel(
    z_ptr, codebook_ptr, order_ptr, starts_ptr, mask_ptr, dvq_ptr, dcodebook_ptr,
    stride_zm, stride_ev, C,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    v = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)[None, :]
    first, last = tl.load(starts_ptr + v), tl.load(starts_ptr + v + 1)
    e = tl.load(codebook_ptr + v * stride_ev + c, mask=c < C, other=0.0)
    e, inverse, above = _unit(e)  # [1, BLOCK_C]
    du = tl.zeros([1, BLOCK_C], tl.float32)
    for start in range(first, last, BLOCK_M):
        at = start + tl.arange(0, BLOCK_M)
        m = tl.load(order_ptr + at, mask=at < last, other=0)
        inside = (at < last)[:, None] & (c < C)
        z = tl.load(z_ptr + m[:, None] * stride_zm + c, mask=inside, other=0.0)
        z, _, _ = _unit(z)
        weight = tl.load(dvq_ptr + m, mask=at < last, other=0.0)
        if mask_ptr is not None:
            weight *= tl.load(mask_ptr + m, mask=at < last, other=0).to(tl.float32)
        du += tl.sum(weight[:, None] * (e - z), 0)[None, :]
    de = _through_unit(du * (2.0 / C), e, inverse, above)
    tl.store(dcodebook_ptr + v * C + c, cast(de, dcodebook_ptr.dtype.element_ty), mask=c < C)


def tile(C: int, values: int = TILE) -> dict[str, int]:
    """Rows and channels of a program that holds so many values."""
    block = int(triton.next_power_of_2(C))
    return {"BLOCK_M": max(1, values // block), "BLOCK_C": block}


@torch.library.custom_op("dar::vq_losses", mutates_args=())
def vq_losses_triton(
    z: Tensor, codebook: Tensor, codes: Tensor, mask: Tensor | None, commitment: float
) -> tuple[Tensor, Tensor, Tensor]:
    z, codebook, codes = contiguous_last(z), contiguous_last(codebook), codes.contiguous()
    M, C = z.shape
    sizes = tile(C)
    embedding = torch.empty((M, C), device=z.device)
    vq, commit = torch.empty(M, device=z.device), torch.empty(M, device=z.device)
    if M > 0:
        vq_losses_kernel[(triton.cdiv(M, sizes["BLOCK_M"]),)](
            z, codebook, codes, mask if mask is None else mask.contiguous(), embedding, vq, commit,
            M, len(codebook), z.stride(0), codebook.stride(0), C, commitment,
            **sizes, **OPTIONS,
        )  # fmt: skip
    return embedding, vq, commit


@vq_losses_triton.register_fake
def _(
    z: Tensor, codebook: Tensor, codes: Tensor, mask: Tensor | None, commitment: float
) -> tuple[Tensor, Tensor, Tensor]:
    M, C = z.shape
    row = z.new_empty(M, dtype=torch.float32)
    return z.new_empty((M, C), dtype=torch.float32), row, torch.empty_like(row)


@torch.library.custom_op("dar::vq_losses_dz", mutates_args=())
def _vq_losses_dz(
    dout: Tensor, dcommit: Tensor, z: Tensor, codebook: Tensor, codes: Tensor,
    mask: Tensor | None, commitment: float,
) -> Tensor:  # fmt: skip
    z, codebook, codes = contiguous_last(z), contiguous_last(codebook), codes.contiguous()
    M, C = z.shape
    sizes = tile(C)
    dz = torch.empty((M, C), dtype=z.dtype, device=z.device)
    if M > 0:
        vq_losses_dz_kernel[(triton.cdiv(M, sizes["BLOCK_M"]),)](
            z, codebook, codes, mask if mask is None else mask.contiguous(), dout.contiguous(),
            dcommit.contiguous(), dz, M, len(codebook), z.stride(0), codebook.stride(0), C,
            commitment, **sizes, **OPTIONS,
        )  # fmt: skip
    return dz


@_vq_losses_dz.register_fake
def _(
    dout: Tensor, dcommit: Tensor, z: Tensor, codebook: Tensor, codes: Tensor,
    mask: Tensor | None, commitment: float,
) -> Tensor:  # fmt: skip
    return z.new_empty(z.shape)


@torch.library.custom_op("dar::vq_losses_dcodebook", mutates_args=())
def _vq_losses_dcodebook(
    dvq: Tensor, z: Tensor, codebook: Tensor, codes: Tensor, mask: Tensor | None
) -> Tensor:
    z, codebook = contiguous_last(z), contiguous_last(codebook)
    V, C = codebook.shape
    ordered, order = torch.sort(codes.to(torch.int32), stable=True)
    entries = torch.arange(V + 1, dtype=torch.int32, device=z.device)
    starts = torch.searchsorted(ordered, entries)
    dcodebook = torch.empty((V, C), dtype=codebook.dtype, device=z.device)
    vq_losses_dcodebook_kernel[(V,)](
        z, codebook, order, starts, mask if mask is None else mask.contiguous(), dvq.contiguous(),
        dcodebook, z.stride(0), codebook.stride(0), C,
        **tile(C, SEGMENT),
        **SEGMENT_OPTIONS,
    )  # fmt: skip
    return dcodebook


@_vq_losses_dcodebook.register_fake
def _(dvq: Tensor, z: Tensor, codebook: Tensor, codes: Tensor, mask: Tensor | None) -> Tensor:
    return codebook.new_empty(codebook.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.commitment = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, dout: Tensor, dvq: Tensor, dcommit: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # z, codebook, codes, mask
    dz = dcodebook = None
    if ctx.needs_input_grad[0]:
        dz = _vq_losses_dz(dout, dcommit, *saved, ctx.commitment)
    if ctx.needs_input_grad[1]:
        dcodebook = _vq_losses_dcodebook(dvq, *saved)
    return dz, dcodebook, None, None, None


vq_losses_triton.register_autograd(_autograd, setup_context=_setup_context)
