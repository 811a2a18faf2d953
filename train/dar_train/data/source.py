"""A data set by number: what every kind of storage offers, and the errors that it may raise.

`read` costs one read of a file; pictures stay encoded until a crop says how much of them is wanted.
"""

import hashlib
import io
import json
import struct
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}

# What Pillow's decoders raise on truncated and damaged files.
BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class UnreadableError(ValueError):
    """One sample that cannot be read; the others can."""


class Sample(NamedTuple):
    """A picture, not decoded yet where it is a file's, and its label."""

    picture: Image.Image | NDArray[np.uint8]  # or uint8 [height, width, 3]
    label: int


class Source(Protocol):
    """A data set whose samples have numbers; it is sent to the processes that read."""

    @property
    def label_names(self) -> Sequence[str]:
        """One name a label; none where nothing names them."""

    @property
    def fingerprint(self) -> str:
        """Tells one data set from another, wherever they lie."""

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Labels [M], where they are known without reading the samples."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Where sample `index` lies, for lists."""

    def read(self, index: int) -> Sample:
        """Sample `index`.

        Raises:
            UnreadableError: where it is damaged or missing.
        """


def opened(content: bytes) -> Image.Image:
    """The picture in `content`, its header read and nothing decoded.

    Raises:
        UnreadableError: where it is none.
    """
    try:
        return Image.open(io.BytesIO(content))
    except BROKEN as error:
        raise UnreadableError(_reason(error)) from error


def _reason(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not a picture that Pillow knows"
    return f"{type(error).__name__}: {error}"


def unreadable(error: BaseException) -> UnreadableError:
    """`error`, met while one sample was read, as what skips that sample."""
    return error if isinstance(error, UnreadableError) else UnreadableError(_reason(error))


def digest(parts: Iterable[bytes]) -> str:
    """SHA-256 over `parts`, each with its length."""
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "little"))
        total.update(part)
    return total.hexdigest()


def names_of_labels(folder: Path, count: int) -> list[str]:
    """The list in `folder`/labels.json, for kinds of storage that have none; else the numbers.

    Raises:
        ValueError: where the file is no list of names, or too short.
    """
    file = folder / "labels.json"
    if not file.is_file():
        return [str(label) for label in range(count)]
    try:
        names = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"data: expected JSON in {file}, got {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"data: expected a list of names in {file}, got something else")
    if len(names) < count:
        raise ValueError(f"data: expected {count} names in {file}, got {len(names)}")
    return names


def check_label(label: int, classes: int, name: str) -> None:
    """Refuse a label outside 0 … classes - 1.

    Raises:
        ValueError: with the sample's name.
    """
    if not 0 <= label < classes:
        raise ValueError(f"labels: expected 0 to {classes - 1}, got {label} of {name}")


def check_labels(source: Source, classes: int) -> None:
    """`check_label` on every label that is known before reading.

    Raises:
        ValueError: with the first offending sample.
    """
    labels = source.labels
    if labels is None:
        return
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        first = int(wrong.argmax())
        check_label(int(labels[first]), classes, source.name(first))
