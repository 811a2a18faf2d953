"""The emoji data set, from fabricated sources: no network, npm or fonts."""

import io
import shutil
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dar_train import emoji, emoji_sources
from dar_train.emoji_sources import DataError, Emoji

EMOJI_TEST = """\
# group: Smileys & Emotion

# subgroup: face-smiling
1F600                                      ; fully-qualified     # 😀 E1.0 grinning face

# subgroup: emotion
2764 FE0F                                  ; fully-qualified     # ❤️ E0.6 red heart
2764                                       ; unqualified         # ❤ E0.6 red heart

# group: People & Body
# subgroup: hand-fingers-open
1F44B                                      ; fully-qualified     # 👋 E0.6 waving hand
1F44B 1F3FB                                ; fully-qualified     # 👋🏻 E1.0 waving hand: light skin tone

# group: Component
# subgroup: skin-tone
1F3FB                                      ; component           # 🏻 E1.0 light skin tone

# subgroup: subdivision-flag
1F3F4 E0067 E0062 E0065 E006E E0067 E007F  ; fully-qualified     # 🏴 E5.0 flag: England
"""  # noqa: E501


def square(color: str) -> Image.Image:
    """A coloured rectangle, off centre in a transparent picture."""
    picture = Image.new("RGBA", (128, 128))
    picture.paste(color, (10, 30, 70, 60))
    return picture


def archive(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as packed:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            packed.addfile(member, io.BytesIO(content))


def webp(color: str) -> bytes:
    buffer = io.BytesIO()
    square(color).save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    listed = emoji_sources.parse_emoji_test(EMOJI_TEST)
    styles = {
        "noto": lambda codes: square("red"),
        "twemoji": lambda codes: None if codes == (0x1F44B,) else square("blue"),
    }
    return emoji.pack(tmp_path / "emoji-16.npz", 16, listed, styles)


def test_parse_leaves_out_skin_tones_tags_and_unqualified() -> None:
    assert emoji_sources.parse_emoji_test(EMOJI_TEST) == [
        Emoji((0x1F600,), "grinning face", "face-smiling"),
        Emoji((0x2764, 0xFE0F), "red heart", "emotion"),
        Emoji((0x1F44B,), "waving hand", "hand-fingers-open"),
    ]


def test_ligatures_join_as_a_shaper_joins_them() -> None:
    lookups = [{"man": [(["zwj", "laptop"], "technologist"), (["zwj"], "short")]}, {"a": []}]
    assert emoji_sources.join_glyphs(["man", "zwj", "laptop"], lookups) == ["technologist"]
    assert emoji_sources.join_glyphs(["man", "laptop"], lookups) == ["man", "laptop"]
    assert emoji_sources.join_glyphs(["a", "man", "zwj"], lookups) == ["a", "short"]


def test_frame_crops_and_centres_on_white() -> None:
    framed = np.asarray(emoji.frame(square("red"), 32)).astype(int)
    red = (np.abs(framed - [255, 0, 0]) < 40).all(-1)
    rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
    assert (columns[0], columns[-1]) == (1, 30)
    assert rows[0] == 31 - rows[-1]
    assert (framed[:6] == 255).all()


def test_a_transparent_picture_is_refused() -> None:
    with pytest.raises(DataError, match="transparent"):
        emoji.frame(Image.new("RGBA", (8, 8)), 32)


def test_pack_and_load(packed: Path) -> None:
    data = emoji.load(packed)
    assert data.names == ["grinning face"] * 2 + ["red heart"] * 2 + ["waving hand"]
    assert data.styles == ["noto", "twemoji", "noto", "twemoji", "noto"]
    assert data.label_names == sorted(data.label_names)
    assert [data.label_names[label] for label in data.labels] == [
        "noto/face-smiling",
        "twemoji/face-smiling",
        "noto/emotion",
        "twemoji/emotion",
        "noto/hand-fingers-open",
    ]
    assert data.images.shape == (5, 16, 16, 3)
    assert data.labels.dtype == np.int64
    np.testing.assert_allclose(data.images[0, 8, 8], [255, 0, 0], atol=8)
    np.testing.assert_allclose(data.images[1, 8, 8], [0, 0, 255], atol=8)


def test_the_split_is_a_function_of_the_name(packed: Path) -> None:
    data = emoji.load(packed)
    expected = [zlib.crc32(name.encode()) % 10 == 0 for name in data.names]
    assert data.held_out.tolist() == expected
    share = np.mean([emoji.is_held_out(f"emoji {i}") for i in range(5000)])
    assert 0.08 < share < 0.12


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9, 0.99])
def test_load_refuses_a_truncated_file(packed: Path, kept: float) -> None:
    content = packed.read_bytes()
    packed.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(DataError, match="expected a packed emoji file"):
        emoji.load(packed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": np.array(["one"])}, r"expected names \[5\], got \[1\]"),
        ({"labels": np.full(5, 99)}, "expected labels below 5, got 99"),
        ({"size": np.int64(32)}, "expected a packed emoji file.*picture 0"),
        ({"size": np.int64(1 << 40)}, "expected a packed emoji file.*size"),
        ({"offsets": np.zeros(6, np.int64)}, "expected a packed emoji file"),
    ],
    ids=["names", "labels", "size", "huge", "offsets"],
)
def test_load_refuses_fields_that_disagree(
    packed: Path, change: dict[str, np.ndarray], message: str
) -> None:
    with np.load(packed) as stored:
        fields = dict(stored) | change
    np.savez(packed, **fields)
    with pytest.raises(DataError, match=message):
        emoji.load(packed)


def test_load_refuses_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not found; python -m dar_train\.emoji"):
        emoji.load(tmp_path / "emoji-32.npz")


@pytest.mark.parametrize("size", [0, -1, 7, 257])
def test_build_refuses_sizes(tmp_path: Path, size: int) -> None:
    with pytest.raises(ValueError, match=rf"size: expected 8\.\.256, got {size}"):
        emoji.build(tmp_path, size)


def test_build_names_the_missing_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = tmp_path / "emoji-test.txt"
    missing = tmp_path / "missing.ttf"
    with pytest.raises(DataError, match="apt-get install unicode-data"):
        emoji.build(tmp_path, 32, emoji_test=listing, noto_font=missing)
    listing.write_text(EMOJI_TEST, encoding="utf-8")
    with pytest.raises(DataError, match="apt-get install fonts-noto-color-emoji"):
        emoji.build(tmp_path, 32, emoji_test=listing, noto_font=missing)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(DataError, match=r"fluent-emoji-flat.*apt-get install npm"):
        emoji_sources.npm_drawer("fluent-flat", tmp_path / "cache")
    assert not list(tmp_path.glob("*.npz"))


def test_a_failed_npm_pack_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text("#!/bin/sh\necho 'npm error 404 not found' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(npm.parent), prepend=":")
    with pytest.raises(DataError, match=r"npm pack @twemoji/svg@.*failed: npm error 404"):
        emoji_sources.npm_drawer("twemoji", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_npm_archives_are_read_by_codes(tmp_path: Path) -> None:
    archive(
        tmp_path / "lobehub-fluent-emoji-3d-1.1.0.tgz",
        {
            "package/package.json": b"{}",
            "package/assets/2764-fe0f.webp": webp("red"),
            "../../1f600.webp": webp("blue"),
            "package/assets/1f44b.webp": b"not a picture",
        },
    )
    draw = emoji_sources.npm_drawer("fluent-3d", tmp_path)
    heart = draw((0x2764,))
    assert heart is not None
    assert heart.getpixel((20, 40)) == (255, 0, 0, 255)
    assert draw((0x1F47B,)) is None
    with pytest.raises(DataError, match=r"cannot draw package/assets/1f44b\.webp"):
        draw((0x1F44B,))
    assert [path.name for path in tmp_path.iterdir()] == ["lobehub-fluent-emoji-3d-1.1.0.tgz"]


@pytest.mark.parametrize("content", [b"", b"not an archive", "cut"], ids=["empty", "text", "cut"])
def test_a_damaged_archive_says_what_to_do(tmp_path: Path, content: bytes | str) -> None:
    path = tmp_path / "lobehub-fluent-emoji-3d-1.1.0.tgz"
    archive(path, {"package/assets/2764.webp": webp("red")})
    path.write_bytes(path.read_bytes()[:-40] if isinstance(content, str) else content)
    with pytest.raises(DataError, match="delete it and build again"):
        emoji_sources.npm_drawer("fluent-3d", tmp_path)


def test_a_missing_package_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emoji_sources.importlib.util, "find_spec", lambda name: None)
    font = tmp_path / "font.ttf"
    font.write_bytes(b"")
    with pytest.raises(DataError, match="fontTools: not installed; pip install fonttools"):
        emoji_sources.noto_drawer(font)


def test_a_file_that_is_no_font_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("fontTools")
    font = tmp_path / "font.ttf"
    font.write_bytes(b"not a font")
    with pytest.raises(DataError, match="expected a CBDT font"):
        emoji_sources.noto_drawer(font)


def test_svg_members_are_rendered(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 4 4"><path d="M0 0h2v4H0z"/></svg>'
    archive(
        tmp_path / "twemoji-svg-15.0.0.tgz",
        {"package/2764.svg": svg, "package/1f44b.svg": b"<svg"},
    )
    draw = emoji_sources.npm_drawer("twemoji", tmp_path)
    heart = draw((0x2764, 0xFE0F))
    assert heart is not None
    assert heart.getchannel("A").getbbox() == (0, 0, 128, 256)
    with pytest.raises(DataError, match=r"cannot draw package/1f44b\.svg"):
        draw((0x1F44B,))


def test_the_command_line_reports_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert emoji.command(["--out", str(tmp_path), "--size", "3"]) == 2
    assert capsys.readouterr().err == (
        "python -m dar_train.emoji: error: size: expected 8..256, got 3\n"
    )

    def missing(*args: object) -> Path:
        raise DataError("npm not found")

    monkeypatch.setattr(emoji, "build", missing)
    assert emoji.command(["--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err.endswith(": error: npm not found\n")
