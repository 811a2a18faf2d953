"""The gradient of linear_cross_entropy: dlogits = (softmax − onehot)·dloss in chunks of rows.

6·M·V·D FLOPs: a Triton kernel makes a tile of logits again (never rounded: it stays on chip) and
writes its gradient, then cuBLAS reads that twice, for dx = dlogits W and dweight = dlogitsᵀ x. Both
in Triton would make the logits twice: 8·M·V·D. dweight is summed over chunks in fp32, 8·V·D bytes a
chunk, so chunks are as large as memory allows, not as L2 does.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dar_kernels.triton_support import cast, contiguous_last, dot, launch_options, tl, triton

CHUNK = {"cuda": 2**26, "cpu": 2**24}  # logits at a time: 128 MiB in bf16; 64 MiB in fp32
GROUP = 8  # row tiles that share a weight tile while it is in L2


@triton.jit
def logits_tile(
    x_ptr, weight_ptr, stride_xm, stride_wv, M, V, D, EVEN_D: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows, columns, and fp32 logits of this program's tile, −inf beyond V."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_v = tl.cdiv(V, BLOCK_V)
    group = tl.program_id(0) // (GROUP * tiles_v)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * tiles_v)
    tile_m = group * GROUP + within % height
    tile_v = within // height
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
    depth = tl.arange(0, BLOCK_D)
    # beyond the end the first rows again: their results are not stored
    x_ptrs = x_ptr + (rows % M).to(tl.int64)[:, None] * stride_xm + depth[None, :]
    weight_ptrs = weight_ptr + (cols % V).to(tl.int64)[None, :] * stride_wv + depth[:, None]
    logits = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for start in range(0, D, BLOCK_D):
        if EVEN_D:
            x = tl.load(x_ptrs)
            weight = tl.load(weight_ptrs)
        else:
            x = tl.load(x_ptrs, (depth < D - start)[None, :], 0.0)
            weight = tl.load(weight_ptrs, (depth < D - start)[:, None], 0.0)
        logits = dot(x, weight, logits)
        x_ptrs += BLOCK_D
        weight_ptrs += BLOCK_D
    return tile_v, rows, cols, tl.where(cols[None, :] < V, logits, float("-inf"))


@triton.jit(do_not_specialize=["M"])
def dlogits_kernel(
    x_ptr, weight_ptr, targets_ptr, lse_ptr, dloss_ptr, dlogits_ptr, stride_xm, stride_wv, M, V, D,
    EVEN_D: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    _, rows, cols, logits = logits_tile(
        x_ptr, weight_ptr, stride_xm, stride_wv, M, V, D, EVEN_D, GROUP, BLOCK_M, BLOCK_V, BLOCK_D
    )
    mask = rows < M
    lse = tl.load(lse_ptr + rows, mask, float("inf"))
    dloss = tl.load(dloss_ptr + rows, mask, 0.0)
    target = tl.load(targets_ptr + rows, mask, -1)
    probability = tl.exp(logits - lse[:, None])
    hit = cols[None, :] == target[:, None]
    dlogits = (probability - tl.where(hit, 1.0, 0.0)) * dloss[:, None]
    at = dlogits_ptr + rows.to(tl.int64)[:, None] * V + cols[None, :]
    dlogits = cast(dlogits, dlogits_ptr.dtype.element_ty)
    tl.store(at, dlogits, mask[:, None] & (cols < V)[None, :])


class Tiles(NamedTuple):
    """Launch parameters: chosen from AOT register counts and bytes a FLOP; not timed."""

    block_m: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int

    def constants(self, D: int) -> dict[str, Any]:
        return {
            "EVEN_D": D % self.block_d == 0, "GROUP": GROUP, "BLOCK_M": self.block_m,
            "BLOCK_V": self.block_v, "BLOCK_D": self.block_d,
        }  # fmt: skip

    @property
    def options(self) -> dict[str, Any]:
        return launch_options(num_warps=self.num_warps, num_stages=self.num_stages)


def tiles_for(dtype: torch.dtype, architecture: int) -> Tiles:
    if dtype == torch.float32:  # no matrix units: IEEE products
        return Tiles(64, 128, 32, 8, 2)
    # 256: 85 FLOPs a byte of L2 where 128 has 64, for wgmma; spills on sm_80, no room on sm_120
    return Tiles(128, 256 if architecture in (90, 100) else 128, 64, 8, 3)


def tiles_of(x: Tensor) -> Tiles:
    major, minor = torch.cuda.get_device_capability(x.device) if x.is_cuda else (8, 0)
    return tiles_for(x.dtype, 10 * major + minor)


def chunks(x: Tensor, weight: Tensor) -> Iterator[slice]:
    """Rows whose logits are CHUNK numbers, in whole tiles."""
    size = -(-CHUNK.get(x.device.type, CHUNK["cpu"]) // (128 * len(weight))) * 128
    for start in range(0, len(x), size):
        yield slice(start, start + size)


def wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def inside(targets: Tensor, V: int) -> tuple[Tensor, Tensor]:
    """Targets as an index `[M, 1]` that is in range, and whether they are what it says."""
    return targets.clamp(0, V - 1)[:, None], ((targets >= 0) & (targets < V))[:, None]


def _dlogits_triton(
    x: Tensor, weight: Tensor, targets: Tensor, lse: Tensor, dloss: Tensor
) -> Tensor:
    (M, D), V, launch = x.shape, len(weight), tiles_of(x)
    dlogits = torch.empty(M, V, dtype=x.dtype, device=x.device)
    dlogits_kernel[(triton.cdiv(M, launch.block_m) * triton.cdiv(V, launch.block_v),)](
        x, weight, targets, lse, dloss, dlogits, x.stride(0), weight.stride(0), M, V, D,
        **launch.constants(D), **launch.options,
    )  # fmt: skip
    return dlogits


def _dlogits_torch(
    x: Tensor, weight: Tensor, targets: Tensor, lse: Tensor, dloss: Tensor
) -> Tensor:
    return dlogits_of((x @ weight.T).to(lse.dtype), targets, lse, dloss).to(x.dtype)


def dlogits_of(logits: Tensor, targets: Tensor, lse: Tensor, dloss: Tensor) -> Tensor:
    """`logits` `[M, V]`, in place, become the gradient of their losses times `dloss` `[M]`."""
    dlogits = logits.sub_(lse[:, None]).exp_()
    index, valid = inside(targets, logits.shape[1])
    dlogits.scatter_add_(1, index, -valid.to(lse.dtype))
    return dlogits.mul_(dloss[:, None])


def rows_native(
    logits: Tensor, targets: Tensor, factors: Tensor | None, losses: Tensor, lse: Tensor
) -> None:
    """Losses and logsumexps `[M]` of `logits`, in C++; with factors these become their gradient."""
    from dar_kernels import _native

    threads = torch.get_num_threads()
    _native.cross_entropy_rows(logits, targets.contiguous(), factors, losses, lse, threads)


def _dlogits_native(
    x: Tensor, weight: Tensor, targets: Tensor, lse: Tensor, dloss: Tensor
) -> Tensor:
    logits = x @ weight.T
    losses, again = torch.empty_like(lse), torch.empty_like(lse)
    rows_native(logits, targets, dloss.float(), losses, again)
    return logits


_DLOGITS = {"triton": _dlogits_triton, "native": _dlogits_native, "torch": _dlogits_torch}


@torch.library.custom_op("dar::linear_cross_entropy_backward", mutates_args=())
def linear_cross_entropy_backward(
    dloss: Tensor, x: Tensor, weight: Tensor, targets: Tensor, lse: Tensor, implementation: str
) -> tuple[Tensor, Tensor]:
    x, weight, targets = contiguous_last(x), contiguous_last(weight), targets.contiguous()
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dweight = torch.zeros(weight.shape, dtype=lse.dtype, device=x.device)  # summed in fp32
    with torch.autocast(x.device.type, enabled=False):
        for rows in chunks(x, weight):
            part = x[rows]
            dlogits = _DLOGITS[implementation](
                part, weight, targets[rows], lse[rows], dloss[rows].contiguous()
            )
            add_gradients(dlogits, part, weight, dx[rows], dweight)
    return dx, dweight.to(weight.dtype)


def add_gradients(dlogits: Tensor, x: Tensor, weight: Tensor, dx: Tensor, dweight: Tensor) -> None:
    """Both products of a chunk: `dx` written, `dweight` summed in its own, wider dtype."""
    torch.mm(dlogits, weight, out=dx)
    if x.dtype == dweight.dtype:
        dweight.addmm_(dlogits.T, x)
    else:
        dweight += dlogits.T @ x


@linear_cross_entropy_backward.register_fake
def _(
    dloss: Tensor, x: Tensor, weight: Tensor, targets: Tensor, lse: Tensor, implementation: str
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)
