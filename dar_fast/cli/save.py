"""Files that a command writes: PNG with its settings inside, animated WebP; whole or not at all."""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dar_fast
from dar_fast.files import atomic_write

if TYPE_CHECKING:
    from PIL import Image

METADATA_KEY = "dar_fast"  # keyword of the tEXt chunk
FRAME_MS, LAST_FRAME_MS = 280, 2000
WEBP_SIDE = 16_383  # the format's largest width and height


def check_output(option: str, path: Path, *suffixes: str) -> None:
    """Raise unless such a file can be made at `path`; cheap, so done before the work.

    Raises:
        ValueError: for another suffix.
        OSError: where the folder is missing or `path` is a folder.
    """
    if path.suffix.lower() not in suffixes:
        raise ValueError(
            f"{option}: expected a name that ends in {' or '.join(suffixes)}, got '{path}'"
        )
    if path.is_dir():
        raise IsADirectoryError(f"{option}: expected a file, got the folder '{path}'")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{option}: expected an existing folder, got '{path.parent}'")


def is_folder(path: Path, text: str) -> bool:
    """Whether `--out TEXT` asks for a folder of files: it is one, or ends in a slash."""
    return bool(text) and (path.is_dir() or text.endswith(("/", os.sep)))


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[Path]:
    """`atomic_write` whose errors name the file that was asked for."""
    try:
        with atomic_write(path) as temporary:
            yield temporary
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"expected to write '{path}', got: {reason}; nothing was written") from error


def save_png(path: Path, image: "Image.Image", about: dict[str, Any]) -> None:
    """Write a PNG with `about` as JSON in a tEXt chunk."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    document = {"version": dar_fast.__version__, **about}
    info.add_text(METADATA_KEY, json.dumps(document))
    with _writing(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info, optimize=True)


def save_animation(path: Path, frames: Sequence["Image.Image"]) -> None:
    """Write an animated WebP that shows `frames` in turn, the last one longest, for ever."""
    width, height = frames[0].size
    if max(width, height) > WEBP_SIDE:
        raise ValueError(
            f"animate: expected at most {WEBP_SIDE} pixels a side, got {width} x {height}; "
            "draw fewer pictures or give a smaller --scale"
        )
    with _writing(path) as temporary:
        frames[0].save(
            temporary,
            format="WEBP",
            save_all=True,
            append_images=list(frames[1:]),
            duration=[FRAME_MS] * (len(frames) - 1) + [LAST_FRAME_MS],
            loop=0,
            quality=90,
            method=4,
        )


def save_bytes(path: Path, data: bytes) -> None:
    """Write a file."""
    with _writing(path) as temporary:
        temporary.write_bytes(data)


def read_metadata(path: Path) -> dict[str, Any] | None:
    """What `save_png` put into a PNG, None where it holds nothing of ours."""
    from PIL import Image

    with Image.open(path) as image:
        text = image.info.get(METADATA_KEY)
    if not isinstance(text, str):
        return None
    try:
        document = json.loads(text)
    except json.JSONDecodeError:
        return None
    return document if isinstance(document, dict) else None
