"""Squares of pictures: the shorter side is resized to `side` pixels and a square of R taken.

One crop costs one decode, of a JPEG at the largest reduction that keeps `side` pixels, and R²
pixels of resampling: what lies outside the square is not resampled.
Source: ADM's centre and random crops; the ten crops at 1.1 R of the prior, as in LlamaGen.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dar_train.data.source import BROKEN, unreadable

CROPS = 10  # of ten_crop
TEN_CROP_SCALE = 1.1  # side of the square that the ten crops are taken of, over their own
LARGEST_SIDE = 1.25  # of random crops, over the crop's: at least 0.8 of the shorter side is seen


class Square(NamedTuple):
    """Which square of a picture, in pixels of the picture resized."""

    side: int  # the shorter side after resizing
    left: int
    top: int
    flip: bool = False  # mirrored, after the cut


Choice = Callable[[int, int], Square]  # of a picture's width and height


def resized(width: int, height: int, side: int) -> tuple[int, int]:
    """Width and height once the shorter one is `side` pixels."""
    scale = side / min(width, height)
    return max(side, round(width * scale)), max(side, round(height * scale))


def centre_crop(width: int, height: int, size: int) -> Square:
    """The middle, the shorter side whole."""
    wide, high = resized(width, height, size)
    return Square(size, (wide - size) // 2, (high - size) // 2)


def random_crop(width: int, height: int, size: int, draws: Sequence[float]) -> Square:
    """By three draws in [0, 1): the shorter side, `size` to 1.25 `size` pixels, then the place."""
    largest = math.ceil(size * LARGEST_SIDE)
    side = size + int(draws[0] * (largest - size + 1))
    wide, high = resized(width, height, side)
    return Square(side, int(draws[1] * (wide - size + 1)), int(draws[2] * (high - size + 1)))


def ten_crop(width: int, height: int, size: int, number: int) -> Square:
    """Crop 0 … 9 of the middle square at 1.1 times the size.

    0 to 4 are top left, top right, bottom left, bottom right and the middle; 5 to 9 the mirror
    images of those.

    Raises:
        ValueError: for another number.
    """
    if not 0 <= number < CROPS:
        raise ValueError(f"number: expected a crop 0 to {CROPS - 1}, got {number}")
    side = int(size * TEN_CROP_SCALE)
    wide, high = resized(width, height, side)
    left, top = (wide - side) // 2, (high - side) // 2
    free, place = side - size, number % 5
    if place == 4:
        # round, as torchvision's centre crop does
        middle = round(free / 2)
        return Square(side, left + middle, top + middle, number >= 5)
    return Square(side, left + free * (place % 2), top + free * (place // 2), number >= 5)


def cut(picture: Image.Image | NDArray[np.uint8], size: int, choose: Choice) -> Tensor:
    """The square that `choose` names, resized: uint8 [3, size, size], on white where transparent.

    Raises:
        UnreadableError: where the picture turns out to be damaged.
    """
    return cut_all(picture, size, [choose])[0]


def cut_all(
    picture: Image.Image | NDArray[np.uint8], size: int, choices: Sequence[Choice]
) -> list[Tensor]:
    """Several squares of a picture that is decoded once; a picture can be cut up but once.

    Raises:
        UnreadableError: where the picture turns out to be damaged.
    """
    if not isinstance(picture, Image.Image):
        picture = Image.fromarray(picture)
    width, height = picture.size
    squares = [choose(width, height) for choose in choices]
    try:
        # None for what is no JPEG; else its size once decoded, with fractions
        drafted = picture.draft(None, resized(width, height, max(s.side for s in squares)))
        flat = _flat(picture)
        shown = (width, height) if drafted is None else drafted[1][2:]
        return [torch.from_numpy(_pixels(flat, shown, (width, height), size, s)) for s in squares]
    except BROKEN as error:
        raise unreadable(error) from error


def _pixels(
    flat: Image.Image,
    shown: tuple[float, float],
    whole: tuple[int, int],
    size: int,
    square: Square,
) -> NDArray[np.uint8]:
    """`square` of a picture of `whole` pixels that was decoded to `shown` pixels, [3, R, R]."""
    wide, high = resized(*whole, square.side)
    if flat.size == (wide, high) == (size, size):
        pixels = np.asarray(flat)
    else:
        across, down = shown[0] / wide, shown[1] / high  # pixels decoded a pixel of the crop
        box = (
            square.left * across,
            square.top * down,
            min((square.left + size) * across, flat.width),
            min((square.top + size) * down, flat.height),
        )
        pixels = np.asarray(flat.resize((size, size), Image.Resampling.BICUBIC, box=box))
    if square.flip:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _flat(picture: Image.Image) -> Image.Image:
    """RGB, on white where it is transparent; decodes."""
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    drawn = picture.convert("RGBA")
    white = Image.new("RGBA", drawn.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, drawn).convert("RGB")
