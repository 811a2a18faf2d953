"""Where the emoji pictures come from: Unicode's list, a Debian font, three npm packages.

Nothing is unpacked to disk: archives are read in memory, members by name.
"""

import importlib
import importlib.util
import io
import re
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

Codes = tuple[int, ...]
Drawer = Callable[[Codes], Image.Image | None]

EMOJI_TEST = Path("/usr/share/unicode/emoji/emoji-test.txt")
NOTO_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
# Pinned, so that the same command gives the same pictures.
NPM_PACKAGES = {
    "fluent-3d": "@lobehub/fluent-emoji-3d@1.1.0",
    "fluent-flat": "@lobehub/fluent-emoji-flat@1.1.0",
    "twemoji": "@twemoji/svg@15.0.0",
}
STYLES = ("noto", *NPM_PACKAGES)

_VARIATION_SELECTOR = 0xFE0F
_SKIN_TONES = range(0x1F3FB, 0x1F400)
_TAGS = range(0xE0000, 0xE0080)
_SVG_RENDER_WIDTH = 256  # that of the Fluent 3D pictures: every style but Noto starts from 256 px
_MEMBER_LIMIT = 8 * 1024 * 1024  # the largest picture in the pinned packages has 1.3 MB

_ENTRY = re.compile(r"([0-9A-F ]+?)\s*;\s*fully-qualified\s*#\s*\S+\s+E\d+\.\d+\s+(.+)")
_MEMBER = re.compile(r"/([0-9a-f]+(?:-[0-9a-f]+)*)\.(?:svg|webp)$")


class DataError(RuntimeError):
    """A source of the data set is missing, or a data file cannot be read."""


class Emoji(NamedTuple):
    """One emoji of emoji-test.txt: `name` is unique, `subgroup` as in `cat-face`."""

    codes: Codes
    name: str
    subgroup: str


def parse_emoji_test(text: str) -> list[Emoji]:
    """Return the fully-qualified emoji of an emoji-test.txt, in its order.

    Skin-tone variants are left out, and so are tag sequences (the flags of England, Scotland and
    Wales): two of the four styles do not draw them, which leaves too little for a label.
    """
    found = []
    subgroup = ""
    for line in text.splitlines():
        if line.startswith("# subgroup:"):
            subgroup = line.partition(":")[2].strip()
            continue
        entry = _ENTRY.match(line)
        if entry is None:
            continue
        codes = tuple(int(code, 16) for code in entry[1].split())
        if not any(code in _SKIN_TONES or code in _TAGS for code in codes):
            found.append(Emoji(codes, entry[2].strip(), subgroup))
    return found


def read_emoji_test(path: Path) -> list[Emoji]:
    """Parse `path`; DataError where it is missing or lists no emoji."""
    if not path.is_file():
        raise DataError(f"emoji-test.txt: not found at {path}; apt-get install unicode-data")
    found = parse_emoji_test(path.read_text(encoding="utf-8"))
    if not found:
        raise DataError(f"emoji-test.txt: no fully-qualified emoji in {path}")
    return found


def bare(codes: Iterable[int]) -> Codes:
    """Drop variation selectors: sources disagree on them, and they never tell emoji apart."""
    return tuple(code for code in codes if code != _VARIATION_SELECTOR)


def join_glyphs(
    glyphs: Sequence[str], lookups: Iterable[Mapping[str, Sequence[tuple[Sequence[str], str]]]]
) -> list[str]:
    """Apply ligature lookups in order, as a shaper does: {first glyph: [(the rest, ligature)]}."""
    joined = list(glyphs)
    for ligatures in lookups:
        position = 0
        while position < len(joined):
            for rest, ligature in ligatures.get(joined[position], ()):
                end = position + 1 + len(rest)
                if joined[position + 1 : end] == list(rest):
                    joined[position:end] = [ligature]
                    break
            position += 1
    return joined


def noto_drawer(path: Path = NOTO_FONT) -> Drawer:
    """Draw with the bitmaps of Noto Color Emoji: its 109 px strike, pictures of 136x128.

    The font's own tables are read rather than a text layout engine's output, so an emoji that the
    font lacks or would draw as several glyphs is known for certain and gives None.
    """
    if not path.is_file():
        raise DataError(
            f"Noto Color Emoji: not found at {path}; apt-get install fonts-noto-color-emoji"
        )
    _require("fontTools", "fonttools")
    ttlib: Any = importlib.import_module("fontTools.ttLib")  # Any: it has no types
    try:
        font = ttlib.TTFont(io.BytesIO(path.read_bytes()), lazy=True)
        characters: dict[int, str] = font.getBestCmap()
        strike = font["CBDT"].strikeData[0]
        lookups = _ligature_lookups(font["GSUB"].table.LookupList.Lookup)
    except (ttlib.TTLibError, KeyError) as error:
        raise DataError(f"Noto Color Emoji: expected a CBDT font at {path}: {error}") from error

    def draw(codes: Codes) -> Image.Image | None:
        glyphs = [characters.get(code, "") for code in bare(codes)]
        joined = join_glyphs(glyphs, lookups)
        if len(joined) != 1 or joined[0] not in strike:
            return None
        return Image.open(io.BytesIO(strike[joined[0]].imageData)).convert("RGBA")

    return draw


def _ligature_lookups(lookups: Iterable[Any]) -> list[dict[str, list[tuple[list[str], str]]]]:
    return [
        {
            first: [(ligature.Component, ligature.LigGlyph) for ligature in ligatures]
            for subtable in lookup.SubTable
            for first, ligatures in subtable.ligatures.items()
        }
        for lookup in lookups
        if lookup.LookupType == 4
    ]


def npm_drawer(style: str, cache: Path) -> Drawer:
    """Draw with the pictures of the style's npm package, fetched into `cache` where missing."""
    package = NPM_PACKAGES[style]
    archive = cache / (package.removeprefix("@").replace("/", "-").replace("@", "-") + ".tgz")
    if not archive.is_file():
        _npm_pack(package, archive)
    members = _read_archive(archive, package)
    if any(name.endswith(".svg") for name, _ in members.values()):
        _require("resvg_py", "resvg_py")

    def draw(codes: Codes) -> Image.Image | None:
        if bare(codes) not in members:
            return None
        name, content = members[bare(codes)]
        try:
            if name.endswith(".svg"):
                content = _render_svg(content)
            return Image.open(io.BytesIO(content)).convert("RGBA")
        except (OSError, ValueError) as error:
            raise DataError(f"{package}: cannot draw {name}: {error}") from error

    return draw


def _render_svg(content: bytes) -> bytes:
    import resvg_py

    return bytes(
        resvg_py.svg_to_bytes(
            svg_string=content.decode("utf-8"),
            width=_SVG_RENDER_WIDTH,
            skip_system_fonts=True,  # the same picture on every machine
        )
    )


def _npm_pack(package: str, archive: Path) -> None:
    if shutil.which("npm") is None:
        raise DataError(f"{package}: npm not found to fetch it; apt-get install npm")
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=archive.parent) as folder:
        command = ["npm", "pack", "--ignore-scripts", "--silent", package]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        packed = list(Path(folder).glob("*.tgz"))
        if done.returncode != 0 or len(packed) != 1:
            reason = (done.stderr.strip() or done.stdout.strip() or "no archive").splitlines()[-1]
            raise DataError(f"{package}: `npm pack {package}` failed: {reason}")
        packed[0].replace(archive)


def _read_archive(archive: Path, package: str) -> dict[Codes, tuple[str, bytes]]:
    """Return {codes: (file name, content)} of the pictures in an npm archive."""
    members = {}
    try:
        with tarfile.open(archive, "r:gz") as packed:
            for member in packed:
                match = _MEMBER.search(member.name)
                if match is None or not member.isfile() or member.size > _MEMBER_LIMIT:
                    continue
                reader = packed.extractfile(member)
                if reader is not None:
                    codes = bare(int(code, 16) for code in match[1].split("-"))
                    members[codes] = (member.name, reader.read())
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise DataError(
            f"{package}: cannot read {archive} ({error}); delete it and build again"
        ) from error
    if not members:
        raise DataError(f"{package}: no emoji pictures in {archive}; delete it and build again")
    return members


def _require(module: str, distribution: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise DataError(f"{module}: not installed; pip install {distribution}")
