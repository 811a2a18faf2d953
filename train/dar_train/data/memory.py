"""A whole data set in memory, 3·R² bytes a picture: for the small ones of reports and demos."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dar_train.data.crops import centre_crop, cut
from dar_train.data.packed import Packed
from dar_train.data.sets import PictureSet, open_pictures
from dar_train.data.source import UnreadableError
from dar_train.reporting import logger


class Pictures(NamedTuple):
    """A data set in memory, split for training."""

    images: Tensor  # uint8 [M, 3, R, R], centre crops
    labels: Tensor  # int64 [M]
    names: list[str]
    label_names: list[str]
    train: Tensor  # int64 indices
    held_out: Tensor  # int64 indices


def load_pictures(path: Path, size: int) -> Pictures:
    """Every readable picture of what `open_pictures` reads; the others are named in the log.

    Raises:
        ValueError: where the path is missing, holds no pictures, or holds pictures of another size.
    """
    pictures = open_pictures(path, size)
    source, labels = pictures.source, pictures.labels
    if isinstance(source, Packed) and labels is not None:
        images = torch.from_numpy(np.ascontiguousarray(source.images.transpose(0, 3, 1, 2)))
        names = list(source.names)
        return Pictures(
            images, torch.from_numpy(labels), names, list(source.label_names),
            pictures.train, pictures.held_out,
        )  # fmt: skip
    return _read(pictures, size)


def _read(pictures: PictureSet, size: int) -> Pictures:
    is_held_out = torch.zeros(len(pictures), dtype=torch.bool)
    is_held_out[pictures.held_out] = True
    images, labels, kept = [], [], []
    for index in range(len(pictures)):
        try:
            sample = pictures.read(index)
            images.append(cut(sample.picture, size, partial(centre_crop, size=size)))
        except UnreadableError as error:
            logger.warning("data: skipped %s: %s", pictures.name(index), error)
            continue
        labels.append(sample.label)
        kept.append(index)
    split = is_held_out[kept]
    if not len(kept) or bool(split.all()) or not bool(split.any()):
        raise ValueError("data: expected readable pictures to train on and to hold out, got none")
    return Pictures(
        torch.stack(images),
        torch.tensor(labels, dtype=torch.int64),
        [pictures.name(index) for index in kept],
        list(pictures.label_names),
        (~split).nonzero().flatten(),
        split.nonzero().flatten(),
    )
