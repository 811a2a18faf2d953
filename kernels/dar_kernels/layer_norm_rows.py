"""What the ops with LN without affine, eps 1e-6, share: one row a program, and what they accept."""

from typing import Any

import torch
from torch import Tensor

from dar_kernels.triton_support import TRITON_DTYPES, contiguous_last, launch_options, tl, triton

EPS = 1e-6
MAX_DIM = 16_384  # one program keeps a whole row in registers
DTYPES = (*TRITON_DTYPES, torch.float64)


@triton.jit
def row_statistics(x, mask, D, eps):
    """Mean of an fp32 row in two parts, and 1 / deviation; `x` is 0 outside `mask`.

    The second part is the rounding of the first, which at 100 deviations from 0 would be the
    largest error of all.
    """
    mean = tl.sum(x, 0) / D
    centred = tl.where(mask, x - mean, 0.0)
    left = tl.sum(centred, 0) / D
    return mean, left, tl.rsqrt(tl.sum(centred * centred, 0) / D - left * left + eps)


@triton.jit
def normalise_row(x, mask, D, eps):
    """The normalised row, 0 outside `mask` as `x` is, and 1 / deviation."""
    mean, left, rstd = row_statistics(x, mask, D, eps)
    return tl.where(mask, (x - mean - left) * rstd, 0.0), rstd


@triton.jit
def normalise_row_backward(dx_hat, x_hat, rstd, D):
    """The gradient of the row from that of its normalised form."""
    return rstd * (dx_hat - tl.sum(dx_hat, 0) / D - x_hat * (tl.sum(dx_hat * x_hat, 0) / D))


def row_launch(D: int) -> tuple[int, dict[str, Any]]:
    """BLOCK_D and launch options of kernels with one row a program.

    Eight elements a thread, one 16-byte access in bf16, and no more than 16 warps. Chosen from AOT
    register counts; not timed.
    """
    block = int(triton.next_power_of_2(D))
    return block, launch_options(num_warps=min(16, max(1, block // 256)), num_stages=1)


def as_rows(x: Tensor) -> Tensor:
    """`[..., D]` as `[M, D]`: a view where one stride fits all rows, as of a chunk; else a copy."""
    return contiguous_last(x.reshape(-1, x.shape[-1]))


def check_alike(op: str, x: Tensor, **others: Tensor) -> None:
    """Refuse `x` unless `[B, N, D]` of floating point, and the others unless like it."""
    _check_floating(op, "x", x)
    if x.ndim != 3 or not 1 <= x.shape[-1] <= MAX_DIM:
        raise ValueError(f"{op}: expected x [B, N, 1 <= D <= {MAX_DIM}], got {list(x.shape)}")
    for name, tensor in others.items():
        check_tensor(op, name, tensor, tuple(x.shape), x)


def check_tensor(op: str, name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    """Refuse the tensor unless of this shape and on the device and in the dtype of `x`.

    Autocast may mix dtypes.
    """
    _check_floating(op, name, tensor)
    if tensor.shape != shape:
        raise ValueError(f"{op}: expected {name} {list(shape)}, got {list(tensor.shape)}")
    if tensor.device != x.device:
        raise ValueError(f"{op}: expected {name} on {x.device}, got {tensor.device}")
    if tensor.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"{op}: expected {name} in {x.dtype}, got {tensor.dtype}")


def _check_floating(op: str, name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: expected {name} a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{op}: expected {name} in one of {DTYPES}, got {tensor.dtype}")


def lowered(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype of autocast where it is on, else as they are."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) for t in tensors)
