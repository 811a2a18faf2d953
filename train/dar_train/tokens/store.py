"""A folder of tokens, read: codes uint16 [views, M, N] mapped from `codes.npy`, labels, the split.

128 bytes a picture and view at 64 codes, 512 at 256; nothing is read before a batch needs it.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dar_train.tokens.manifest import CENTRE, SHOWN, Manifest, Spec, names_hash, read_manifest
from dar_train.tokens.writer import CODES, HELD_OUT, LABELS, checksum, read_progress

VERIFIED_BYTES = 256 << 20  # smaller stores are checked whole whenever they are opened


@dataclass(frozen=True, slots=True, eq=False)
class Store:
    """Complete tokens."""

    folder: Path
    manifest: Manifest
    codes: NDArray[np.uint16]  # [views, M, N], mapped
    labels: Tensor  # int64 [M]; -1 where the picture could not be read
    train: Tensor  # int64 indices of pictures
    held_out: Tensor  # int64 indices of pictures

    @property
    def spec(self) -> Spec:
        """What they are codes of."""
        return self.manifest.spec

    @property
    def plain(self) -> int:
        """The view nearest to the picture as it is: the plain one, or the centre crop."""
        views = self.spec.views
        return 0 if views[0].crop is None else CENTRE

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the manifest: two stores with the same one hold the same codes."""
        values = json.dumps([str(self.spec), self.manifest.skipped, self.manifest.checksums])
        return hashlib.sha256(values.encode()).hexdigest()

    def rows(self, views: Tensor | int, pictures: Tensor) -> Tensor:
        """Codes int64 [n, N] of `pictures` [n], each under its view; read from the disk."""
        where = views.numpy() if isinstance(views, Tensor) else views
        return torch.from_numpy(self.codes[where, pictures.numpy()].astype(np.int64))


def open_store(folder: Path, *, verify: bool | None = None) -> Store:
    """The tokens in `folder`.

    Args:
        verify: read everything and compare checksums; by default where there is little to read.

    Raises:
        ValueError: where the folder holds none, incomplete ones, or damaged ones.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise ValueError(f"tokens: expected a folder that dar tokenize wrote, got {folder}")
    spec = manifest.spec
    if not manifest.complete:
        done = len(read_progress(folder))
        raise ValueError(
            f"tokens: expected complete tokens in {folder}, got {done} of {spec.chunks} chunks; "
            "run the same dar tokenize again, it goes on where it stopped"
        )
    codes = _load(folder / CODES, np.dtype(np.uint16), spec.shape, mapped=True)
    labels = _load(folder / LABELS, np.dtype(np.int32), (spec.pictures,))
    held_out = _load(folder / HELD_OUT, np.dtype(np.bool_), (spec.pictures,))
    if hashlib.sha256(held_out.tobytes()).hexdigest() != spec.held_out:
        raise _damaged(folder / HELD_OUT, "another split than the manifest's")
    if verify or (verify is None and codes.nbytes <= VERIFIED_BYTES):
        check(folder, manifest, codes, labels)
    known = labels >= 0
    _check_labels(spec, labels, known)
    split = [torch.from_numpy(np.flatnonzero(known & part)) for part in (~held_out, held_out)]
    for name, part in zip(("training", "held-out"), split, strict=True):
        if not len(part):
            raise ValueError(f"tokens: expected at least one {name} picture in {folder}, got none")
    return Store(folder, manifest, codes, torch.from_numpy(labels.astype(np.int64)), *split)


def check(
    folder: Path, manifest: Manifest, codes: NDArray[np.uint16], labels: NDArray[np.int32]
) -> None:
    """Compare every chunk with its checksum.

    Raises:
        ValueError: that names the first damaged pictures.
    """
    if len(manifest.checksums) != manifest.spec.chunks:
        raise _damaged(folder, f"{len(manifest.checksums)} checksums in the manifest")
    for chunk, expected in enumerate(manifest.checksums):
        start, stop = manifest.spec.span(chunk)
        if checksum(codes[:, start:stop], labels[start:stop]) != expected:
            raise _damaged(folder, f"other codes or labels of pictures {start} to {stop - 1}")


def _check_labels(spec: Spec, labels: NDArray[np.int32], known: NDArray[np.bool_]) -> None:
    wrong = np.flatnonzero(known & (labels >= spec.classes))
    if len(wrong):
        raise ValueError(
            f"labels: expected 0 to {spec.classes - 1}, got {labels[wrong[0]]} of "
            f"picture {wrong[0]}, the first of {len(wrong)}"
        )


def check_belongs(
    store: Store,
    *,
    tokenizer: str | None = None,
    data: str | None = None,
    label_names: Sequence[str] | None = None,
) -> None:
    """Refuse codes of another tokenizer, of other pictures or of other label names, if given.

    Raises:
        ValueError: that shows both hashes.
    """
    spec = store.spec
    pictures = "set --data to the pictures that they are of"
    names = None if label_names is None else names_hash(label_names)
    for what, expected, got, remedy in (
        ("tokenizer", tokenizer, spec.tokenizer, "set --tokenizer to the one that made them"),
        ("label names", names, names_hash(spec.label_names), pictures),
        ("pictures", data, spec.data, pictures),
    ):
        if expected is not None and expected != got:
            raise ValueError(
                f"tokens: expected those of {what} {expected[:SHOWN]}, got {got[:SHOWN]} in "
                f"{store.folder}; run dar tokenize into another folder, or {remedy}"
            )


def _load(
    file: Path, dtype: np.dtype[Any], shape: tuple[int, ...], *, mapped: bool = False
) -> NDArray[Any]:
    try:
        found = np.load(file, mmap_mode="r" if mapped else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(file, f"{type(error).__name__}: {error}") from error
    if not isinstance(found, np.ndarray) or found.dtype != dtype or found.shape != shape:
        raise _damaged(file, f"not {dtype} {list(shape)}")
    return found


def _damaged(file: Path, what: str) -> ValueError:
    return ValueError(
        f"tokens: expected what dar tokenize wrote in {file}, got {what}; remove the folder and "
        "run dar tokenize again"
    )
