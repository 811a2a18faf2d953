"""Sample p of a run, read: the same whoever reads it, with damaged files replaced.

A function of (data, seed, position): index by the order, crop and flip by the position's draws.
What cannot be read gives way to the next sample of the order that can.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dar_train.data.crops import centre_crop, cut, random_crop
from dar_train.data.order import Order, derived_seed, uniforms
from dar_train.data.sets import PictureSet
from dar_train.data.source import UnreadableError, check_label

MOST_UNREADABLE = 100  # samples in a row, after which it is not single files that are damaged
CROP_STREAM = 10  # of a seed
DRAWS = 4  # a sample: three of the crop, one of the flip


class ReadingError(RuntimeError):
    """The data cannot be read, or what reads them died."""


class Piece(NamedTuple):
    """Neighbouring samples of a batch."""

    images: Tensor  # uint8 [n, 3, R, R]
    labels: Tensor  # int64 [n]
    skipped: list[tuple[int, str]]  # index, and name with reason
    failure: Exception | None = None  # in place of the samples


def flips(seed: int, position: int, count: int) -> Tensor:
    """Which of the samples from `position` on are mirrored, bool [count]."""
    drawn = uniforms(derived_seed(seed, CROP_STREAM), position, count, DRAWS)
    return torch.from_numpy(drawn[:, 3] < 0.5)


class Reader(Dataset[Piece]):
    """Samples by ranges of positions; runs in the processes that read."""

    def __init__(
        self,
        pictures: PictureSet,
        size: int,
        *,
        seed: int,
        crop: bool,
        flip: bool,
        classes: int | None = None,
    ) -> None:
        self.pictures = pictures
        self.order = Order(pictures.train, seed)
        self.size = size
        self.crop = crop
        self.flip = flip
        self.classes = classes
        self.seed = seed
        self._seed = derived_seed(seed, CROP_STREAM)

    def read(self, index: int, draws: Sequence[float] | None) -> tuple[Tensor, int]:
        """Sample `index` of the data, under a position's draws or, with none, as it is.

        Raises:
            UnreadableError: where it is damaged or missing.
            ValueError: where its label is outside the classes.
        """
        sample = self.pictures.read(index)
        if self.classes is not None:
            check_label(sample.label, self.classes, self.pictures.name(index))
        choose = partial(centre_crop, size=self.size)
        if self.crop and draws is not None:
            choose = partial(random_crop, size=self.size, draws=draws[:3])
        image = cut(sample.picture, self.size, choose)
        mirrored = self.flip and draws is not None and draws[3] < 0.5
        return image.flip(-1) if mirrored else image, sample.label

    def sample(self, position: int, skipped: list[tuple[int, str]]) -> tuple[Tensor, int]:
        """Picture uint8 [3, R, R] and label of a position; what was passed over joins `skipped`.

        Raises:
            ValueError: where its label is outside the classes.
            ReadingError: where too many in a row cannot be read.
        """
        draws = uniforms(self._seed, position, 1, DRAWS)[0].tolist()
        first = ""
        for ahead in range(MOST_UNREADABLE):
            index = int(self.order.take(position + ahead, 1))
            try:
                return self.read(index, draws)
            except UnreadableError as error:
                skipped.append((index, f"{self.pictures.name(index)}: {error}"))
                first = first or skipped[-1][1]
        raise ReadingError(
            f"data: expected a readable picture among {MOST_UNREADABLE} in a row, got none; "
            f"the first is {first}"
        )

    def __getitem__(self, positions: range) -> Piece:
        images = torch.empty(len(positions), 3, self.size, self.size, dtype=torch.uint8)
        labels = torch.empty(len(positions), dtype=torch.int64)
        skipped: list[tuple[int, str]] = []
        for row, position in enumerate(positions):
            try:
                images[row], labels[row] = self.sample(position, skipped)
            except (ValueError, ReadingError) as error:  # told by whoever asked, without a trace
                return Piece(images, labels, skipped, error)
        return Piece(images, labels, skipped)
