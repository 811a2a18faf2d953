"""Data sets with a split: which source a path is, what is trained on, what is held out.

Opening one costs a walk over its index; no picture is read.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dar_train.data.crops import centre_crop, cut
from dar_train.data.folder import Folder
from dar_train.data.hub import Hub, files_of
from dar_train.data.mds import Mds
from dar_train.data.order import derived_seed
from dar_train.data.packed import Packed
from dar_train.data.source import Sample, Source, UnreadableError, digest
from dar_train.data.tars import Tars, expanded

HELD_OUT_MODULUS = 10  # one sample in ten, where the data have no split of their own
HELD_OUT = ("val", "validation", "valid")  # folders beside `train`
HELD_OUT_STREAM = 2  # of a seed: which held-out pictures an evaluation takes


class PictureSet:
    """A source with its split; a source itself."""

    def __init__(self, source: Source, held_out: NDArray[np.bool_]) -> None:
        self.source = source
        self.train: Tensor = torch.from_numpy(np.flatnonzero(~held_out))  # int64 [T]
        self.held_out: Tensor = torch.from_numpy(np.flatnonzero(held_out))  # int64 [H]
        for what, indices in (("training", self.train), ("held-out", self.held_out)):
            if not len(indices):
                raise ValueError(f"data: expected at least one {what} picture, got none")

    @property
    def label_names(self) -> Sequence[str]:
        """One name a label; none where nothing names them."""
        return self.source.label_names

    @property
    def fingerprint(self) -> str:
        """Tells one data set from another, wherever they lie."""
        return self.source.fingerprint

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Labels [M], where they are known without reading the samples."""
        return self.source.labels

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        """Where sample `index` lies, for lists."""
        return self.source.name(index)

    def read(self, index: int) -> Sample:
        """Sample `index`.

        Raises:
            UnreadableError: where it is damaged or missing.
        """
        return self.source.read(index)


class _Joined:
    """Training samples, then held-out ones."""

    def __init__(self, train: Source, held_out: Source) -> None:
        if list(train.label_names) != list(held_out.label_names):
            raise ValueError(
                f"data: expected the same labels in train and val, got "
                f"{len(train.label_names)} and {len(held_out.label_names)} names that differ"
            )
        self.parts = (train, held_out)
        self.label_names = list(train.label_names)
        self.fingerprint = digest(part.fingerprint.encode() for part in self.parts)
        labels = [part.labels for part in self.parts]
        known = [each for each in labels if each is not None]
        self.labels = np.concatenate(known) if len(known) == 2 else None

    def __len__(self) -> int:
        return len(self.parts[0]) + len(self.parts[1])

    def _part(self, index: int) -> tuple[Source, int]:
        first = len(self.parts[0])
        return (self.parts[0], index) if index < first else (self.parts[1], index - first)

    def name(self, index: int) -> str:
        part, row = self._part(index)
        return part.name(row)

    def read(self, index: int) -> Sample:
        part, row = self._part(index)
        return part.read(row)


def _joined(train: Source, held_out: Source) -> PictureSet:
    joined = _Joined(train, held_out)
    return PictureSet(joined, np.arange(len(joined)) >= len(train))


def _tenth(source: Source) -> PictureSet:
    count = len(source)
    held_out = np.zeros(count, dtype=bool)
    shuffled = np.random.default_rng(0).permutation(count)
    held_out[shuffled[: max(1, count // HELD_OUT_MODULUS)]] = True
    return PictureSet(source, held_out)


def _source(path: Path) -> Source:
    if (path / "index.json").is_file():
        return Mds(path)
    tars = sorted(path.glob("*.tar"))
    if tars:
        return Tars(tars)
    if (path / "state.json").is_file() or any(path.glob("*.parquet")) or any(path.glob("*.arrow")):
        return Hub(path)
    return Folder(path)


def _held_out_folder(path: Path) -> Path | None:
    if not (path / "train").is_dir():
        return None
    return next((path / name for name in HELD_OUT if (path / name).is_dir()), None)


def _hub(path: Path) -> PictureSet:
    beside = _held_out_folder(path)
    if beside is not None:
        return _joined(Hub(path / "train"), Hub(beside))
    if not path.is_dir():
        raise ValueError(f"data: expected a folder after hf:, got {path}")
    files = files_of(path)
    train = [file for file in files if file.name.startswith("train")]
    held_out = [file for file in files if file.name.startswith("val")]
    if train and held_out:
        return _joined(Hub(path, train), Hub(path, held_out))
    return _tenth(Hub(path))


def open_pictures(data: Path, size: int) -> PictureSet:
    """The data set that a recipe's `data` names, for pictures of `size` pixels a side.

    A packed file; a folder with a sub-folder a label; a folder with the index.json of
    mosaicml-streaming; tars (a folder of them, one, or a pattern `shards-{000..127}.tar`);
    `hf:FOLDER`. Folders may have `train` and `val` in them; else a fixed tenth is held out.

    Raises:
        ValueError: where it is none of these, or empty, or of another size.
        RuntimeError: where its kind needs a package that is not installed.
    """
    text = str(data)
    if text.startswith("hf:"):
        return _hub(Path(text.removeprefix("hf:")))
    if "{" in text and text.endswith(".tar"):
        return _tenth(Tars(expanded(text)))
    if data.is_file():
        if data.suffix == ".tar":
            return _tenth(Tars([data]))
        packed = Packed(data, size)
        return PictureSet(packed, packed.held_out)
    if not data.is_dir():
        raise ValueError(f"data: expected a packed file or a folder of pictures, got {data}")
    beside = _held_out_folder(data)
    if beside is not None:
        return _joined(_source(data / "train"), _source(beside))
    return _tenth(_source(data))


class HeldOut(NamedTuple):
    """Pictures to evaluate on, on the host."""

    images: Tensor  # uint8 [n, 3, R, R], centre crops
    labels: Tensor  # int64 [n]
    names: list[str]
    skipped: list[str]  # those that could not be read, with the reason


def held_out_pictures(pictures: PictureSet, size: int, count: int, seed: int) -> HeldOut:
    """`count` held-out pictures by `seed`, or all where there are fewer; the others are not read.

    Raises:
        ValueError: where none can be read.
    """
    generator = torch.Generator().manual_seed(derived_seed(seed, HELD_OUT_STREAM))
    drawn = pictures.held_out[torch.randperm(len(pictures.held_out), generator=generator)]
    choose = partial(centre_crop, size=size)
    found: dict[int, tuple[Tensor, int]] = {}
    skipped: list[str] = []
    for index in drawn.tolist():
        if len(found) == count:
            break
        try:
            sample = pictures.read(index)
            found[index] = (cut(sample.picture, size, choose), sample.label)
        except UnreadableError as error:
            skipped.append(f"{pictures.name(index)}: {error}")
    if not found:
        raise ValueError(f"data: expected held-out pictures to read, got {skipped[0]}")
    order = sorted(found)
    return HeldOut(
        torch.stack([found[index][0] for index in order]),
        torch.tensor([found[index][1] for index in order], dtype=torch.int64),
        [pictures.name(index) for index in order],
        skipped,
    )
