"""webdataset tars, read by number: one walk over the headers, then a seek and a read a picture.

A sample is the members of one name up to its first dot: `0001.jpg` with `0001.cls` or `0001.json`,
whose "label" counts. Tars must not be compressed.
"""

import itertools
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dar_train.data.source import (
    PICTURE_SUFFIXES,
    Sample,
    UnreadableError,
    digest,
    names_of_labels,
    opened,
    unreadable,
)
from dar_train.reporting import logger

NO_LABEL = -(2**63)  # of a sample whose label cannot be read, or that has none
LABEL_SUFFIXES = (".cls", ".json")
MISSING = -1  # offset of a picture that is not there


class _Member(NamedTuple):
    key: str
    offset: int  # of the picture, or MISSING
    size: int
    label: int


def expanded(pattern: str) -> list[Path]:
    """The files of a pattern such as `shards-{000000..000999}.tar`.

    Raises:
        ValueError: where a range is none.
    """
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices: list[list[str]] = []
    for place, part in enumerate(parts):
        if place % 2 == 0:
            choices.append([part])
            continue
        match = re.fullmatch(r"(\d+)\.\.(\d+)", part)
        if match is None:
            choices.append(part.split(","))
            continue
        first, last = match.groups()
        if int(first) > int(last):
            raise ValueError(f"data: expected a range such as {{000..127}}, got {{{part}}}")
        choices.append([str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)])
    return [Path("".join(choice)) for choice in itertools.product(*choices)]


def _label(suffix: str, content: bytes) -> int:
    try:
        value = json.loads(content)
        if suffix == ".json":
            value = value["label"]
        return value if type(value) is int and abs(value) < 2**63 else NO_LABEL
    except (ValueError, KeyError, TypeError, RecursionError):
        return NO_LABEL


def _samples(archive: tarfile.TarFile) -> Iterator[_Member]:
    """Samples in the order of the file; the members of one stand side by side."""
    key, offset, size, label = "", MISSING, 0, NO_LABEL
    for member in archive:
        if not member.isfile():
            continue
        folder, _, base = member.name.rpartition("/")
        stem, dot, rest = base.partition(".")
        suffix = (dot + rest).lower()
        name = f"{folder}/{stem}" if folder else stem
        if name != key:
            if offset != MISSING or label != NO_LABEL:
                yield _Member(key, offset, size, label)
            key, offset, size, label = name, MISSING, 0, NO_LABEL
        if suffix in PICTURE_SUFFIXES:
            offset, size = member.offset_data, member.size
        elif suffix in LABEL_SUFFIXES:
            file = archive.extractfile(member)
            content = b"" if file is None else file.read()
            label = _label(suffix, content) if label == NO_LABEL else label
    if offset != MISSING or label != NO_LABEL:
        yield _Member(key, offset, size, label)


def _members(path: Path) -> list[_Member]:
    """The samples of one tar; of a truncated one, those before the damage.

    Raises:
        ValueError: where it is missing, compressed or no tar.
    """
    found: list[_Member] = []
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            found.extend(_samples(archive))
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0") or file.tell() == archive.offset:
                raise EOFError("no end mark")  # tarfile takes any broken header for the end
    except (tarfile.TarError, OSError, EOFError) as error:
        if not found:
            raise ValueError(f"data: expected an uncompressed tar, got {path} ({error})") from error
        logger.warning("%s is damaged after %d samples: %s", path, len(found), error)
    return found


class Tars:
    """Every sample of `files`, in order; the names of labels are those of `labels.json`.

    Raises:
        ValueError: where a file is no tar, or no sample has a picture and a label.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)
        where, keys = [], []
        for file in self.files:
            members = _members(file)
            where.append([(m.offset, m.size, m.label) for m in members])
            keys += [m.key.encode() for m in members]
        counts = [len(rows) for rows in where]
        if not keys:
            raise ValueError(f"data: expected samples in {self.files[0]} and others, got none")
        table = np.array([row for rows in where for row in rows], dtype=np.int64)
        self._keys = np.array(keys)
        self._file = np.repeat(np.arange(len(counts)), counts)
        self._offsets, self._sizes = table[:, 0].copy(), table[:, 1].copy()
        self._labels = table[:, 2].copy()
        known = self._labels != NO_LABEL
        if not (known & (self._offsets != MISSING)).any():
            raise ValueError(
                f"data: expected .jpg, .png or .webp with .cls or .json in {self.files[0]} and "
                f"others, got no such pair"
            )
        self.labels: NDArray[np.int64] = np.where(known, self._labels, self._labels[known][0])
        count = max(1, int(self._labels[known].max()) + 1)
        self.label_names = names_of_labels(self.files[0].parent, count)
        self.fingerprint = digest(
            [b"tars", str(counts).encode(), self._keys.tobytes(), table.tobytes()]
        )

    def __len__(self) -> int:
        return len(self._keys)

    def name(self, index: int) -> str:
        return f"{self.files[self._file[index]]}/{bytes(self._keys[index]).decode()}"

    def read(self, index: int) -> Sample:
        offset, label = int(self._offsets[index]), int(self._labels[index])
        if offset == MISSING:
            raise UnreadableError("no picture beside the label")
        if label == NO_LABEL:
            raise UnreadableError("no readable label beside the picture")
        try:
            with self.files[self._file[index]].open("rb") as file:
                file.seek(offset)
                content = file.read(int(self._sizes[index]))
        except OSError as error:
            raise unreadable(error) from error
        return Sample(opened(content), label)
