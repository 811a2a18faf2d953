"""What a folder of tokens is: whose codes, of which pictures, under which views, and how far.

`manifest.json` exists from the start and says complete only at the end. The tokenizer and the
pictures are in it by hash, so codes of another tokenizer are never trained on.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dar_fast.files import atomic_write

FORMAT = 1
FILE = "manifest.json"
SHOWN = 12  # digits of a hash in messages
TEN = 10  # crops of a ten-crop
CENTRE = 4  # the one in the middle, not mirrored

Precision = Literal["fp32", "bf16"]


class View(NamedTuple):
    """One way to look at a picture."""

    crop: int | None = None  # 0 to 9, of the ten-crop; None: the centre at the model's own size
    flip: bool = False  # mirrored; in a move, mirrored for every other picture, drawn
    move: int | None = None  # number of a small drawn move, scale 5% and shift 1.5 pixels of 32

    def __str__(self) -> str:
        words = ["plain"] if self.crop is None and self.move is None else []
        words += [f"crop {self.crop}"] if self.crop is not None else []
        words += [f"move {self.move}"] if self.move is not None else []
        return " ".join([*words, "mirrored"] if self.flip else words)


def views_of(*, ten_crop: bool = False, flip: bool = False, moves: int = 0) -> tuple[View, ...]:
    """Plain or ten crops, their mirror images where `flip`, and small drawn moves.

    The ten crops hold their mirror images already: `flip` adds none to them.
    """
    views = [View(crop=k) for k in range(TEN)] if ten_crop else [View()]
    if flip and not ten_crop:
        views.append(View(flip=True))
    return (*views, *(View(flip=flip, move=k) for k in range(moves)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What decides every byte of a folder of tokens."""

    tokenizer: str  # SHA-256 of its folder
    data: str  # fingerprint of the pictures
    label_names: tuple[str, ...]  # none where nothing names the labels
    pictures: int  # M
    tokens: int  # N
    codebook_size: int
    views: tuple[View, ...]
    held_out: str  # SHA-256 of the mask of held-out pictures
    seed: int  # of drawn moves
    precision: Precision  # of the encoder
    batch: int  # encoded together; also the pictures of a chunk, what is written at once

    def __post_init__(self) -> None:
        if not 0 < self.codebook_size <= 2**16:
            raise ValueError(
                f"tokens: expected a codebook of at most 65536, got {self.codebook_size}"
            )
        for field in ("pictures", "tokens", "batch"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: expected at least 1, got {getattr(self, field)}")
        if not self.views:
            raise ValueError("views: expected at least one, got none")

    @property
    def classes(self) -> int:
        """Labels are below it."""
        return len(self.label_names) or 2**31

    @property
    def chunks(self) -> int:
        """Pieces that are written at once."""
        return -(-self.pictures // self.batch)

    @property
    def shape(self) -> tuple[int, int, int]:
        """[views, M, N]."""
        return len(self.views), self.pictures, self.tokens

    def span(self, chunk: int) -> tuple[int, int]:
        """First picture of a chunk, and the one after its last."""
        start = chunk * self.batch
        return start, min(start + self.batch, self.pictures)


class Skipped(NamedTuple):
    """A picture without codes."""

    picture: int
    reason: str


class Manifest(NamedTuple):
    """A folder's state."""

    spec: Spec
    complete: bool
    skipped: tuple[Skipped, ...] = ()
    checksums: tuple[int, ...] = ()  # CRC-32 of each chunk's codes and labels


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put `manifest.json` in place at once."""
    spec = dataclasses.asdict(manifest.spec)
    spec["views"] = [view._asdict() for view in manifest.spec.views]
    values = {
        "format": FORMAT, "complete": manifest.complete, **spec,
        "skipped": [list(skipped) for skipped in manifest.skipped],
        "checksums": list(manifest.checksums),
    }  # fmt: skip
    with atomic_write(folder / FILE) as temporary:
        temporary.write_text(json.dumps(values) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest | None:
    """The folder's manifest; None where there is none.

    Raises:
        ValueError: where it cannot be read, or is of another format.
    """
    try:
        text = (folder / FILE).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UnicodeDecodeError as error:
        raise ValueError(f"tokens: expected JSON in {folder / FILE}, got {error}") from error
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"tokens: expected JSON in {folder / FILE}, got {error}") from error
    found = values.get("format") if isinstance(values, dict) else None
    if found != FORMAT:
        raise ValueError(
            f"tokens: expected format {FORMAT} in {folder}, got {found}; remove the folder and "
            "run dar tokenize again"
        )
    try:
        return _manifest(values)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"tokens: expected a manifest of dar tokenize in {folder / FILE}, got one that does "
            f"not fit: {error}"
        ) from error


def _manifest(values: dict[str, Any]) -> Manifest:
    spec = {field.name: values[field.name] for field in dataclasses.fields(Spec)}
    spec["views"] = tuple(View(**view) for view in spec["views"])
    spec["label_names"] = tuple(spec["label_names"])
    return Manifest(
        Spec(**spec),
        bool(values["complete"]),
        tuple(Skipped(int(picture), str(reason)) for picture, reason in values["skipped"]),
        tuple(int(checksum) for checksum in values["checksums"]),
    )


def differences(expected: Spec, found: Spec) -> str:
    """Fields that differ, as "tokenizer: expected …, got …"; empty where none does."""
    lines = []
    for field in dataclasses.fields(Spec):
        want, got = getattr(expected, field.name), getattr(found, field.name)
        if want != got:
            lines.append(f"{field.name}: expected {_short(want)}, got {_short(got)}")
    return "; ".join(lines)


def _short(value: object) -> str:
    if isinstance(value, str):
        return value[:SHOWN]
    if isinstance(value, tuple) and len(value) > 3:
        return f"{len(value)} of them"
    if isinstance(value, tuple):
        return ", ".join(str(item) for item in value)
    return str(value)


def names_hash(label_names: Sequence[str]) -> str:
    """SHA-256 of label names in order."""
    return hashlib.sha256(json.dumps(list(label_names)).encode()).hexdigest()


def folder_hash(folder: Path) -> str:
    """SHA-256 over names and contents of a component folder's files.

    Raises:
        ValueError: where there is no such folder.
    """
    if not folder.is_dir():
        raise ValueError(f"tokenizer: expected the folder of a trained tokenizer, got {folder}")
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.iterdir() if file.is_file()):
        digest.update(file.name.encode() + b"\0")
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()
