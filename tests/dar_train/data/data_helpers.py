"""Small data sets on disk, of every kind, and ranks."""

import io
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from dar_train.distributed import Ranks


class Settings(NamedTuple):
    """A recipe, as far as loading reads it."""

    data: Path
    batch: int = 6
    seed: int = 3
    workers: int = 0


def ranks(rank: int = 0, world: int = 1) -> Ranks:
    return Ranks(rank, world, rank, torch.device("cpu"))


def pixels(number: int, width: int = 20, height: int = 16) -> Image.Image:
    """One colour a number, a gradient across it so that crops and mirror images differ."""
    x = np.linspace(0, 60, width)[None, :, None]
    y = np.linspace(0, 60, height)[:, None, None]
    colour = np.array([number * 7 % 130, number * 29 % 130, number * 53 % 130])
    return Image.fromarray((x + y + colour).astype(np.uint8))


def encoded(number: int, kind: str = "PNG", width: int = 20, height: int = 16) -> bytes:
    buffer = io.BytesIO()
    pixels(number, width, height).save(buffer, kind)
    return buffer.getvalue()


def folder(path: Path, counts: tuple[int, ...] = (9, 11), first: int = 0) -> Path:
    """`counts` pictures in sub-folders a, b, …, numbered through."""
    number = first
    for label, count in enumerate(counts):
        place = path / "abcdefgh"[label]
        place.mkdir(parents=True)
        for _ in range(count):
            (place / f"{number:03}.png").write_bytes(encoded(number))
            number += 1
    return path


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def tars(path: Path, shards: int = 3, each: int = 7, suffix: str = "cls") -> Path:
    """`path`/shards-00000{0, 1, …}.tar; labels are number modulo 4."""
    path.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        with tarfile.open(path / f"shards-{shard:06}.tar", "w") as archive:
            for number in range(shard * each, (shard + 1) * each):
                label = number % 4
                text = str(label) if suffix == "cls" else f'{{"label": {label}, "x": "y"}}'
                add(archive, f"{number:04}.{suffix}", text.encode())
                add(archive, f"{number:04}.png", encoded(number))
    return path


DAMAGE = {
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "text": lambda content: b"<html>not found</html>",
    "header": lambda content: b"\0" * 16 + content[16:],
    "inside": lambda content: content[:45] + bytes(len(content) - 65) + content[-20:],
}
