"""What the ops that stream weights past a few rows share: tiles, launches, checks.

A program takes BLOCK_O output channels of W [O, D]; its eight warps take one slice of every tile
along D each, a batched product of [BLOCK_O, BLOCK_K] and [BLOCK_K, rows], and are summed in one
order at the end. The rows of x are the narrow side of that product, padded to 8 or 16: what a row
gives depends on no other row, nor on how many there are. No atomics and no second launch.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dar_kernels import triton_support
from dar_kernels.aot import ARCHITECTURES, Variant
from dar_kernels.checks import Dim, check_tensor
from dar_kernels.quantize import QUANTIZED_DTYPES, QuantizedWeight
from dar_kernels.triton_support import cast, launch_options, tl, triton

WARPS = 8
SLICES = tl.constexpr(WARPS)  # of a tile along D: one a warp
NORM_K = tl.constexpr(512)  # of a row at once for its norm; one number for any R, for equal bits
LINES = tl.constexpr(16)  # cache lines of each channel fetched ahead: 32 KiB of 16 channels


@triton.jit
def prefetch(weight_rows, D):
    """Ask the second-level cache for the first LINES lines of each weight row, and do not wait."""
    per_line: tl.constexpr = 128 // (weight_rows.dtype.element_ty.primitive_bitwidth // 8)
    k = tl.minimum(tl.arange(0, LINES) * per_line, D - 1)
    address = (weight_rows[:, None] + k[None, :]).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def inverse_rms(x_rows, valid, D, eps, ROWS: tl.constexpr):
    """1 / sqrt(mean x² + eps) of each row."""
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, D, NORM_K):
        k = start + tl.arange(0, NORM_K)
        mask = valid[:, None] & (k < D)[None, :]
        x = tl.load(x_rows[:, None] + k[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(x * x, 1)
    return tl.rsqrt(total / D + eps)


@triton.jit
def x_tile(x_rows, valid, k, D, rstd, norm_ptr):
    """x at k [slices, BLOCK_K], `[slices, BLOCK_K, rows]`: as it is, or normalised as the prior
    does it: in fp32, rounded, times the norm's weight, rounded."""
    mask = valid[None, None, :] & (k < D)[:, :, None]
    x = tl.load(x_rows[None, None, :] + k[:, :, None], mask=mask, other=0.0)
    if norm_ptr is not None:
        weight = tl.load(norm_ptr + k, mask=k < D, other=0.0).to(tl.float32)
        unit = cast(x.to(tl.float32) * rstd[None, None, :], x.dtype)
        x = cast(unit.to(tl.float32) * weight[:, :, None], x.dtype)
    return x


@triton.jit
def weight_tile(weight_rows, k, D, dtype: tl.constexpr):
    """Weights at k, `[slices, BLOCK_O, BLOCK_K]` in `dtype`, exactly; not to be kept in a cache."""
    pointers = weight_rows[None, :, None] + k[:, None, :]
    w = tl.load(pointers, mask=(k < D)[:, None, :], other=0.0, eviction_policy="evict_first")
    if w.dtype == tl.uint8:  # e4m3 where the chip cannot convert it: fp16 has a bias larger by 8
        bits = w.to(tl.uint16)
        bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        return cast(bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0, dtype)
    elif w.dtype == dtype:
        return w
    else:
        return cast(w, dtype)


@triton.jit
def channel_sums(acc, scale_ptr, o):
    """`[BLOCK_O, rows]`: the sum over the slices, in one order, times the channel's scale."""
    y = tl.sum(acc, 0)
    if scale_ptr is not None:
        y *= tl.load(scale_ptr + o)[:, None]
    return y


class Launch(NamedTuple):
    """How a shape is launched: the padded rows, channels a program, and the rest of the call."""

    rows: int
    channels: int
    constants: dict[str, Any]
    options: dict[str, Any]


def launch(
    R: int, OUT: int, x_bytes: int, itemsize: int, norm: bool, hopper: bool, weights: int = 1
) -> Launch:
    """Tiles of 512 bytes a channel, in bf16 256 weights, which divide every D but 3200; 128 weights
    where x is fp32, whose products take no matrix instruction and more registers.

    Rows are padded to 8 or 16: in 16 bits both take the same m16n8k16 products and sums in the same
    order (read from the intermediate code for sm_80 and sm_90); in fp32 they would not, so 16.
    16 channels a program, so that O = 1024 gives 64 programs with 32 KiB in flight each; 32 where
    that still gives two to each of 132 multiprocessors, which halves the work on x. Four to five
    stages take 48 to 99 KiB of shared memory, so two programs fit on sm_90. Chosen from AOT
    register counts and bytes in flight; not timed, and neither is the dependent launch of sm_90.
    """
    rows = 8 if R <= 8 and x_bytes == 2 else 16
    channels = 32 if OUT >= 32 * 2 * 132 and weights == 1 else 16
    block_k = 16 if x_bytes == 4 else 64 // itemsize
    stages = 5 if channels * weights == 16 and itemsize > 1 else 4
    on_cuda = not triton_support.INTERPRETED
    constants = {
        "ROWS": rows, "BLOCK_O": channels, "BLOCK_K": block_k,
        "PREFETCH": on_cuda and (norm or hopper), "PDL": hopper,
    }  # fmt: skip
    more = {"launch_pdl": True} if hopper else {}
    return Launch(
        rows, channels, constants, launch_options(num_warps=WARPS, num_stages=stages, **more)
    )


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; (0, 0) of what is no GPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def as_stored(values: Tensor) -> Tensor:
    """Weights as the kernel reads them: fp8 as bytes where the chip cannot convert it."""
    if values.dtype == torch.float8_e4m3fn and capability(values.device) < (8, 9):
        return values.view(torch.uint8)
    return values


def parts(weight: Tensor | QuantizedWeight) -> tuple[Tensor, Tensor | None]:
    """What is streamed, and the scale of each channel where there is one."""
    return weight if isinstance(weight, QuantizedWeight) else (weight, None)


def check_inputs(
    op: str,
    x: Tensor,
    weights: dict[str, Tensor | QuantizedWeight],
    norm_weight: Tensor | None,
    eps: float,
) -> int:
    """O; raise TypeError or ValueError where an argument does not fit."""
    check_tensor(op, "x", x, (Dim("R"), Dim("D")))
    D, device = x.shape[1], x.device
    OUT = 0
    for name, weight in weights.items():
        values, scale = parts(weight)
        allowed = (x.dtype,) if scale is None else QUANTIZED_DTYPES
        check_tensor(op, name, values, (OUT or Dim("O"), D), allowed, device)
        OUT = values.shape[0]
        if values.stride(1) != 1 and D > 1:
            raise ValueError(
                f"{op}: expected {name} contiguous along D, got strides {list(values.stride())}"
            )
        if scale is not None:
            check_tensor(op, f"{name}.scale", scale, (OUT,), (torch.float32,), device)
    if norm_weight is not None:
        check_tensor(op, "norm_weight", norm_weight, (D,), (x.dtype,), device)
    if isinstance(eps, bool) or not isinstance(eps, float | int) or not eps >= 0:
        raise ValueError(f"{op}: expected eps >= 0, got {eps!r}")
    return OUT


def stored_types() -> Iterator[tuple[str, str, tuple[int, int], int]]:
    """(type of x, of the weights, bytes of an element of each, architecture), ahead of time.

    float8_e4m3fn is read as bytes on sm_80, which has no instruction to convert it.
    """
    for architecture in ARCHITECTURES:
        yield "bf16", "bf16", (2, 2), architecture
        yield "bf16", "i8", (2, 1), architecture
        yield "bf16", "fp8e4nv" if architecture >= 89 else "u8", (2, 1), architecture
        yield "fp32", "fp32", (4, 4), architecture


def variant(kernel: Any, types: dict[str, str | None], how: Launch, architecture: int) -> Variant:
    """A kernel of one weight or two; `types` of its pointers, None for what is not given."""
    sizes = [name for name in kernel.arg_names if name.startswith("stride_")] + ["OUT", "D"]
    given = {f"{name}_ptr": f"*{t}" for name, t in types.items() if t is not None}
    absent = {f"{name}_ptr": None for name, t in types.items() if t is None}
    return Variant(
        kernel=kernel,
        signature={**given, "R": "i32", **dict.fromkeys(sizes, "i32"), "eps": "fp32"},
        constants={**absent, **how.constants},
        aligned=tuple(sizes),
        options=how.options,
        architectures=(architecture,),
    )
