"""Straight-through rows and losses of a vector quantiser; ẑ and ê are l2-normalised rows.

    embedding = ẑ + sg(ê − ẑ), vq = mean_C (ê − sg(ẑ))², commit = β·mean_C (sg(ê) − ẑ)²

Memory bound. Forward reads z and its entries and writes the rows, backward reads both and the
gradients of the rows and writes dz: 3 and 4 times M·C·4 bytes, 12 to 24·M beside. Nothing but the
inputs is saved. dcodebook: the rows of each entry in order (a stable sort of M 32-bit codes), one
program an entry, no atomics: the same bits every time. (M + V)·C·4 bytes and the sort.
Source: D-AR (arXiv 2505.23660), §3.1.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dar_kernels.aot import DenoiserShape, Shape, Variant
from dar_kernels.checks import Dim, check_below, check_tensor
from dar_kernels.dispatch import Op
from dar_kernels.implementations import by_torch, by_triton
from dar_kernels.vq_losses_triton import (
    OPTIONS,
    SEGMENT,
    SEGMENT_OPTIONS,
    tile,
    vq_losses_dcodebook_kernel,
    vq_losses_dz_kernel,
    vq_losses_kernel,
    vq_losses_triton,
)

COMMITMENT = 0.25
MAX_C = 1024  # a row is one program's, in registers


class VQLosses(NamedTuple):
    embedding: Tensor  # [M, C], ê with the gradient of ẑ
    vq: Tensor  # [M], 0 where masked
    commit: Tensor  # [M], weighted, 0 where masked


def vq_losses_ref(
    z: Tensor, codebook: Tensor, codes: Tensor, mask: Tensor | None, commitment: float
) -> VQLosses:
    """The definition, in whatever dtype it is given; in fp64 it is the truth the tests use."""
    z = F.normalize(z, dim=-1)
    e = F.normalize(F.embedding(codes, codebook), dim=-1)
    vq = (e - z.detach()).square().mean(-1)
    commit = commitment * (e.detach() - z).square().mean(-1)
    if mask is not None:
        vq, commit = vq * mask, commit * mask
    return VQLosses(z + (e - z).detach(), vq, commit)


def _torch(
    z: Tensor, codebook: Tensor, codes: Tensor, mask: Tensor | None, commitment: float
) -> VQLosses:
    """The definition in fp32 at least: what the losses are made of is far below bf16's steps."""
    dtype = torch.promote_types(torch.promote_types(z.dtype, codebook.dtype), torch.float32)
    return vq_losses_ref(z.to(dtype), codebook.to(dtype), codes, mask, commitment)


OP = Op(name="vq_losses", implementations=(by_triton(vq_losses_triton), by_torch(_torch)))


def variants(shape: Shape) -> Iterator[Variant]:
    """All three for the codebook of a tokenizer: fp32 rows, and bf16 as autocast gives them."""
    if not isinstance(shape, DenoiserShape):
        return
    C = shape.code_dim
    blocks = tile(C)
    sizes = dict.fromkeys(("M", "V", "stride_zm", "stride_ev", "C"), "i32")
    for dtype in ("fp32", "bf16"):
        for masked in (False, True):
            mask = {"mask_ptr": "*i1"} if masked else {}
            absent: dict[str, Any] = {} if masked else {"mask_ptr": None}
            inputs = {"z_ptr": f"*{dtype}", "codebook_ptr": "*fp32", **mask}
            rows = inputs | sizes | {"codes_ptr": "*i64", "commitment": "fp32"}
            for kernel, outputs in (
                (vq_losses_kernel, ("out_ptr", "vq_ptr", "commit_ptr")),
                (vq_losses_dz_kernel, ("dout_ptr", "dcommit_ptr")),
            ):
                pointers = dict.fromkeys(outputs, "*fp32")
                if kernel is vq_losses_dz_kernel:
                    pointers["dz_ptr"] = f"*{dtype}"
                yield Variant(
                    kernel=kernel,
                    signature=rows | pointers,
                    constants=absent | blocks,
                    aligned=("M", "V"),
                    options=OPTIONS,
                )
            segments = {"order_ptr": "*i64", "starts_ptr": "*i64"}
            segments |= dict.fromkeys(("dvq_ptr", "dcodebook_ptr"), "*fp32")
            yield Variant(
                kernel=vq_losses_dcodebook_kernel,
                signature=inputs | segments | dict.fromkeys(("stride_zm", "stride_ev", "C"), "i32"),
                constants=absent | tile(C, SEGMENT),
                options=SEGMENT_OPTIONS,
            )


def vq_losses(
    z: Tensor,
    codebook: Tensor,
    codes: Tensor,
    mask: Tensor | None = None,
    *,
    commitment: float = COMMITMENT,
    implementation: str | None = None,
) -> VQLosses:
    """Embeddings of `codes` with the straight-through gradient, and the losses of each row.

    A row or an entry whose norm is below 1e-12 is divided by 1e-12 instead.

    Args:
        z: `[M, C]`, C ≤ 1024, M ≥ 0, floating point, not normalised, any strides.
        codebook: `[V, C]`, V ≥ 1, floating point, of any dtype, on the device of `z`.
        codes: int64 `[M]` in [0, V). On CUDA others are not refused: their rows are NaN.
        mask: bool `[M]`, which rows have losses; None: all. The others keep their embedding.
        commitment: β ≥ 0.
        implementation: `triton` (CUDA, not fp64) or `torch`; None: the first that can run.

    Returns:
        `embedding` `[M, C]`, `vq` and `commit` `[M]`, all fp32 (fp64 where an input is). vq is
        differentiable in `codebook`, embedding and commit in `z`; under `triton` dcodebook has the
        same bits in every run.

    Raises:
        TypeError: where a tensor is none, or has the wrong dtype.
        ValueError: where shapes, devices, codes or `commitment` do not fit.
        UnavailableError: where the named implementation cannot run here.
    """
    op = "vq_losses"
    check_tensor(op, "z", z, ("M", Dim("C", 1, MAX_C)))
    M, C = z.shape
    check_tensor(op, "codebook", codebook, (Dim("V"), C), device=z.device)
    check_tensor(op, "codes", codes, (M,), (torch.int64,), z.device)
    if mask is not None:
        check_tensor(op, "mask", mask, (M,), (torch.bool,), z.device)
    if not 0 <= commitment < float("inf"):
        raise ValueError(f"{op}: expected commitment >= 0, got {commitment!r}")
    check_below(op, "codes", codes, len(codebook))
    dtype = torch.promote_types(z.dtype, codebook.dtype)
    if OP.pick(z.device.type, dtype, implementation) == "torch":
        return _torch(z, codebook, codes, mask, float(commitment))
    return VQLosses(*vq_losses_triton(z, codebook, codes, mask, float(commitment)))
