"""PSNR, picture grids, and all previews of one solver run."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dar_fast.files import atomic_write
from dar_fast.models import Tokenizer
from dar_train.data import to_uint8

PSNR_CAP = 60.0  # dB, for pictures that are equal


def _mse(images: Tensor, rebuilt: Tensor) -> Tensor:
    """Mean squared error a picture, of clamped pictures in [0, 1]; [B]."""
    difference = (rebuilt.clamp(-1, 1) - images.clamp(-1, 1)).double() / 2
    return difference.square().flatten(1).mean(dim=1)


def psnr(images: Tensor, rebuilt: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each picture, [B, 3, R, R] in [-1, 1] to [B]."""
    return (-10 * _mse(images, rebuilt).log10()).clamp(max=PSNR_CAP)


def psnr_of_mean(images: Tensor, rebuilt: Tensor) -> float:
    """The ratio of the mean squared error over all pictures: lower than the mean of the ratios."""
    return min(PSNR_CAP, float(-10 * _mse(images, rebuilt).mean().log10()))


def save_grid(pictures: Tensor, file: Path, *, scale: int = 2, gap: int = 2) -> None:
    """Write [rows, columns, 3, R, R] in [-1, 1] as one PNG, enlarged `scale` times."""
    rows, columns, _, R, _ = pictures.shape
    cell = R + gap
    sheet = torch.full((3, rows * cell + gap, columns * cell + gap), 255, dtype=torch.uint8)
    tiles = to_uint8(pictures.cpu())
    for row in range(rows):
        for column in range(columns):
            top, left = gap + row * cell, gap + column * cell
            sheet[:, top : top + R, left : left + R] = tiles[row, column]
    image = Image.fromarray(sheet.permute(1, 2, 0).numpy())
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as temporary:
        image.save(temporary, format="PNG")


@torch.no_grad()
def previews(
    tokenizer: Tokenizer, codes: Tensor, seeds: list[int], num_steps: int | None = None
) -> list[Tensor]:
    """Jump estimates after every step of one solver run, then the picture: S + 1 [B, 3, R, R]."""
    run = tokenizer.trajectory(tokenizer.noise(seeds, len(codes)), num_steps)
    conditions = tokenizer.conditions(codes)
    seen = []
    while not run.done:
        tokenizer.advance(run, conditions)
        seen.append(run.preview())
    return [*seen, run.image()]
