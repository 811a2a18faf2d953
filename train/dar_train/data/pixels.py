"""Pictures as numbers: bytes [0, 255] and floats [-1, 1]; one pass over the pixels each way."""

import torch
from torch import Tensor


def to_float(images: Tensor) -> Tensor:
    """uint8 [B, 3, R, R] to float32 in [-1, 1]."""
    return images.to(torch.float32).mul_(1 / 127.5).sub_(1.0)


def to_uint8(images: Tensor) -> Tensor:
    """Float in [-1, 1], clamped, to uint8."""
    return images.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def chunks(x: Tensor, size: int) -> list[Tensor]:
    """`x` cut into pieces of at most `size` rows."""
    return [x[start : start + size] for start in range(0, len(x), size)]
