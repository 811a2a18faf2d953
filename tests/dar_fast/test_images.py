"""Pictures from files and back: size, transparency, orientation, corruption, PSNR."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dar_fast.images import (
    ImageError,
    convert_images,
    from_pil,
    load_image,
    psnr,
    to_pil,
    to_uint8,
    to_unit,
)


def noise(*size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)


def test_bytes_survive_the_round_trip() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    picture = Image.fromarray(np.stack((pixels, pixels[::-1], pixels.T), -1))
    tensor = from_pil(picture)
    assert tensor.shape == (3, 16, 16)
    assert (tensor.min(), tensor.max()) == (-1, 1)
    np.testing.assert_array_equal(np.array(to_pil(tensor[None])[0]), np.array(picture))


def test_out_of_range_is_cut() -> None:
    images = torch.tensor([-3.0, -1.0, 0.0, 1.0, 9.0]).expand(1, 3, 1, 5)
    assert to_unit(images)[0, 0, 0].tolist() == [0, 0, 0.5, 1, 1]
    assert to_uint8(images)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]
    assert convert_images(images.bfloat16(), "np").dtype == np.float32  # type: ignore[union-attr]


def test_the_right_size_is_not_touched(tmp_path: Path) -> None:
    pixels = noise(8, 8, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    loaded = load_image(tmp_path / "a.png", 8)
    assert loaded.notice is None
    np.testing.assert_array_equal(to_uint8(loaded.image[None])[0], pixels)


@pytest.mark.parametrize(
    ("size", "words"),
    [((20, 20), "resized from 20x20 to 8x8"), ((30, 16), "30x16, its middle square to 8x8")],
)
def test_other_sizes_are_resized_with_notice(
    tmp_path: Path, size: tuple[int, int], words: str
) -> None:
    path = tmp_path / "a.png"
    picture = Image.new("RGB", size, "red")
    side = min(size)
    left = (size[0] - side) // 2
    picture.paste("blue", (left, 0, left + side // 2, size[1]))
    picture.save(path)
    loaded = load_image(path, 8)
    assert loaded.notice is not None
    assert words in loaded.notice
    assert str(path) in loaded.notice
    assert loaded.image.shape == (3, 8, 8)
    assert loaded.image[:, 4, 1].tolist() == pytest.approx([-1, -1, 1], abs=0.1)
    assert loaded.image[:, 4, 6].tolist() == pytest.approx([1, -1, -1], abs=0.1)


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4, 4), dtype=np.uint8)  # hidden black
    pixels[:2] = (255, 0, 0, 255)
    pixels[2] = (0, 0, 0, 128)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = to_uint8(load_image(tmp_path / "a.png", 4).image[None])[0]
    assert image[0, 0].tolist() == [255, 0, 0]
    assert image[3, 0].tolist() == [255, 255, 255]
    assert image[2, 0].tolist() == pytest.approx([127] * 3, abs=1)
    small = to_uint8(load_image(tmp_path / "a.png", 2).image[None])[0]
    assert small[1].min() > 150  # black under full transparency does not bleed in


def test_palette_transparency(tmp_path: Path) -> None:
    picture = Image.new("P", (4, 4), 0)
    picture.putpalette([0, 0, 0, 255, 0, 0])
    picture.putpixel((0, 0), 1)
    picture.save(tmp_path / "a.png", transparency=0)
    image = to_uint8(load_image(tmp_path / "a.png", 4).image[None])[0]
    assert image[0, 0].tolist() == [255, 0, 0]
    assert image[3, 3].tolist() == [255, 255, 255]


def test_exif_orientation(tmp_path: Path) -> None:
    picture = Image.new("RGB", (8, 8), "black")
    picture.paste("white", (0, 0, 8, 4))  # white above
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: white right
    picture.save(tmp_path / "a.png", exif=exif)
    image = to_uint8(load_image(tmp_path / "a.png", 8).image[None])[0]
    assert image[:, 4:].min() == 255
    assert image[:, :4].max() == 0


@pytest.mark.parametrize("mode", ["L", "LA", "1", "CMYK", "RGBA", "YCbCr"])
def test_modes(mode: str) -> None:
    grey = Image.new("L", (2, 2), 255).convert("RGB").convert(mode)
    assert to_uint8(from_pil(grey)[None]).min() >= 254


def test_sixteen_bits(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 65535], [32768, 256]], dtype=np.uint16)).save(tmp_path / "a.png")
    image = to_uint8(load_image(tmp_path / "a.png", 2).image[None])[0]
    assert image[..., 0].tolist() == [[0, 255], [128, 1]]


@pytest.mark.parametrize("data", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n"])
def test_no_picture(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=r"a\.png: expected a picture, got an unreadable file"):
        load_image(path, 8)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_truncated_pictures(tmp_path: Path, kind: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(noise(64, 64, 3)).save(buffer, kind)
    path = tmp_path / "a"
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    with pytest.raises(ImageError, match="expected a picture"):
        load_image(path, 8)


@given(
    position=st.integers(0, 10**6),
    value=st.integers(0, 255),
    kind=st.sampled_from(["PNG", "GIF", "JPEG"]),
)
def test_damaged_pictures_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int, kind: str
) -> None:
    buffer = io.BytesIO()
    Image.fromarray(noise(8, 8, 3)).save(buffer, kind)
    data = bytearray(buffer.getvalue())
    data[position % len(data)] = value
    path = tmp_path_factory.mktemp("damaged") / "a"
    path.write_bytes(data)
    try:
        image = load_image(path, 8).image
    except ImageError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert image.shape == (3, 8, 8)


def test_a_gigantic_picture_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (64, 64)).save(tmp_path / "a.png")
    for limit in (3000, 1000):  # a warning of Pillow's, then an error
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ImageError, match="exceeds limit"):
            load_image(tmp_path / "a.png", 8)


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_image(tmp_path / "none.png", 8)


def test_psnr() -> None:
    black, grey = -torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    grey[1] = -1
    assert psnr(black, grey) == [pytest.approx(20 * math.log10(2)), math.inf]
    assert psnr(black * 5, black) == [math.inf, math.inf]
    with pytest.raises(ValueError, match="psnr: expected two"):
        psnr(black, grey[:1])
