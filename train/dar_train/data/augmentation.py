"""Random changes of whole batches: flips, small affine maps, colours; one resampling a batch."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Augmentation(NamedTuple):
    """Ranges and probabilities of the tokenizer's augmentation."""

    flip: float = 0.5
    affine: float = 0.7  # probability of a random affine map
    scale: float = 0.15  # 1 ± scale
    shift: float = 3.0  # pixels at 32 x 32, in proportion at other sizes
    rotation: float = 10.0  # degrees
    permute: float = 0.15  # probability of permuted colour channels
    jitter: float = 0.3  # probability of a random contrast towards white


DEFAULT_AUGMENTATION = Augmentation()


DRAWS = 14  # numbers that a picture's change takes


def augment(
    images: Tensor, generator: torch.Generator, how: Augmentation = DEFAULT_AUGMENTATION
) -> Tensor:
    """`augment_drawn` by numbers of `generator`, which is on the device of `images`."""
    drawn = torch.rand(len(images), DRAWS, generator=generator, device=images.device)
    return augment_drawn(images, drawn, how)


def augment_drawn(
    images: Tensor, drawn: Tensor, how: Augmentation = DEFAULT_AUGMENTATION
) -> Tensor:
    """Random flips, small affine maps on white, and colour changes; [B, 3, R, R] in [-1, 1].

    `drawn` [B, 14] is uniform in [0, 1). Pictures stand on white, so the complement 1 - x is
    resampled with zero padding.
    """
    B, _, R, _ = images.shape
    device = images.device
    next_draw = 0

    def uniform(*shape: int) -> Tensor:
        nonlocal next_draw
        first, next_draw = next_draw, next_draw + math.prod(shape[1:])
        return drawn[:, first:next_draw].reshape(shape)

    def signed(*shape: int) -> Tensor:
        return 2 * uniform(*shape) - 1

    moved = (uniform(B) < how.affine).to(images.dtype)
    mirrored = 1 - 2 * (uniform(B) < how.flip).to(images.dtype)
    scale = 1 + how.scale * signed(B) * moved
    angle = math.radians(how.rotation) * signed(B) * moved
    shift = 2 * how.shift / 32 * signed(B, 2) * moved[:, None]
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    theta = torch.empty(B, 2, 3, device=device, dtype=images.dtype)
    theta[:, 0, 0], theta[:, 0, 1], theta[:, 0, 2] = cos * mirrored, -sin, shift[:, 0]
    theta[:, 1, 0], theta[:, 1, 1], theta[:, 1, 2] = sin * mirrored, cos, shift[:, 1]
    grid = F.affine_grid(theta, [B, 3, R, R], align_corners=False)
    ink = F.grid_sample(1 - images, grid, padding_mode="zeros", align_corners=False)

    order = uniform(B, 3).argsort(dim=1)
    order = torch.where(
        uniform(B, 1) < how.permute, order, torch.arange(3, device=device).expand(B, 3)
    )
    ink = ink.gather(1, order[:, :, None, None].expand(B, 3, R, R))
    strength = 0.7 + 0.3 * uniform(B, 3, 1, 1)
    strength = torch.where(uniform(B, 1, 1, 1) < how.jitter, strength, 1.0)
    return 1 - ink * strength
