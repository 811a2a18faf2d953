"""Contact sheets: tiles on white, hairline frames, a caption and a grey note under each.

A tile is at least 128 pixels wide: tiny pictures are enlarged by a whole factor with Lanczos, which
shows the shapes that a 32-pixel picture holds where blocks would hide them.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont
    from PIL.ImageFont import ImageFont as BitmapFont

LEAST_TILE = 128
GUTTER = 14
CAPTION_SIZE, NOTE_SIZE = 13, 12
LINE = 17  # height of a line of either
PAPER, FRAME, INK, FAINT = "#ffffff", "#e4e4e7", "#27272a", "#8e8e96"


class Tile(NamedTuple):
    """One picture of a sheet; `image` None leaves the place empty."""

    image: Image.Image | None
    caption: str = ""
    note: str = ""


def default_scale(size: int) -> int:
    """The least whole factor that makes `size` pixels a tile of 128 or more."""
    return max(1, -(-LEAST_TILE // size))


def enlarge(image: Image.Image, scale: int) -> Image.Image:
    """`image` enlarged by a whole factor."""
    if scale == 1:
        return image
    size = (image.width * scale, image.height * scale)
    return image.resize(size, Image.Resampling.LANCZOS)


def columns_for(count: int) -> int:
    """Columns of a sheet of `count` tiles that is about square, full rows preferred."""
    side = math.ceil(math.sqrt(count))
    wide = [c for c in range(side, 2 * side) if count % c == 0]
    return wide[0] if wide else side


def _fit(text: str, font: "FreeTypeFont | BitmapFont", width: int) -> str:
    """`text`, its end replaced by an ellipsis where it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def contact_sheet(tiles: Sequence[Tile], columns: int, scale: int | None = None) -> Image.Image:
    """All tiles in rows of `columns`, as RGB.

    Args:
        tiles: at least one with a picture; all pictures of one size.
        columns: tiles a row.
        scale: factor by which pictures are enlarged; None for tiles of at least 128 pixels.
    """
    pictures = [tile.image for tile in tiles if tile.image is not None]
    factor = default_scale(pictures[0].width) if scale is None else scale
    width, height = pictures[0].width * factor, pictures[0].height * factor
    lines = any(tile.caption for tile in tiles) + any(tile.note for tile in tiles)
    text = LINE * lines + 4 if lines else 0
    rows = -(-len(tiles) // columns)
    sheet = Image.new(
        "RGB",
        (
            GUTTER + columns * (width + GUTTER),
            GUTTER + rows * (height + text + GUTTER),
        ),
        PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    caption_font = ImageFont.load_default(CAPTION_SIZE)
    note_font = ImageFont.load_default(NOTE_SIZE)
    for i, tile in enumerate(tiles):
        if tile.image is None:
            continue
        x = GUTTER + i % columns * (width + GUTTER)
        y = GUTTER + i // columns * (height + text + GUTTER)
        draw.rectangle((x - 1, y - 1, x + width, y + height), outline=FRAME)
        sheet.paste(enlarge(tile.image.convert("RGB"), factor), (x, y))
        y += height + 4
        if tile.caption:
            draw.text((x, y), _fit(tile.caption, caption_font, width), fill=INK, font=caption_font)
            y += LINE
        draw.text((x, y), _fit(tile.note, note_font, width), fill=FAINT, font=note_font)
    return sheet


def label_tile(image: Image.Image | None, label: str, note: str = "") -> Tile:
    """A tile for a label such as `noto/cat-face`: the subject as caption, the style in the note."""
    style, _, subject = label.rpartition("/")
    return Tile(image, subject, " · ".join(part for part in (style, note) if part))
