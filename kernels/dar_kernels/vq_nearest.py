"""code = argmin_v ‖ẑ − ê_v‖², ẑ and ê the l2-normalised rows of z [M, C] and codebook [V, C].

Ties go to the lowest v. Compute bound: 2·M·V·C FLOPs. Reads (M + V)·C·itemsize bytes, writes 8·M;
the [M, V] distances never exist. C++ in kernels/csrc/vq_nearest.cpp, Triton in vq_nearest_triton.
Source: D-AR (arXiv 2505.23660), the tokenizer's quantizer.
"""

import torch
from torch import Tensor

from dar_kernels.checks import Dim, check_tensor
from dar_kernels.dispatch import Op
from dar_kernels.implementations import by_native, by_torch, by_triton
from dar_kernels.vq_nearest_triton import launch, variants

EPS = 1e-12  # smallest norm divided by, as torch.nn.functional.normalize
TILE_M = 2048  # scores of one tile: 2048·1024·4 bytes, which a CPU's second-level cache and L3 hold
TILE_V = 1024


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows over max(norm, EPS), and their squared norms then: exactly 1 unless it was below EPS."""
    norm = x.norm(dim=-1, keepdim=True)
    scale = norm.clamp_min(EPS)
    return x / scale, (norm / scale).square().squeeze(-1)


def vq_nearest_ref(z: Tensor, codebook: Tensor) -> Tensor:
    """The definition, in whatever dtype it is given; in fp64 it is the truth the tests use."""
    z, z_square = _unit(z)
    codebook, square = _unit(codebook)
    distance = z_square[:, None] + square - 2 * z @ codebook.T  # [M, V]
    return torch.where(distance.isnan(), torch.inf, distance).argmin(-1)


def _normalise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Unit rows (0 where not finite), half their squared norms, and which rows are not finite.

    Norms are taken in fp64: an fp32 row of any finite size neither overflows nor vanishes.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float64)
    scale = norm.clamp_min(EPS)
    bad = ~norm.isfinite()
    unit = torch.where(bad, 0, x / scale).to(dtype)
    return unit, (0.5 * (norm / scale).square()).to(dtype).squeeze(-1), bad.squeeze(-1)


def _tiled(z: Tensor, codebook: Tensor) -> Tensor:
    """PyTorch on any device: a running best over tiles of the codebook, for TILE_M rows at a time.

    Maximises ẑ·ê − ‖ê‖²/2. Every tile is as wide as the first (padded with entries that never win),
    so equal entries meet the same matrix product and score the same bits.
    """
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    entries, half, bad = _normalise(codebook, dtype)
    pad = -len(entries) % min(TILE_V, 64 * -(-len(entries) // 64))
    entries = torch.nn.functional.pad(entries, (0, 0, 0, pad))  # [V + pad, C]
    bias = torch.nn.functional.pad(
        half.neg().masked_fill(bad, -torch.inf), (0, pad), value=-torch.inf
    )
    codes = torch.zeros(len(z), dtype=torch.int64, device=z.device)
    for first in range(0, len(z), TILE_M):
        rows, _, bad = _normalise(z[first : first + TILE_M], dtype)
        best = torch.full((len(rows),), -torch.inf, dtype=dtype, device=z.device)
        code = codes[first : first + TILE_M]
        for start in range(0, len(entries), TILE_V):
            stop = start + TILE_V
            score, index = torch.addmm(bias[start:stop], rows, entries[start:stop].T).max(-1)
            better = score > best
            best = torch.where(better, score, best)
            code.copy_(torch.where(better, index + start, code))
        code.masked_fill_(bad, 0)
    return codes


def _compiled(z: Tensor, codebook: Tensor) -> Tensor:
    """C++ on the CPU, kernels/csrc/vq_nearest.cpp: the widest instructions the processor has."""
    from dar_kernels import _native

    codes = torch.empty(len(z), dtype=torch.int64)
    _native.vq_nearest(
        z.detach().float(), codebook.detach().float(), codes, torch.get_num_threads()
    )
    return codes


OP = Op(
    name="vq_nearest",
    implementations=(
        by_triton(launch),
        by_native(_compiled, (torch.float32, torch.float16, torch.bfloat16)),
        by_torch(_tiled),
    ),
)


@torch.library.custom_op("dar::vq_nearest", mutates_args=())
def _vq_nearest(z: Tensor, codebook: Tensor, implementation: str | None) -> Tensor:
    chosen = OP.choose(z.device.type, z.dtype, implementation)
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
        return chosen.run(z, codebook)


@_vq_nearest.register_fake
def _(z: Tensor, codebook: Tensor, implementation: str | None) -> Tensor:
    return z.new_empty(z.shape[0], dtype=torch.int64)


def vq_nearest(z: Tensor, codebook: Tensor, *, implementation: str | None = None) -> Tensor:
    """The nearest codebook entry of each row, both l2-normalised, in fp32 (fp64 for fp64 input).

    A row whose norm is below 1e-12 is divided by 1e-12 instead; a row of zeros is as near to every
    unit entry, so its code is the lowest. A row with NaN or infinity has code 0; a codebook entry
    with one is never chosen while another can be. `triton` and `native` multiply in plain fp32;
    `torch` as precisely as torch.set_float32_matmul_precision asks.

    Args:
        z: `[M, C]`, floating point, M ≥ 0, any strides.
        codebook: `[V, C]`, V ≥ 1, of the dtype and on the device of `z`.
        implementation: `triton` (CUDA, not fp64), `native` (CPU, not fp64) or `torch`; None: the
            first of these that can run.

    Returns:
        int64 `[M]` in [0, V). Not differentiable.

    Raises:
        TypeError: where an argument is no floating point tensor.
        ValueError: where shapes, dtypes or devices do not fit, or no implementation has that name.
        UnavailableError: where the named implementation cannot run here.
    """
    check_tensor("vq_nearest", "z", z, ("M", Dim("C")))
    check_tensor("vq_nearest", "codebook", codebook, (Dim("V"), z.shape[1]), device=z.device)
    if codebook.dtype != z.dtype:
        raise ValueError(f"vq_nearest: expected codebook in {z.dtype}, got {codebook.dtype}")
    codes: Tensor = _vq_nearest(z, codebook, implementation)
    return codes


__all__ = ["OP", "variants", "vq_nearest", "vq_nearest_ref"]
