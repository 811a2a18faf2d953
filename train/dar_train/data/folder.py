"""Pictures in folders, a sub-folder a label; one walk over the names at the start.

A million pictures keep about 40 MB of names; their sizes enter the fingerprint, so files that were
encoded anew are another data set.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dar_train.data.source import PICTURE_SUFFIXES, Sample, digest, opened, unreadable


def _walk(folder: str) -> Iterator[os.DirEntry[str]]:
    """Files under `folder`, by name."""
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        if entry.is_dir():
            yield from _walk(entry.path)
        elif os.path.splitext(entry.name)[1].lower() in PICTURE_SUFFIXES:
            yield entry


class Folder:
    """Every picture below the sub-folders of `path`, in the order of their names.

    Raises:
        ValueError: where there are no sub-folders with pictures.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        folders = sorted(child for child in path.iterdir() if child.is_dir())
        names, labels, sizes = [], [], []
        for label, folder in enumerate(folders):
            for entry in _walk(str(folder)):
                names.append(os.fsencode(os.path.relpath(entry.path, path)))
                labels.append(label)
                sizes.append(entry.stat().st_size)
        if not names:
            raise ValueError(f"data: expected sub-folders with pictures in {path}, got none")
        self._names = np.array(names)  # fixed width: small to keep and to send to workers
        self.labels: NDArray[np.int64] = np.array(labels, dtype=np.int64)
        self.label_names = [folder.name for folder in folders]
        self.fingerprint = digest(
            [b"folder", self._names.tobytes(), np.array(sizes, np.int64).tobytes()]
        )

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return os.fsdecode(bytes(self._names[index]))

    def read(self, index: int) -> Sample:
        try:
            content = (self.path / self.name(index)).read_bytes()
        except OSError as error:
            raise unreadable(error) from error
        return Sample(opened(content), int(self.labels[index]))
