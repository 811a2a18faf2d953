"""`dar sample`, `preview` and `restyle` on the tiny model: files, metadata, JSON, seeds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dar_fast import DARPipeline
from dar_fast.cli.options import parse_guidance, parse_temperature, spread
from dar_fast.cli.sheet import GUTTER, LEAST_TILE
from dar_fast.sampling import PerGroup

Dar = Callable[..., Any]


def metadata(path: Path | str) -> dict[str, Any]:
    with Image.open(path) as image:
        return json.loads(image.info["dar_fast"])


def pixels(path: Path | str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_sample_writes_one_sheet_with_its_settings(dar: Dar, model: str, here: Path) -> None:
    done = dar(
        "sample", "noto/hotel", "cat face", "-n", 2, "--seed", 7, "--guidance", "1.1:8.0",
        "--top-k", 9, "--top-p", 0.9, "--temperature", 0.7, "--steps", 3, "--solver", "euler",
        "--out", "s.png", "--model", model,
    )  # fmt: skip
    assert done.status == 0 and done.err == ""
    assert "s.png" in done.out and "4 pictures in" in done.out and "s a picture" in done.out
    assert [path.name for path in here.iterdir()] == ["s.png"]
    about = metadata("s.png")
    assert about["settings"] == {
        "guidance_scale": [1.1, 8.0],
        "temperature": 0.7,
        "top_k": 9,
        "top_p": 0.9,
        "num_inference_steps": 3,
        "solver": "euler",
    }
    assert about["pictures"] == [
        {"label": "noto/hotel", "seed": 7},
        {"label": "noto/hotel", "seed": 8},
        {"label": "fluent/cat-face", "seed": 7},  # the proper name of what was typed
        {"label": "fluent/cat-face", "seed": 8},
    ]
    assert about["model"] == model and about["version"]


def test_sample_compiles_where_asked(dar: Dar, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[DARPipeline] = []
    monkeypatch.setattr(DARPipeline, "compile", lambda self: compiled.append(self) or self)
    for flags, count in (((), 0), (("--compile",), 1)):
        assert dar("sample", "4", *flags, "--model", model, "--json").status == 0
        assert len(compiled) == count


def test_sample_without_a_label_spreads(dar: Dar, model: str) -> None:
    done = dar("sample", "--model", model, "--json")
    assert done.status == 0
    document = done.json
    assert len(document["pictures"]) == 16
    assert len({picture["label"] for picture in document["pictures"]}) >= 3
    assert len({tuple(picture.values()) for picture in document["pictures"]}) == 16
    assert document["files"] == ["samples.png"] and document["seconds"] > 0
    assert dar("sample", "-n", 3, "--model", model, "--json").json["pictures"][0]["seed"] == 0


def test_pictures_do_not_depend_on_the_batch(dar: Dar, model: str, here: Path) -> None:
    argv = ("sample", "noto/hotel", "0", "-n", 3, "--model", model, "--json", "--out")
    files = dar(*argv, "one/", "--batch-size", 1).json["files"]
    assert len(files) == 6
    for file in files:
        name = metadata(file)["pictures"][0]["label"].replace("/", "-")
        assert f"-{name}-seed" in Path(file).name
    together = dar(*argv, "all/").json["files"]
    alone = dar("sample", "noto/hotel", "--seed", 2, "--model", model, "--json", "--out", "x/")
    for a, b in zip(files, together, strict=True):
        assert np.abs(pixels(a).astype(int) - pixels(b)).max() <= 1
    third = pixels(alone.json["files"][0]).astype(int)
    assert np.abs(third - pixels(files[2])).max() <= 1


def test_files_in_a_folder_are_the_pipelines_pictures(
    dar: Dar, model: str, tiny_pipeline: DARPipeline
) -> None:
    file = dar(
        "sample", "noto/hotel", "--seed", 5, "--guidance", 2, "--model", model, "--json", "--out",
        "x/",
    ).json["files"][0]  # fmt: skip
    expected = tiny_pipeline(["noto/hotel"], seeds=[5], guidance_scale=2.0).images[0]
    assert np.abs(pixels(file).astype(int) - np.asarray(expected)).max() <= 1


def test_sheet_enlarges_small_pictures(dar: Dar, model: str) -> None:
    dar("sample", "noto/hotel", "--model", model)
    width = pixels("samples.png").shape[1]
    assert width == LEAST_TILE + 2 * GUTTER
    dar("sample", "noto/hotel", "--scale", 2, "--model", model)
    assert pixels("samples.png").shape[1] == 2 * 16 + 2 * GUTTER


def test_sample_animates_the_sheet(dar: Dar, model: str) -> None:
    done = dar("sample", "-n", 4, "--animate", "s.webp", "--model", model, "--json")
    assert done.json["animation"] == "s.webp"
    with Image.open("s.webp") as animation:
        assert animation.n_frames == 4 + 1  # a step each, and the pictures
        assert animation.size == pixels("samples.png").shape[1::-1]


def test_preview_is_a_strip_and_an_animation(dar: Dar, model: str) -> None:
    done = dar("preview", "hotel", "--model", model, "--json", "--out", "p.png", "--steps", 5)
    assert done.status == 0
    assert done.json["previews"] == 5
    assert pixels("p.png").shape[1] == GUTTER + 5 * (LEAST_TILE + GUTTER)
    with Image.open("p.webp") as animation:
        assert animation.n_frames == 6 and animation.size == (LEAST_TILE, LEAST_TILE)
    assert metadata("p.png")["pictures"] == [{"label": "noto/hotel", "seed": 0}]


def test_restyle_keeps_the_prefix(
    dar: Dar, model: str, picture: Path, tiny_pipeline: DARPipeline, monkeypatch: Any
) -> None:
    kept = []
    stream = DARPipeline.stream

    def spy(self: DARPipeline, labels: Any, **options: Any) -> Any:
        kept.append((labels, options["prefix_codes"], options["seeds"]))
        return stream(self, labels, **options)

    monkeypatch.setattr(DARPipeline, "stream", spy)
    done = dar(
        "restyle", picture, "--labels", "noto/hotel", "twemoji/cat-face", "--prefix-groups", 3,
        "-n", 2, "--model", model, "--json",
    )  # fmt: skip
    assert done.status == 0
    (labels, prefix, seeds) = kept[0]
    assert labels == [4, 5, 4, 5] and seeds == [0, 0, 1, 1]
    assert prefix.shape == (4, 12)
    from dar_fast.images import load_image

    codes = tiny_pipeline.tokenizer.encode(load_image(picture, 16).image[None])
    assert (prefix == codes[:, :12]).all()
    about = metadata("restyled.png")
    assert about["prefix_groups"] == 3 and about["input"] == "cat.png"
    assert pixels("restyled.png").shape[1] == GUTTER + 4 * (LEAST_TILE + GUTTER)


@pytest.mark.parametrize("groups", [0, 4])
def test_restyle_takes_no_groups_or_all(dar: Dar, model: str, picture: Path, groups: int) -> None:
    done = dar("restyle", picture, "--labels", "hotel", "--prefix-groups", groups, "--model", model)
    assert done.status == 0, done.err


def test_guidance_is_a_number_a_schedule_or_one_a_group() -> None:
    assert parse_guidance("4") == 4.0
    assert parse_guidance("1.1:8.0") == (1.1, 8.0)
    assert parse_guidance("1,2.5,4") == PerGroup((1.0, 2.5, 4.0))
    for text in ("", "a", "1:2:3", "1:", ":", "1,", ",", "1,2:3", "1,a"):
        with pytest.raises(ValueError, match="guidance: expected a number or FIRST:LAST"):
            parse_guidance(text)


def test_temperature_is_a_number_or_one_a_group() -> None:
    assert parse_temperature("0.9") == 0.9
    assert parse_temperature("1,0.5") == PerGroup((1.0, 0.5))
    for text in ("", "x", "1:2", "1,,2"):
        with pytest.raises(ValueError, match="temperature: expected a number, or one a group"):
            parse_temperature(text)


def test_sample_takes_settings_by_groups(dar: Dar, model: str, tiny_pipeline: DARPipeline) -> None:
    done = dar(
        "sample", "noto/hotel", "--guidance", "1,2,3,4", "--temperature", "1,1,0.5,0",
        "--model", model, "--json", "--out", "x/",
    )  # fmt: skip
    assert done.status == 0, done.err
    expected = tiny_pipeline(
        ["noto/hotel"], seeds=[0], guidance_scale=PerGroup((1.0, 2.0, 3.0, 4.0)),
        temperature=PerGroup((1.0, 1.0, 0.5, 0.0)),
    ).images[0]  # fmt: skip
    assert np.abs(pixels(done.json["files"][0]).astype(int) - np.asarray(expected)).max() <= 1
    assert done.json["settings"]["temperature"] == {"per_group": [1.0, 1.0, 0.5, 0.0]}
    assert metadata(done.json["files"][0])["settings"]["guidance_scale"] == {
        "per_group": [1.0, 2.0, 3.0, 4.0]
    }


@pytest.mark.parametrize("count", [1, 3, 16, 40, 200])
def test_spread_takes_turns_between_styles(count: int) -> None:
    names = [f"{style}/{i:02}" for style in "abcd" for i in range(20)]
    chosen = spread(names, count)
    assert len(chosen) == count and set(chosen) <= set(names)
    assert [name[0] for name in chosen[:4]] == list("abcd")[: min(count, 4)]
    if count <= 40:
        assert len(set(chosen)) == count
