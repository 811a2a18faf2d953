"""A data set as codes: every view of every picture, encoded once and kept beside the run.

uint16 [views, M, N]: 128 bytes a picture and view at 64 codes. The manifest names the tokenizer and
the pictures by hash, so codes of another tokenizer are never trained on.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dar_fast.files import atomic_write
from dar_fast.models.tokenizer import Tokenizer
from dar_train.data import Augmentation, Pictures, augment, chunks, derived_seed, to_float
from dar_train.reporting import logger

CHUNK = 128
VIEW = Augmentation(affine=1.0, scale=0.05, shift=1.5, rotation=0.0, permute=0.0, jitter=0.0)


class Tokens(NamedTuple):
    """Codes of a data set."""

    codes: Tensor  # uint16 [views, M, N]; view 0 is the pictures as they are
    tokenizer_hash: str


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
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _manifest(
    tokenizer_hash: str, data: Pictures, flip: bool, views: int, seed: int
) -> dict[str, Any]:
    pictures = hashlib.sha256(data.images.numpy().tobytes()).hexdigest()
    return {
        "tokenizer": tokenizer_hash,
        "pictures": pictures,
        "flip": flip,
        "views": views,
        "seed": seed,
    }


def _read(folder: Path, manifest: dict[str, Any]) -> Tensor | None:
    """Cached codes, or None where there are none.

    Raises:
        ValueError: where the cache is of another tokenizer, of other pictures or of other views.
    """
    file = folder / "manifest.json"
    if not file.is_file():
        return None
    found = json.loads(file.read_text())
    for key, expected in manifest.items():
        if found.get(key) != expected:
            raise ValueError(
                f"tokens: expected {key} {str(expected)[:16]} in {folder}, got "
                f"{str(found.get(key))[:16]}; remove the folder to encode anew"
            )
    return torch.from_numpy(np.load(folder / "codes.npy", allow_pickle=False))


@torch.no_grad()
def _encode(tokenizer: Tokenizer, images: Tensor, device: torch.device) -> Tensor:
    parts = [tokenizer.encode(part.to(device)).cpu() for part in chunks(images, CHUNK)]
    return torch.cat(parts).to(torch.uint16)


def tokens_of(
    tokenizer: Tokenizer,
    tokenizer_hash: str,
    data: Pictures,
    folder: Path,
    *,
    flip: bool = False,
    views: int = 0,
    seed: int = 0,
) -> Tokens:
    """Codes of `data` as it is, mirrored where `flip`, and in `views` slightly moved versions.

    Raises:
        ValueError: where `folder` caches codes of something else, or codes do not fit 16 bits.
    """
    if tokenizer.config.codebook_size > 2**16:
        raise ValueError(
            f"tokens: expected a codebook of at most 65536, got {tokenizer.config.codebook_size}"
        )
    manifest = _manifest(tokenizer_hash, data, flip, views, seed)
    cached = _read(folder, manifest)
    if cached is not None:
        return Tokens(cached, tokenizer_hash)
    device = tokenizer.quantizer.codebook.device
    images = to_float(data.images)
    versions = [_encode(tokenizer, images, device)]
    if flip:
        versions.append(_encode(tokenizer, images.flip(-1), device))
    for view in range(views):
        generator = torch.Generator().manual_seed(derived_seed(seed, 5, view))
        how = VIEW._replace(flip=0.5 if flip else 0.0)
        versions.append(_encode(tokenizer, augment(images, generator, how), device))
        logger.info("encoded view %d of %d", view + 1, views)
    codes = torch.stack(versions)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "codes.npy") as temporary, temporary.open("wb") as file:
        np.save(file, codes.numpy(), allow_pickle=False)
    with atomic_write(folder / "manifest.json") as temporary:
        temporary.write_text(json.dumps(manifest, indent=1) + "\n")
    return Tokens(codes, tokenizer_hash)


def unigram(train: Tensor, held_out: Tensor, vocab_size: int) -> dict[str, float]:
    """Entropy of single training codes, and the held-out codes' cross-entropy under them, in nats.

    The cross-entropy adds one to every count, so that unseen codes cost a finite amount.
    """
    counts = torch.bincount(train.flatten().long(), minlength=vocab_size).double()
    p = counts[counts > 0] / counts.sum()
    smooth = ((counts + 1) / (counts.sum() + vocab_size)).log()
    return {
        "unigram_entropy": float(-(p * p.log()).sum()),
        "unigram_cross_entropy": float(-smooth[held_out.flatten().long()].mean()),
    }
