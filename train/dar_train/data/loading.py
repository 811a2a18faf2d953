"""Batches of pictures in an order that (seed, position) decides, for any ranks and workers.

What is saved is one position, so a run goes on with other ranks and workers than it was saved with;
the states of torchdata's StatefulDataLoader are bound to the number of workers.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from dar_train.data.feeds import Feed, Loaded, Resident, Skipped
from dar_train.data.packed import Packed
from dar_train.data.reading import Reader
from dar_train.data.sets import PictureSet, open_pictures
from dar_train.data.source import check_labels
from dar_train.distributed import Ranks

RESIDENT_BYTES = 16 << 20  # sets of files up to this size, decoded, lie on the device


class PictureBatch(NamedTuple):
    """Samples of the tokenizer's training."""

    images: Tensor  # uint8 [b, 3, R, R]
    labels: Tensor  # int64 [b]
    positions: Tensor  # int64 [b], the samples' numbers in the whole run


class Settings(Protocol):
    """What loading needs of a recipe."""

    @property
    def data(self) -> Path: ...
    @property
    def batch(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def workers(self) -> int: ...


class PictureBatches:
    """`Batches[PictureBatch]`; see `picture_batches`."""

    def __init__(
        self, feed: Feed, skipped: Skipped, fingerprint: str, batch: int, ranks: Ranks
    ) -> None:
        self.fingerprint = fingerprint
        self.batch = batch
        self.ranks = ranks
        self.position = 0
        self._feed = feed
        self._skipped = skipped

    def next(self) -> PictureBatch:
        """This rank's samples of the next optimizer batch, on the device.

        Raises:
            ValueError: where a label is outside the classes.
            ReadingError: where a worker died, or too many samples in a row cannot be read; the
                batch is not lost: asked again, it is read again.
        """
        each = self.batch // self.ranks.world
        first = self.position + self.ranks.rank * each
        images, labels = self._feed.take(range(first, first + each))
        positions = torch.arange(first, first + each, device=images.device)
        self.position += self.batch
        return PictureBatch(images, labels, positions)

    def state_dict(self) -> dict[str, Any]:
        """Samples handed out by all ranks together, and of which data."""
        return {"position": self.position, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, with any number of ranks and workers.

        Raises:
            ValueError: where the state is another data set's, or none.
        """
        position, fingerprint = state.get("position"), state.get("fingerprint")
        if type(position) is not int or position < 0:
            raise ValueError(f"position: expected a number >= 0, got {position!r}")
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"data: expected the data set {str(fingerprint)[:12]} that this run was trained "
                f"on, got {self.fingerprint[:12]}; name the same data, or another --out"
            )
        self.position = position

    def skipped(self) -> Sequence[str]:
        """Samples that could not be read since the last call, each with the reason, each once."""
        return self._skipped.pop()

    def close(self) -> None:
        """Stop the workers; `next` would start others."""
        self._feed.close()


def picture_batches(
    recipe: Settings,
    size: int,
    ranks: Ranks,
    *,
    crop: bool,
    flip: bool,
    pictures: PictureSet | None = None,
    classes: int | None = None,
) -> PictureBatches:
    """Endless batches of `recipe.batch` training pictures of `size` pixels, over all ranks.

    Args:
        recipe: data, batch, seed and workers count.
        size: pixels a side.
        ranks: who takes part; each gets its share of every batch.
        crop: random crops in place of the centre.
        flip: mirror every other sample, drawn.
        pictures: the data set, where it is open already.
        classes: labels are refused from this number on; by default as many as have names.

    Raises:
        ValueError: where the ranks do not divide the batch, the data do not fit, or a label is
            outside the classes.
        ReadingError: where no picture can be read.
    """
    if recipe.batch < 1 or recipe.batch % ranks.world:
        raise ValueError(
            f"batch: expected a positive multiple of the {ranks.world} ranks, got {recipe.batch}"
        )
    pictures = open_pictures(recipe.data, size) if pictures is None else pictures
    classes = len(pictures.label_names) or None if classes is None else classes
    if classes is not None:
        check_labels(pictures, classes)
    reader = Reader(pictures, size, seed=recipe.seed, crop=crop, flip=flip, classes=classes)
    skipped = Skipped()
    small = len(pictures.train) * 3 * size**2 <= RESIDENT_BYTES
    feed: Feed
    if not crop and (small or isinstance(pictures.source, Packed)):
        feed = Resident(reader, ranks.device, skipped)
    else:
        feed = Loaded(reader, ranks.device, skipped, recipe.workers, recipe.batch)
    return PictureBatches(feed, skipped, pictures.fingerprint, recipe.batch, ranks)
