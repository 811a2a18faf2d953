"""Pictures for training: packed emoji or folders, an order that needs no state, and augmentation.

A batch costs one gather of uint8 pictures; augmentation is one affine resampling of the batch.
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
HELD_OUT_MODULUS = 10  # folders: one picture in ten is held out


class Pictures(NamedTuple):
    """A data set in memory, split for training."""

    images: Tensor  # uint8 [M, 3, R, R]
    labels: Tensor  # int64 [M]
    names: list[str]
    label_names: list[str]
    train: Tensor  # int64 indices
    held_out: Tensor  # int64 indices


def load_pictures(path: Path, size: int) -> Pictures:
    """Read a packed emoji file, or a folder with one sub-folder of pictures a label.

    Raises:
        ValueError: where the path is missing, holds no pictures, or holds pictures of another size.
    """
    if path.is_dir():
        return _from_folder(path, size)
    if not path.is_file():
        raise ValueError(f"data: expected a packed file or a folder of pictures, got {path}")
    from dar_train import emoji

    packed = emoji.load(path)
    if packed.images.shape[1:] != (size, size, 3):
        raise ValueError(
            f"data: expected pictures of {size} x {size} for this model, got "
            f"{packed.images.shape[1]} x {packed.images.shape[2]} in {path}"
        )
    held_out = torch.as_tensor(np.asarray(packed.held_out, dtype=bool))
    return _split(
        torch.from_numpy(np.ascontiguousarray(packed.images.transpose(0, 3, 1, 2))),
        torch.as_tensor(np.asarray(packed.labels, dtype=np.int64)),
        list(packed.names),
        list(packed.label_names),
        held_out,
    )


def _split(
    images: Tensor, labels: Tensor, names: list[str], label_names: list[str], held_out: Tensor
) -> Pictures:
    train = (~held_out).nonzero().flatten()
    held = held_out.nonzero().flatten()
    if not len(train):
        raise ValueError("data: expected at least one training picture, got none")
    if not len(held):
        raise ValueError("data: expected at least one held-out picture, got none")
    return Pictures(images, labels, names, label_names, train, held)


def _read_picture(path: Path, size: int) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGBA")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"data: expected a readable picture, got {path} ({error})") from error
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    flat = Image.alpha_composite(white, picture).convert("RGB")
    scale = size / min(flat.size)
    wide = (max(size, round(flat.width * scale)), max(size, round(flat.height * scale)))
    flat = flat.resize(wide, Image.Resampling.LANCZOS)
    left, top = (flat.width - size) // 2, (flat.height - size) // 2
    return np.asarray(flat.crop((left, top, left + size, top + size)), dtype=np.uint8)


def _from_folder(path: Path, size: int) -> Pictures:
    folders = sorted(child for child in path.iterdir() if child.is_dir())
    pictures, labels, names = [], [], []
    for label, folder in enumerate(folders):
        for file in sorted(folder.iterdir()):
            if file.suffix.lower() in PICTURE_SUFFIXES:
                pictures.append(_read_picture(file, size))
                labels.append(label)
                names.append(f"{folder.name}/{file.stem}")
    if not pictures:
        raise ValueError(f"data: expected sub-folders with pictures in {path}, got none")
    count = len(pictures)
    shuffled = np.random.default_rng(0).permutation(count)
    held_out = torch.zeros(count, dtype=torch.bool)
    held_out[torch.from_numpy(shuffled[: max(1, count // HELD_OUT_MODULUS)])] = True
    return _split(
        torch.from_numpy(np.stack(pictures).transpose(0, 3, 1, 2).copy()),
        torch.tensor(labels),
        names,
        [folder.name for folder in folders],
        held_out,
    )


def to_float(images: Tensor) -> Tensor:
    """uint8 [B, 3, R, R] to float32 in [-1, 1]."""
    return images.to(torch.float32).mul_(1 / 127.5).sub_(1.0)


def to_uint8(images: Tensor) -> Tensor:
    """Float in [-1, 1], clamped, to uint8."""
    return images.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def chunks(x: Tensor, size: int) -> list[Tensor]:
    """`x` cut into pieces of at most `size` rows."""
    return [x[start : start + size] for start in range(0, len(x), size)]


def derived_seed(seed: int, *key: int) -> int:
    """A 63-bit seed that depends on every part of the key: streams need no saved state."""
    state = np.random.SeedSequence([seed, *key]).generate_state(1, np.uint64)
    return int(state[0]) & (2**63 - 1)


class Order:
    """A shuffled order without state: sample position p belongs to epoch p // count.

    Each epoch is a permutation that depends on (seed, epoch) alone, so a resumed run reads on
    exactly where it stopped, even with another batch size.
    """

    def __init__(self, indices: Tensor, seed: int) -> None:
        if not len(indices):
            raise ValueError("data: expected at least one sample to order, got none")
        self.indices = indices
        self.seed = seed
        self._epochs: dict[int, Tensor] = {}

    def _epoch(self, epoch: int) -> Tensor:
        if epoch not in self._epochs:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, 0, epoch))
            kept = {e: p for e, p in self._epochs.items() if e == epoch - 1}
            permutation = torch.randperm(len(self.indices), generator=generator)
            self._epochs = kept | {epoch: self.indices[permutation]}
        return self._epochs[epoch]

    def take(self, position: int, count: int) -> Tensor:
        """Indices of the `count` samples from global `position` on."""
        parts = []
        while count > 0:
            epoch, offset = divmod(position, len(self.indices))
            part = self._epoch(epoch)[offset : offset + count]
            parts.append(part)
            position += len(part)
            count -= len(part)
        return torch.cat(parts)


class Augmentation(NamedTuple):
    """Ranges and probabilities of the tokenizer's augmentation."""

    flip: float = 0.5
    affine: float = 0.7  # probability of a random affine map
    scale: float = 0.15  # 1 ± scale
    shift: float = 3.0  # pixels at 32 x 32, in proportion at other sizes
    rotation: float = 10.0  # degrees
    permute: float = 0.15  # probability of permuted colour channels
    jitter: float = 0.3  # probability of a random contrast towards white


DEFAULT_AUGMENTATION = Augmentation()


def augment(
    images: Tensor, generator: torch.Generator, how: Augmentation = DEFAULT_AUGMENTATION
) -> Tensor:
    """Random flips, small affine maps on white, and colour changes; [B, 3, R, R] in [-1, 1].

    Pictures stand on white, so the complement 1 - x is resampled with zero padding.
    """
    B, _, R, _ = images.shape
    device = images.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    def signed(*shape: int) -> Tensor:
        return 2 * uniform(*shape) - 1

    moved = (uniform(B) < how.affine).to(images.dtype)
    mirrored = 1 - 2 * (uniform(B) < how.flip).to(images.dtype)
    scale = 1 + how.scale * signed(B) * moved
    angle = math.radians(how.rotation) * signed(B) * moved
    shift = 2 * how.shift / 32 * signed(B, 2) * moved[:, None]
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    theta = torch.empty(B, 2, 3, device=device, dtype=images.dtype)
    theta[:, 0, 0], theta[:, 0, 1], theta[:, 0, 2] = cos * mirrored, -sin, shift[:, 0]
    theta[:, 1, 0], theta[:, 1, 1], theta[:, 1, 2] = sin * mirrored, cos, shift[:, 1]
    grid = F.affine_grid(theta, [B, 3, R, R], align_corners=False)
    ink = F.grid_sample(1 - images, grid, padding_mode="zeros", align_corners=False)

    order = uniform(B, 3).argsort(dim=1)
    order = torch.where(
        uniform(B, 1) < how.permute, order, torch.arange(3, device=device).expand(B, 3)
    )
    ink = ink.gather(1, order[:, :, None, None].expand(B, 3, R, R))
    strength = 0.7 + 0.3 * uniform(B, 3, 1, 1)
    strength = torch.where(uniform(B, 1, 1, 1) < how.jitter, strength, 1.0)
    return 1 - ink * strength


def random_flip(images: Tensor, generator: torch.Generator, probability: float = 0.5) -> Tensor:
    """Each picture mirrored left to right with the given probability."""
    draw = torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device)
    return torch.where(draw < probability, images.flip(-1), images)
