"""Pictures in and out: files to `[3, R, R]` in [-1, 1], tensors to PIL, NumPy and [0, 1]; PSNR.

A file is turned as its EXIF says, laid on white where it is transparent, cut to its middle square
and resized.
"""

import math
import os
import warnings
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

OutputType = Literal["pil", "np", "pt", "codes"]
OUTPUT_TYPES: tuple[OutputType, ...] = ("pil", "np", "pt", "codes")
Images = list[Image.Image] | NDArray[np.float32] | Tensor


class ImageError(RuntimeError):
    """A picture file that cannot be read."""


class LoadedImage(NamedTuple):
    image: Tensor  # [3, R, R] fp32 in [-1, 1]
    notice: str | None  # what was done to make it fit; None: it had the size already


def to_unit(images: Tensor) -> Tensor:
    """Pictures `[B, 3, R, R]` near [-1, 1] to fp32 in [0, 1]."""
    return (images.float() / 2 + 0.5).clamp(0, 1)


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """Pictures `[B, 3, R, R]` near [-1, 1] to bytes `[B, R, R, 3]`, rounded to the nearest."""
    scaled = (to_unit(images) * 255).round().to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def to_pil(images: Tensor) -> list[Image.Image]:
    """Pictures `[B, 3, R, R]` near [-1, 1] to PIL."""
    return [Image.fromarray(image) for image in to_uint8(images)]


def convert_images(images: Tensor, output_type: OutputType) -> Images:
    """Pictures `[B, 3, R, R]` near [-1, 1] in the form asked for.

    "pil": a list; "np": fp32 `[B, R, R, 3]` in [0, 1]; "pt": fp32 `[B, 3, R, R]` in [0, 1] on their
    device.
    """
    if output_type == "pil":
        return to_pil(images)
    unit = to_unit(images)
    if output_type == "pt":
        return unit
    return unit.permute(0, 2, 3, 1).cpu().numpy()


def on_white(image: Image.Image) -> Image.Image:
    """RGB of any mode, on white where it is transparent."""
    if image.mode.startswith("I"):  # 16 bits a sample
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8))
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def _fit(image: Image.Image, size: int) -> tuple[Image.Image, str | None]:
    width, height = image.size
    if (width, height) == (size, size):
        return image, None
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    box = (left, top, left + side, top + side)
    cut = "" if width == height else ", its middle square"
    notice = f"resized from {width}x{height}{cut} to {size}x{size}"
    return image.resize((size, size), Image.Resampling.LANCZOS, box=box), notice


def from_pil(image: Image.Image) -> Tensor:
    """A picture to `[3, H, W]` fp32 in [-1, 1], on white where it is transparent."""
    rgb = np.array(on_white(image))  # [H, W, 3]
    return torch.from_numpy(rgb).permute(2, 0, 1).float() / 127.5 - 1


def load_image(path: str | os.PathLike[str], size: int) -> LoadedImage:
    """Read a picture file (first frame) as `[3, R, R]` in [-1, 1] with R = `size`.

    Raises:
        OSError: where the file is missing or may not be read.
        ImageError: where it is no picture, or a corrupt or gigantic one.
    """
    with Path(path).open("rb") as file:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # broken EXIF and the like
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(file) as opened:
                    opened.load()
                    upright = on_white(ImageOps.exif_transpose(opened))
        except Exception as error:  # Pillow's readers raise all sorts on broken files
            reason = "unknown format"
            if not isinstance(error, UnidentifiedImageError):
                reason = " ".join(str(error).split()) or type(error).__name__
            raise ImageError(
                f"{path}: expected a picture, got an unreadable file ({reason})"
            ) from error
    fitted, notice = _fit(upright, size)
    return LoadedImage(from_pil(fitted), None if notice is None else f"{path}: {notice}")


def psnr(images: Tensor, reference: Tensor) -> list[float]:
    """Peak signal-to-noise ratio in dB of each of `[B, 3, R, R]`, cut to [-1, 1]; inf where equal.

    Raises:
        ValueError: where the shapes differ.
    """
    if images.shape != reference.shape or images.ndim != 4:
        raise ValueError(
            f"psnr: expected two [B, 3, R, R], got {list(images.shape)} and {list(reference.shape)}"
        )
    error = to_unit(images).double() - to_unit(reference).double()
    means = error.square().mean(dim=(1, 2, 3)).tolist()
    return [-10 * math.log10(mean) if mean > 0 else math.inf for mean in means]


__all__ = [
    "OUTPUT_TYPES", "ImageError", "Images", "LoadedImage", "OutputType", "convert_images",
    "from_pil", "load_image", "on_white", "psnr", "to_pil", "to_uint8", "to_unit",
]  # fmt: skip
