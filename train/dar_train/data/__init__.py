"""Pictures for training: sources by number, crops, an order without state, batches that resume."""

from dar_train.data.augmentation import Augmentation, augment, augment_drawn
from dar_train.data.crops import CROPS, Square, centre_crop, cut, cut_all, random_crop, ten_crop
from dar_train.data.loading import PictureBatch, PictureBatches, picture_batches
from dar_train.data.memory import Pictures, load_pictures
from dar_train.data.order import Order, derived_seed, uniforms
from dar_train.data.pixels import chunks, to_float, to_uint8
from dar_train.data.reading import ReadingError
from dar_train.data.sets import HeldOut, PictureSet, held_out_pictures, open_pictures
from dar_train.data.source import Sample, Source, UnreadableError

__all__ = [
    "CROPS",
    "Augmentation",
    "HeldOut",
    "Order",
    "PictureBatch",
    "PictureBatches",
    "PictureSet",
    "Pictures",
    "ReadingError",
    "Sample",
    "Source",
    "Square",
    "UnreadableError",
    "augment",
    "augment_drawn",
    "centre_crop",
    "chunks",
    "cut",
    "cut_all",
    "derived_seed",
    "held_out_pictures",
    "load_pictures",
    "open_pictures",
    "picture_batches",
    "random_crop",
    "ten_crop",
    "to_float",
    "to_uint8",
    "uniforms",
]  # fmt: skip
