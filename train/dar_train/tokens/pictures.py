"""The views of one picture, as the tokenizer sees them: one read and one decode for all of them."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dar_train.data import (
    CROPS,
    Augmentation,
    Source,
    augment,
    centre_crop,
    cut,
    derived_seed,
    ten_crop,
    to_float,
    to_uint8,
)
from dar_train.tokens.manifest import View

MOVE = Augmentation(affine=1.0, scale=0.05, shift=1.5, rotation=0.0, permute=0.0, jitter=0.0)
MOVE_STREAM = 5  # of a seed


class Viewed(NamedTuple):
    """A picture, seen."""

    images: Tensor  # uint8 [views, 3, R, R]
    label: int


def viewed(source: Source, index: int, views: Sequence[View], size: int, seed: int) -> Viewed:
    """Picture `index` under `views`, in squares of `size` pixels.

    Raises:
        UnreadableError: where it is damaged or missing.
    """
    picture, label = source.read(index)
    squares: dict[int | None, Tensor] = {}  # a mirror image is its crop's, turned

    def square(crop: int | None) -> Tensor:
        if crop not in squares:
            choose = partial(centre_crop, size=size)
            if crop is not None:
                choose = partial(ten_crop, size=size, number=crop)
            squares[crop] = cut(picture, size, choose)
        return squares[crop]

    images = []
    for view in views:
        if view.move is not None:
            images.append(
                _moved(square(None), view, derived_seed(seed, MOVE_STREAM, view.move, index))
            )
        elif view.crop is not None and view.crop >= CROPS // 2:
            images.append(square(view.crop - CROPS // 2).flip(-1))
        else:
            image = square(view.crop)
            images.append(image.flip(-1) if view.flip else image)
    return Viewed(torch.stack(images), label)


def _moved(image: Tensor, view: View, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    how = MOVE._replace(flip=0.5 if view.flip else 0.0)
    return to_uint8(augment(to_float(image[None]), generator, how))[0]
