"""Crops against resizing the whole picture first, on pictures whose pixels are known."""

import io
from functools import partial
from importlib import import_module

import numpy as np
import pytest
import torch
from data_helpers import DAMAGE, encoded, pixels
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dar_train.data import UnreadableError, centre_crop, cut, cut_all, random_crop, ten_crop
from dar_train.data.crops import Square, resized
from dar_train.data.source import opened
from dar_train.losses import import_torchvision

SIDES = st.integers(3, 90)
MIDDLE = partial(centre_crop, size=8)


def whole_first(picture: Image.Image, size: int, square: Square) -> torch.Tensor:
    """The crop as it is defined: resize everything, then cut."""
    wide = resized(*picture.size, square.side)
    flat = picture.convert("RGB").resize(wide, Image.Resampling.BICUBIC)
    box = (square.left, square.top, square.left + size, square.top + size)
    pixels = np.asarray(flat.crop(box)).transpose(2, 0, 1)
    return torch.from_numpy(pixels[:, :, ::-1].copy() if square.flip else pixels.copy())


def check_inside(square: Square, width: int, height: int, size: int) -> None:
    wide, high = resized(width, height, square.side)
    assert 0 <= square.left <= wide - size
    assert 0 <= square.top <= high - size


@given(SIDES, SIDES, st.integers(2, 40), st.tuples(*[st.floats(0, 1, exclude_max=True)] * 3))
def test_random_crops_are_cuts_of_the_resized_picture(width, height, size, draws) -> None:
    picture = pixels(5, width, height)
    square = random_crop(width, height, size, draws)
    check_inside(square, width, height, size)
    got = cut(picture, size, lambda w, h: random_crop(w, h, size, draws))
    expected = whole_first(picture, size, square)
    assert (got.int() - expected.int()).abs().max() <= 1  # Pillow rounds between its two passes


@given(SIDES, SIDES, st.integers(2, 40), st.integers(0, 9))
def test_ten_crops_are_cuts_of_the_resized_picture(width, height, size, number) -> None:
    picture = pixels(9, width, height)
    square = ten_crop(width, height, size, number)
    check_inside(square, width, height, size)
    got = cut(picture, size, lambda w, h: ten_crop(w, h, size, number))
    assert (got.int() - whole_first(picture, size, square).int()).abs().max() <= 1


def test_ten_crops_are_those_of_torchvision() -> None:
    import_torchvision()
    transforms = import_module("torchvision.transforms.functional")
    size, inner = 20, 22
    picture = pixels(3, inner, inner)
    theirs = [np.asarray(crop) for crop in transforms.ten_crop(picture, size)]
    ours = [
        cut(picture, size, lambda w, h, n=number: ten_crop(w, h, size, n)).permute(1, 2, 0).numpy()
        for number in range(10)
    ]
    # theirs are corners of the mirrored picture, so left and right change places
    for number, other in enumerate([0, 1, 2, 3, 4, 6, 5, 8, 7, 9]):
        np.testing.assert_array_equal(ours[number], theirs[other])


@pytest.mark.parametrize(
    ("number", "place"),
    list(enumerate([(0, 0), (2, 0), (0, 2), (2, 2), (1, 1)])),
    ids=["top-left", "top-right", "bottom-left", "bottom-right", "middle"],
)
def test_ten_crop_places_and_mirror_images(number, place) -> None:
    values = np.arange(22 * 22 * 3).reshape(22, 22, 3).astype(np.uint8)
    left, top = place
    expected = torch.from_numpy(values[top : top + 20, left : left + 20].transpose(2, 0, 1).copy())
    plain = cut(values, 20, lambda w, h: ten_crop(w, h, 20, number))
    mirrored = cut(values, 20, lambda w, h: ten_crop(w, h, 20, number + 5))
    assert torch.equal(plain, expected)
    assert torch.equal(mirrored, expected.flip(-1))


def test_ten_crop_of_a_wide_picture_is_of_its_middle() -> None:
    assert ten_crop(44, 22, 20, 0) == Square(22, 11, 0)
    assert ten_crop(44, 22, 20, 8) == Square(22, 13, 2, True)


@pytest.mark.parametrize("number", [-1, 10])
def test_ten_crop_refuses_other_numbers(number) -> None:
    with pytest.raises(ValueError, match="expected a crop 0 to 9, got") as caught:
        cut(pixels(0), 8, lambda w, h: ten_crop(w, h, 8, number))
    assert not isinstance(caught.value, UnreadableError)


def test_centre_crop_takes_the_middle() -> None:
    values = np.zeros((10, 30, 3), np.uint8)
    values[:, 10:20] = 200
    assert int(cut(values, 10, lambda w, h: centre_crop(w, h, 10)).min()) == 200


def test_random_crops_see_everything_and_at_least_four_fifths() -> None:
    rng = np.random.default_rng(0)
    squares = [random_crop(64, 64, 32, rng.random(3)) for _ in range(500)]
    assert {square.side for square in squares} == set(range(32, 41))
    widest = [square for square in squares if square.side == 40]
    assert {square.left for square in widest} == set(range(9))


@pytest.mark.parametrize("size", [64, 100, 256, 400])
@pytest.mark.parametrize("number", [0, 4, 8])
def test_reduced_decoding_of_a_jpeg_changes_little(size, number) -> None:
    rng = np.random.default_rng(1)
    rough = Image.fromarray(rng.integers(0, 255, (37, 53, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    rough.resize((1061, 743), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
    picture = Image.open(io.BytesIO(buffer.getvalue()))
    full = Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")
    got = cut(picture, size, lambda w, h: ten_crop(w, h, size, number))
    expected = whole_first(full, size, ten_crop(*full.size, size, number))
    assert (picture.size != full.size) == (size < 400)  # 743 is less than twice 440
    off = float((got.float() - expected.float()).abs().mean())
    off_by_one = float((got.float() - expected.float().roll(1, -1)).abs().mean())
    assert off < 0.25 * off_by_one


def test_several_cuts_of_one_decoded_jpeg() -> None:
    content = encoded(3, "JPEG", 130, 141)
    choices = [lambda w, h: centre_crop(w, h, 60), lambda w, h: ten_crop(w, h, 60, 7)]
    both = cut_all(opened(content), 60, choices)
    for got, choose in zip(both, choices, strict=True):
        # 130 pixels are two of the centre crop's, but less than two of the ten crop's
        expected = whole_first(opened(content), 60, choose(130, 141))
        assert (got.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1", "I;16"])
def test_every_mode_becomes_rgb(mode) -> None:
    kind = "JPEG" if mode == "CMYK" else "PNG"
    buffer = io.BytesIO()
    grey = Image.new("L", (12, 12), 255)
    converted = Image.new("I;16", (12, 12), 65535) if mode == "I;16" else grey.convert(mode)
    converted.save(buffer, kind)
    got = cut(opened(buffer.getvalue()), 8, lambda w, h: centre_crop(w, h, 8))
    assert got.shape == (3, 8, 8)
    assert int(got.min()) >= 254


def test_transparent_pictures_stand_on_white() -> None:
    picture = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert int(cut(picture, 8, lambda w, h: centre_crop(w, h, 8)).min()) == 255


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("how", ["empty", "truncated", "text", "header"])
def test_damage_is_unreadable(kind, how) -> None:
    content = DAMAGE[how](encoded(4, kind, 90, 80))
    with pytest.raises(UnreadableError):
        cut(opened(content), 16, lambda w, h: centre_crop(w, h, 16))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about damaged metadata
@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "GIF"]),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=12),
    st.floats(0, 1),
)
def test_any_damage_gives_a_picture_or_is_unreadable(kind, changes, kept) -> None:
    content = bytearray(encoded(4, kind, 40, 30))
    for place, value in changes:
        content[int(place * len(content))] = value
    try:
        got = cut(opened(bytes(content[: int(kept * len(content))])), 8, MIDDLE)
    except UnreadableError as error:
        assert str(error)
    else:
        assert got.shape == (3, 8, 8)
