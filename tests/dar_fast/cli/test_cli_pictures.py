"""`dar reconstruct`, `encode`, `decode`, `labels`, `info`, `convert`, `doctor`: a tiny model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dar_fast import DARPipeline
from dar_fast.cli.sheet import GUTTER, LEAST_TILE
from dar_fast.codes_file import unpack
from dar_fast.images import load_image, psnr

Dar = Callable[..., Any]


def pixels(path: Path | str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.fixture
def second(picture: Path) -> Path:
    """The picture upside down."""
    Image.open(picture).rotate(180).save("second.png")
    return Path("second.png")


def test_reconstruct_measures_what_it_shows(
    dar: Dar, model: str, picture: Path, second: Path, tiny_pipeline: DARPipeline
) -> None:
    done = dar("reconstruct", picture, second, "--model", model, "--json", "--seed", 3)
    assert done.status == 0 and done.err == ""
    images = torch.stack([load_image(path, 16).image for path in (picture, second)])
    tokenizer = tiny_pipeline.tokenizer
    expected = psnr(tokenizer.decode(tokenizer.encode(images), seeds=[3, 3]), images)
    shown = [each["psnr"] for each in done.json["pictures"]]
    assert shown == pytest.approx(expected, abs=0.01)
    assert done.json["mean_psnr"] == pytest.approx(sum(expected) / 2, abs=0.01)
    assert pixels("reconstructed.png").shape[1] == GUTTER + 2 * (LEAST_TILE + GUTTER)
    text = dar("reconstruct", picture, second, "--model", model, "--seed", 3).out
    assert f"{expected[0]:.2f}" in text and "mean" in text and "reconstructed.png" in text


def test_encode_packs_the_codes(
    dar: Dar, model: str, picture: Path, second: Path, tiny_pipeline: DARPipeline
) -> None:
    done = dar("encode", picture, second, "--out", "x.dar", "--model", model, "--json")
    assert done.json["bytes_per_picture"] == 16 * 6 // 8
    data = Path("x.dar").read_bytes()
    assert len(data) == done.json["bytes"] == 2 * 16 * 6 // 8
    images = torch.stack([load_image(path, 16).image for path in (picture, second)])
    assert torch.equal(unpack(data, 16, 64), tiny_pipeline.tokenizer.encode(images))


def test_decode_gives_back_the_picture_whole_or_in_part(
    dar: Dar, model: str, picture: Path, tiny_pipeline: DARPipeline
) -> None:
    assert dar("encode", picture, "--out", "x.dar", "--model", model).status == 0
    tokenizer = tiny_pipeline.tokenizer
    codes = unpack(Path("x.dar").read_bytes(), 16, 64)
    for groups in (1, 2, 3, 4):
        done = dar("decode", "x.dar", "--groups", groups, "--out", "y.png", "--model", model)
        assert done.status == 0, done.err
        stop = None if groups == 4 else groups
        expected = tokenizer.decode(codes, seeds=0, stop_after=stop)[0]
        bytes_ = ((expected / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
        assert np.abs(pixels("y.png") - bytes_).max() <= 1
        start = Path("x.dar").read_bytes()[: groups * 4 * 6 // 8]
        Path("start.dar").write_bytes(start)
        argv = ("decode", "start.dar", "--groups", groups, "--out", "z.png", "--model", model)
        assert dar(*argv).status == 0
        assert np.array_equal(pixels("z.png"), pixels("y.png"))


def test_decode_lays_out_several_or_fills_a_folder(
    dar: Dar, model: str, picture: Path, second: Path
) -> None:
    dar("encode", picture, second, picture, "--out", "x.dar", "--model", model)
    assert dar("decode", "x.dar", "--model", model).out == "decoded.png: 3 pictures\n"
    assert pixels("decoded.png").shape[1] == GUTTER + 3 * (LEAST_TILE + GUTTER)
    files = dar("decode", "x.dar", "--out", "d/", "--model", model, "--json").json["files"]
    assert files == [f"d/x-00{i}.png" for i in range(3)]
    assert np.array_equal(pixels(files[0]), pixels(files[2]))  # same codes, same noise
    assert not np.array_equal(pixels(files[0]), pixels(files[1]))


def test_another_size_is_resized_with_notice(dar: Dar, model: str, picture: Path) -> None:
    Image.open(picture).resize((40, 24)).save("wide.png")
    done = dar("encode", "wide.png", "--out", "x.dar", "--model", model, "--json")
    assert done.status == 0 and done.json["bytes"] == 12
    assert done.err == "dar: wide.png: resized from 40x24, its middle square to 16x16\n"


def test_labels_are_listed_by_part_or_pattern(dar: Dar, model: str) -> None:
    assert len(dar("labels", "--model", model).out.splitlines()) == 6
    assert dar("labels", "noto/*", "--model", model).out.split() == [
        "noto/cat-face",
        "noto/face-smiling",
        "noto/hotel",
    ]
    assert dar("labels", "CAT", "--model", model, "--json").json["labels"] == {
        "fluent/cat-face": 0,
        "noto/cat-face": 2,
        "twemoji/cat-face": 5,
    }


def test_a_model_without_names_takes_numbers(
    dar: Dar, here: Path, fresh_pipeline: DARPipeline
) -> None:
    DARPipeline(fresh_pipeline.prior, fresh_pipeline.tokenizer).save_pretrained("bare")
    assert "0 to 5" in dar("labels", "--model", "bare").out
    done = dar("sample", "3", "-n", 2, "--model", "bare", "--json")
    assert [picture["label"] for picture in done.json["pictures"]] == ["3", "3"]
    assert len(dar("sample", "--model", "bare", "--json").json["pictures"]) == 16
    assert dar("sample", "6", "--model", "bare").status == 2


def test_convert_there_and_back(dar: Dar, model: str, here: Path) -> None:
    assert dar("convert", f"{model}/prior", "prior.pt").status == 0
    found = dar("info", "prior.pt", "--json").json
    assert found["kind"] == "prior" and found["config"]["dim"] == 32 and found["refused"] is None
    assert dar("convert", model, "official", "--to", "official").status == 0
    done = dar(
        "convert", "official/prior.pt", "official/tokenizer.pt", "back", "--image-size", 16,
        "--json",
    )  # fmt: skip
    assert done.status == 0, done.err
    assert "back/model_index.json" in done.json["files"]
    files = [
        dar("sample", "2", "--model", where, "--out", f"{i}/", "--json").json["files"][0]
        for i, where in enumerate((model, "back"))
    ]
    assert np.array_equal(pixels(files[0]), pixels(files[1]))


def test_info_of_a_pipeline_and_of_a_picture(dar: Dar, model: str, here: Path) -> None:
    found = dar("info", model, "--json").json
    assert found["format"] == "pipeline" and found["components"]["tokenizer"]["parameters"] > 1000
    text = dar("info", model).out
    assert "components.prior.config.vocab_size" in text and "64" in text
    dar("sample", "hotel", "--seed", 9, "--model", model)
    about = dar("info", "samples.png", "--json").json
    assert about["pictures"] == [{"label": "noto/hotel", "seed": 9}]
    Image.new("RGB", (8, 8)).save("other.png")
    done = dar("info", "other.png")
    assert done.status == 1 and "expected a picture that dar wrote" in done.err


def test_doctor_reports_ops(dar: Dar) -> None:
    assert "vq_nearest" in dar("doctor", "--json").json["ops"]
    assert "vq_nearest" in dar("doctor").out
    tests = dar("doctor", "--self-test", "--json").json["attention"]["self_test"]
    assert "sdpa" in {t["implementation"] for t in tests} and all(t["passed"] for t in tests)


def test_json_is_one_document_and_nothing_else(dar: Dar, model: str, picture: Path) -> None:
    for argv in (
        ("sample", "hotel"),
        ("preview", "hotel"),
        ("restyle", picture, "--labels", "hotel"),
        ("reconstruct", picture),
        ("encode", picture),
    ):
        done = dar(*argv, "--model", model, "--json")
        assert done.status == 0, done.err
        assert isinstance(json.loads(done.out), dict)
        assert done.err == ""
