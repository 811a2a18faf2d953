"""Pictures and a tokenizer without a network, whose codes are a function of the pixels alone."""

import hashlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from dar_train.data import PictureSet, Sample, UnreadableError
from dar_train.distributed import Ranks
from dar_train.tokens import Spec, View, spec_of, write_tokens

SIZE, TOKENS, CODES = 8, 5, 50_000  # codes beyond int16
VIEWS = (View(), View(flip=True), View(flip=True, move=0))


class FakeSource:
    """`count` random pictures of two labels."""

    label_names = ("left", "right")

    def __init__(self, count: int = 45, broken: tuple[int, ...] = (), label: int = 1) -> None:
        rng = np.random.default_rng(0)
        self.images = rng.integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)
        self.broken = broken
        self.label = label
        self.labels = None
        self.fingerprint = hashlib.sha256(self.images.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"picture-{index}"

    def read(self, index: int) -> Sample:
        if index in self.broken:
            raise UnreadableError("damaged")
        return Sample(self.images[index], self.label if index % 2 else 0)


class FakeTokenizer:
    """Sums of pixels; refuses batches that are not `batch`, which padding prevents."""

    def __init__(self, batch: int = 4) -> None:
        self.config = SimpleNamespace(image_size=SIZE, num_tokens=TOKENS, codebook_size=CODES)
        self.batch = batch
        self.calls = 0

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        if len(images) != self.batch:
            raise AssertionError(f"a batch of {len(images)}")
        self.calls += 1
        pixels = ((images + 1) * 127.5).round().long().flatten(1)
        weights = torch.arange(1, TOKENS + 1)[:, None] * torch.arange(pixels.shape[1]) + 1
        return (pixels @ weights.T) % CODES


def pictures_of(source: FakeSource) -> PictureSet:
    held_out = np.zeros(len(source), dtype=bool)
    held_out[::9] = True
    return PictureSet(source, held_out)


def ranks_of(rank: int = 0, world: int = 1) -> Ranks:
    return Ranks(rank, world, rank, torch.device("cpu"))


def spec_for(tokenizer: FakeTokenizer, pictures: PictureSet, **changes) -> Spec:
    return spec_of(
        tokenizer, **({"tokenizer_hash": "a" * 64, "pictures": pictures, "views": VIEWS,
        "seed": 3, "batch": tokenizer.batch} | changes),
    )  # fmt: skip


def write(
    folder: Path, source: FakeSource | None = None, rank: int = 0, world: int = 1, **options
) -> bool:
    """Encode with the fakes."""
    tokenizer, pictures = FakeTokenizer(), pictures_of(source or FakeSource())
    spec = spec_for(tokenizer, pictures)
    return write_tokens(folder, tokenizer, pictures, spec, ranks_of(rank, world), **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
