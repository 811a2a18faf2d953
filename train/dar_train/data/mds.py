"""mosaicml-streaming shards that lie on this machine, read by number.

One seek and read a sample; shards with pickled columns are refused, since reading would run them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dar_train.data.source import (
    BROKEN,
    Sample,
    UnreadableError,
    digest,
    names_of_labels,
    opened,
    unreadable,
)

PICTURES = ("jpeg", "png", "pil", "bytes")  # encodings, the preferred first
INTEGERS = ("int", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8")
LABELS = ("label", "y", "class", "cls")


def columns_of(encodings: Mapping[str, str]) -> tuple[str, str]:
    """The picture's and the label's column, by their encodings and names.

    Raises:
        ValueError: where there is none of a kind, or a column is pickled.
    """
    shown = ", ".join(f"{name}: {kind}" for name, kind in encodings.items())
    if any("pkl" in kind for kind in encodings.values()):
        raise ValueError(f"data: expected columns without pickles, got {shown}")
    pictures = [name for kind in PICTURES for name, k in encodings.items() if k == kind]
    whole = [name for name, kind in encodings.items() if kind in INTEGERS]
    labels = [name for name in LABELS if name in whole] or whole
    if not pictures or not labels:
        raise ValueError(f"data: expected a picture's and a label's column, got {shown}")
    return pictures[0], labels[0]


class Mds:
    """The shards that `path`/index.json lists, uncompressed.

    The names of labels are those of labels.json beside it, and unknown without.

    Raises:
        ValueError: where the index is damaged, or has no columns of pictures and labels.
        RuntimeError: without the package mosaicml-streaming.
    """

    labels: NDArray[np.int64] | None = None  # a sample has to be read for its own

    def __init__(self, path: Path) -> None:
        try:
            from streaming import LocalDataset
        except ImportError as error:
            raise RuntimeError(
                f"data: MDS shards need mosaicml-streaming: pip install 'dar-fast[mds]' ({error})"
            ) from error
        self.path = path
        index = path / "index.json"
        content = index.read_bytes()
        try:
            shards = json.loads(content)["shards"]
            names, kinds = shards[0]["column_names"], shards[0]["column_encodings"]
            self.picture, self.label = columns_of(dict(zip(names, kinds, strict=True)))
            self._shards: Any = LocalDataset(str(path))
            for shard in self._shards.shards:
                shard.validate(allow_unsafe_types=False)
        except (KeyError, IndexError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"data: expected an index of MDS shards, got {index}") from error
        self.fingerprint = digest([b"mds", content])
        self.label_names = names_of_labels(path, 0)

    def _row(self, index: int) -> dict[str, Any]:
        return self._shards[index]

    def __len__(self) -> int:
        return len(self._shards)

    def name(self, index: int) -> str:
        shard, row = self._shards.spanner[index]
        return f"{self.path}/{self._shards.shards[shard].raw_data.basename}:{row}"

    def read(self, index: int) -> Sample:
        try:
            row = self._row(index)
        except BROKEN as error:
            raise unreadable(error) from error
        picture = row[self.picture]
        if isinstance(picture, bytes):
            picture = opened(picture)
        if not isinstance(picture, Image.Image):
            raise UnreadableError(f"expected a picture, got {type(picture).__name__}")
        return Sample(picture, int(row[self.label]))
