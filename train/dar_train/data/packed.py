"""A packed emoji file: small pictures in memory, with a held-out split of its own."""

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dar_train.data.source import Sample


class Packed:
    """The file at `path`, of pictures of `size`.

    Raises:
        ValueError: where the pictures are of another size.
        emoji_sources.DataError: where it is missing or something else.
    """

    def __init__(self, path: Path, size: int) -> None:
        from dar_train import emoji

        packed = emoji.load(path)
        if packed.images.shape[1:] != (size, size, 3):
            raise ValueError(
                f"data: expected pictures of {size} x {size} for this model, got "
                f"{packed.images.shape[1]} x {packed.images.shape[2]} in {path}"
            )
        self.images = packed.images
        self.labels: NDArray[np.int64] = np.asarray(packed.labels, dtype=np.int64)
        self.names = list(packed.names)
        self.label_names = list(packed.label_names)
        self.held_out: NDArray[np.bool_] = np.asarray(packed.held_out, dtype=bool)
        with path.open("rb") as file:
            self.fingerprint = hashlib.file_digest(file, "sha256").hexdigest()

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return self.names[index]

    def read(self, index: int) -> Sample:
        return Sample(self.images[index], int(self.labels[index]))
