"""Checks that ops share, for their public functions: before any launch, naming op and argument."""

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_tensors(op: str, **tensors: Tensor | None) -> None:
    """Each is a floating-point tensor on the device of the first; None is passed over.

    Raises:
        TypeError: where one is no tensor or of another dtype.
        ValueError: where one is on another device.
    """
    device: torch.device | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: expected {name} a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{op}: expected {name} in one of {DTYPES}, got {tensor.dtype}")
        device = tensor.device if device is None else device
        if tensor.device != device:
            raise ValueError(f"{op}: expected {name} on {device}, got {tensor.device}")


def check_norm(op: str, x: Tensor, max_dim: int, eps: float, **affine: Tensor | None) -> None:
    """`x` is `[..., D]` with D ≤ `max_dim`, eps > 0, each of `affine` `[D]` as `x` or in fp32.

    Raises:
        TypeError: where one of `affine` is of another dtype.
        ValueError: where a shape or eps does not fit.
    """
    if x.ndim < 1 or not 1 <= x.shape[-1] <= max_dim:
        raise ValueError(f"{op}: expected x [..., 1 <= D <= {max_dim}], got {list(x.shape)}")
    if not eps > 0:
        raise ValueError(f"{op}: expected eps > 0, got {eps}")
    for name, tensor in affine.items():
        if tensor is None:
            continue
        if tensor.shape != x.shape[-1:]:
            raise ValueError(f"{op}: expected {name} [{x.shape[-1]}], got {list(tensor.shape)}")
        if tensor.dtype not in (x.dtype, torch.float32):
            raise TypeError(f"{op}: expected {name} in {x.dtype} or fp32, got {tensor.dtype}")
