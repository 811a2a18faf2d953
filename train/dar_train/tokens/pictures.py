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
    cut_all,
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
    wanted = list(dict.fromkeys(_square(view) for view in views))
    choices = [
        partial(centre_crop, size=size)
        if crop is None
        else partial(ten_crop, size=size, number=crop)
        for crop in wanted
    ]
    squares = dict(zip(wanted, cut_all(picture, size, choices), strict=True))
    images = []
    for view in views:
        image = squares[_square(view)]
        if view.move is not None:
            images.append(_moved(image, view, derived_seed(seed, MOVE_STREAM, view.move, index)))
        else:
            mirrored = view.flip if view.crop is None else view.crop >= CROPS // 2 or view.flip
            images.append(image.flip(-1) if mirrored else image)
    return Viewed(torch.stack(images), label)


def _square(view: View) -> int | None:
    """The crop that `view` is made of: a mirror image is its crop's, turned; None: the centre."""
    if view.move is not None or view.crop is None:
        return None
    return view.crop % (CROPS // 2)


def _moved(image: Tensor, view: View, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    how = MOVE._replace(flip=0.5 if view.flip else 0.0)
    return to_uint8(augment(to_float(image[None]), generator, how))[0]
