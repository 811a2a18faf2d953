"""The emoji data set: four vendors' drawings of 1,867 emoji, on white, labelled style/subgroup.

Sources, licences:
- noto: Noto Color Emoji, Debian package `fonts-noto-color-emoji`; SIL Open Font License 1.1.
- fluent-3d, fluent-flat: Microsoft's Fluent Emoji, npm `@lobehub/fluent-emoji-3d` and
  `@lobehub/fluent-emoji-flat`; MIT. Their 245 country flags are one drawing in both styles, and
  close to Noto's: no classifier tells those two styles' flags apart.
- twemoji: npm `@twemoji/svg`; graphics CC-BY 4.0.
- names and subgroups: Unicode's emoji-test.txt, Debian package `unicode-data`.

Every tenth emoji, by a checksum of its name and so in all four styles, is held out. The file holds
lossless WebP pictures: 7,397 of 64x64 take 20 MB instead of 91.

    python -m dar_train.emoji --out data/emoji --size 32
"""

import io
import itertools
import sys
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from dar_fast.cli.errors import status_of
from dar_fast.cli.parse import read_flags
from dar_fast.files import atomic_write
from dar_train.emoji_sources import (
    EMOJI_TEST,
    NOTO_FONT,
    NPM_PACKAGES,
    DataError,
    Drawer,
    Emoji,
    noto_drawer,
    npm_drawer,
    read_emoji_test,
)

_SIZES = range(8, 257)
_VISIBLE_ALPHA = 8  # of 255: soft halos below it do not count for the crop
_FIELDS = ("size", "bytes", "offsets", "labels", "names", "styles", "held_out", "label_names")

# What NumPy, zipfile and Pillow raise on truncated and damaged files.
_UNREADABLE = (
    OSError,
    EOFError,
    KeyError,
    TypeError,
    ValueError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)

_LICENSES = """# Licences of the emoji pictures

| style | source | licence |
| --- | --- | --- |
| noto | Noto Color Emoji, © Google Inc. and others (Debian `fonts-noto-color-emoji`) | SIL Open Font License 1.1, https://openfontlicense.org |
| fluent-3d, fluent-flat | Fluent Emoji, © Microsoft Corporation (npm `@lobehub/fluent-emoji-3d`, `@lobehub/fluent-emoji-flat`, © 2023 LobeHub) | MIT, https://github.com/microsoft/fluentui-emoji/blob/main/LICENSE; see below |
| twemoji | Twemoji, © Twitter, Inc. and other contributors (npm `@twemoji/svg`, packaged by Samuel Kopp) | graphics CC-BY 4.0, https://creativecommons.org/licenses/by/4.0/ |

Names and subgroups: Unicode's emoji-test.txt, © Unicode, Inc., https://www.unicode.org/license.txt.

Fluent Emoji has no country flags. Those in the two npm packages are one drawing in both, close to
Noto's waved flags, and are published there under the packages' MIT licence.

Changes made: the pictures were rendered, cropped, put on white and scaled down.
"""  # noqa: E501


class EmojiData(NamedTuple):
    """M pictures of R x R, in emoji-test.txt's order, an emoji's styles side by side.

    Attributes:
        images: uint8 [M, R, R, 3], sRGB on white.
        labels: int64 [M], indices into `label_names`.
        names: one per picture: `grinning cat`.
        styles: one per picture: `noto`, `fluent-3d`, `fluent-flat` or `twemoji`.
        held_out: bool [M], a function of the name only.
        label_names: sorted, `style/subgroup`: `noto/cat-face`.
    """

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    names: list[str]
    styles: list[str]
    held_out: npt.NDArray[np.bool_]
    label_names: list[str]


def is_held_out(name: str) -> bool:
    """Say whether the emoji of this name is kept from training: one in ten."""
    return zlib.crc32(name.encode("utf-8")) % 10 == 0


def frame(picture: Image.Image, size: int) -> Image.Image:
    """Crop RGBA to what is visible and centre it on a white square with a margin of size/32."""
    visible = picture.getchannel("A").point(lambda alpha: 255 * (alpha >= _VISIBLE_ALPHA))
    box = visible.getbbox()
    if box is None:
        raise DataError("frame: expected a picture, got a transparent one")
    cropped = picture.crop(box)
    margin = max(1, size // 32)
    side = round(max(cropped.size) * size / (size - 2 * margin))
    canvas = Image.new("RGBA", (side, side), "white")
    corner = ((side - cropped.width) // 2, (side - cropped.height) // 2)
    canvas.alpha_composite(cropped, corner)
    return canvas.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)


def build(
    out: Path, size: int = 32, *, emoji_test: Path = EMOJI_TEST, noto_font: Path = NOTO_FONT
) -> Path:
    """Write `out`/emoji-<size>.npz and `out`/LICENSES.md; return the former.

    npm archives are kept in `out`/cache and used again.

    Raises:
        ValueError: where size is outside 8..256.
        DataError: where a source is missing: the message names the command that provides it.
    """
    if size not in _SIZES:
        raise ValueError(f"size: expected {_SIZES.start}..{_SIZES.stop - 1}, got {size}")
    emoji = read_emoji_test(emoji_test)
    styles = {"noto": noto_drawer(noto_font)}
    styles |= {style: npm_drawer(style, out / "cache") for style in NPM_PACKAGES}
    out.mkdir(parents=True, exist_ok=True)
    with atomic_write(out / "LICENSES.md") as path:
        path.write_text(_LICENSES, encoding="utf-8")
    return pack(out / f"emoji-{size}.npz", size, emoji, styles)


def pack(path: Path, size: int, emoji: Sequence[Emoji], styles: Mapping[str, Drawer]) -> Path:
    """Draw every emoji in every style that has it, and write the packed file."""
    encoded, drawn = [], []
    for one in emoji:
        for style, draw in styles.items():
            picture = draw(one.codes)
            if picture is None:
                continue
            buffer = io.BytesIO()
            frame(picture, size).save(buffer, "WEBP", lossless=True, quality=100, method=4)
            encoded.append(buffer.getvalue())
            drawn.append((f"{style}/{one.subgroup}", one.name, style))
    if not drawn:
        raise DataError("pack: expected pictures, got none from any style")
    label_names = sorted({label for label, _, _ in drawn})
    index = {label: i for i, label in enumerate(label_names)}
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file,
            size=np.int64(size),
            bytes=np.frombuffer(b"".join(encoded), np.uint8),
            offsets=np.cumsum([0, *map(len, encoded)], dtype=np.int64),
            labels=np.array([index[label] for label, _, _ in drawn], np.int64),
            names=np.array([name for _, name, _ in drawn]),
            styles=np.array([style for _, _, style in drawn]),
            held_out=np.array([is_held_out(name) for _, name, _ in drawn]),
            label_names=np.array(label_names),
        )
    return path


def load(path: Path) -> EmojiData:
    """Read a file that `build` wrote.

    Raises:
        DataError: where it is missing, truncated, or something else.
    """
    if not Path(path).is_file():
        raise DataError(f"{path}: not found; python -m dar_train.emoji --out {Path(path).parent}")
    try:
        with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as packed:
            fields = {name: packed[name] for name in _FIELDS}
        images = _decode(fields["bytes"].tobytes(), fields["offsets"], int(fields["size"]))
    except _UNREADABLE as error:
        raise DataError(f"{path}: expected a packed emoji file, got: {error}") from error
    for name in ("labels", "names", "styles", "held_out"):
        if fields[name].shape != images.shape[:1]:
            raise DataError(
                f"{path}: expected {name} [{len(images)}], got {list(fields[name].shape)}"
            )
    labels, label_count = fields["labels"], len(fields["label_names"])
    if len(labels) and not 0 <= labels.min() <= labels.max() < label_count:
        raise DataError(f"{path}: expected labels below {label_count}, got {labels.max()}")
    return EmojiData(
        images=images,
        labels=labels,
        names=fields["names"].tolist(),
        styles=fields["styles"].tolist(),
        held_out=fields["held_out"],
        label_names=fields["label_names"].tolist(),
    )


def _decode(
    content: bytes, offsets: npt.NDArray[np.int64], size: int
) -> npt.NDArray[np.uint8]:  # [M, size, size, 3]
    if size not in _SIZES:
        raise ValueError(f"size: expected {_SIZES.start}..{_SIZES.stop - 1}, got {size}")
    images = np.empty((len(offsets) - 1, size, size, 3), np.uint8)
    for i, (start, end) in enumerate(itertools.pairwise(offsets)):
        with Image.open(io.BytesIO(content[start:end])) as picture:
            if picture.size != (size, size):
                raise ValueError(f"picture {i}: expected {(size, size)}, got {picture.size}")
            images[i] = np.asarray(picture.convert("RGB"))
    return images


def main(out: Path = Path("data/emoji"), size: int = 32) -> None:
    """Build the emoji data set.

    Args:
        out: folder for emoji-<size>.npz, LICENSES.md and the cache of npm archives.
        size: pixels a side, 8 to 256.
    """
    path = build(out, size)
    data = load(path)
    sys.stdout.write(
        f"{path}: {len(data.labels)} pictures of {len(set(data.names))} emoji, "
        f"{len(data.label_names)} labels, {int(data.held_out.sum())} held out, "
        f"{path.stat().st_size / 1e6:.1f} MB\n"
    )


def build_command(argv: Sequence[str], program: str) -> None:
    """`main` with the flags of a command line."""
    read_flags(main, argv, program)


def command(argv: Sequence[str] | None = None) -> int:
    """Run `main` and return the exit status: 0 done, 1 failed, 2 bad usage."""
    program = "python -m dar_train.emoji"
    return status_of(lambda arguments: build_command(arguments, program), argv, program)


if __name__ == "__main__":
    sys.exit(command())
