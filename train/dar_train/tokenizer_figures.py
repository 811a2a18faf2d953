"""Held-out figures of a tokenizer: loss, PSNR, use of its codes, and a sheet of reconstructions.

One training pass without gradients, one encoding and S denoising steps a picture.
"""

from pathlib import Path

import torch
from torch import Tensor

from dar_fast.models.tokenizer import Tokenizer
from dar_train import figures
from dar_train.codebook import use_of
from dar_train.data import derived_seed, to_float

CHUNK = 64
GRID_PICTURES = 12
DRAW_SEED = 31  # stream of a recipe's seed


class HeldOutFigures:
    """Figures of `images` uint8 `[n, 3, R, R]`, with draws of `seed`; sheets go to `folder`."""

    def __init__(self, images: Tensor, seed: int, folder: Path, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(derived_seed(seed, DRAW_SEED))
        self.images = to_float(images.to(device))
        self.folder = folder
        self._u = torch.rand(len(images), generator=generator).to(device)
        self._noise = torch.randn(images.shape, generator=generator).to(device)

    @torch.no_grad()
    def evaluate(self, model: Tokenizer, step: int) -> dict[str, float]:
        """Means over the pictures; writes a sheet."""
        V = model.config.codebook_size
        device = self.images.device
        loss, counts = torch.zeros((), device=device), torch.zeros(V, dtype=torch.int64).to(device)
        rebuilt, codes = [], []
        for part in range(0, len(self.images), CHUNK):
            keep = slice(part, part + CHUNK)
            images = self.images[keep]
            out = model.training_forward(images, self._u[keep], self._noise[keep], align=False)
            loss += (out.fm + out.vq + out.commit) * len(images)
            codes.append(model.encode(images))
            counts += torch.bincount(codes[-1].flatten(), minlength=V)
            seeds = list(range(part, part + len(images)))
            rebuilt.append(model.decode(codes[-1], seeds=seeds).float())
        self._draw(model, codes[0][:GRID_PICTURES], rebuilt[0][:GRID_PICTURES], step)
        decoded = torch.cat(rebuilt)
        return {
            "loss": float(loss) / len(self.images),
            "psnr": float(figures.psnr(self.images, decoded).mean()),
            "psnr_of_mean": figures.psnr_of_mean(self.images, decoded),
            **use_of(counts),
        }

    def _draw(self, model: Tokenizer, codes: Tensor, rebuilt: Tensor, step: int) -> None:
        """A row a picture: itself, its jump previews step by step, its reconstruction."""
        columns = [self.images[: len(codes)]]
        seeds = list(range(len(codes)))
        for k in range(1, model.config.num_steps):
            preview = model.decode(codes, seeds=seeds, stop_after=k, preview="jump")
            columns.append(preview.float())
        columns.append(rebuilt)
        figures.save_grid(torch.stack(columns, dim=1), self.folder / f"step-{step:08d}.png")
