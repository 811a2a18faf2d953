"""A tiny tokenizer, a tiny data set, and recipes over them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dar_train.recipes import PriorRecipe, TokenizerRecipe

TOKENIZER = {
    "image_size": 16, "patch_size": 4, "encoder_dim": 16, "encoder_depth": 1, "decoder_dim": 16,
    "decoder_depth": 1, "head_dim": 8, "code_dim": 4, "codebook_size": 32, "num_tokens": 8,
    "num_groups": 4, "num_steps": 4, "query_table": 8,
    "dit": {"dim": 16, "depth": 1, "patch_size": 4, "head_dim": 8},
}  # fmt: skip
PRIOR = {"dim": 16, "depth": 1, "heads": 2, "vocab_size": 32, "num_tokens": 8, "num_classes": 2}


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Twenty pictures in two folders: dark squares on the left or on the right."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for label, name in enumerate(("left", "right")):
        (folder / name).mkdir()
        for i in range(10):
            pixels = np.full((16, 16, 3), 255, dtype=np.uint8)
            start = 2 + 7 * label
            pixels[4:12, start : start + 5] = rng.integers(0, 120, 3)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def model_files(tmp_path_factory) -> dict[str, str]:
    """Names of the tiny models' config files."""
    folder = tmp_path_factory.mktemp("configs")
    files = {}
    for name, values in (("tokenizer", TOKENIZER), ("prior", PRIOR)):
        (folder / f"{name}.json").write_text(json.dumps(values))
        files[name] = str(folder / f"{name}.json")
    return files


@pytest.fixture
def tokenizer_recipe(pictures, model_files, tmp_path):
    """A function of overrides to a recipe of a few tiny steps."""

    def make(**changes) -> TokenizerRecipe:
        values = {
            "data": pictures, "out": tmp_path / "run", "model": model_files["tokenizer"],
            "steps": 4, "batch": 4, "warmup": 0, "precision": "fp32", "device": "cpu",
            "eval_pictures": 2,
        }  # fmt: skip
        return TokenizerRecipe(**(values | changes))

    return make


@pytest.fixture
def prior_recipe(pictures, model_files, tmp_path):
    """A function of overrides to a recipe of a few tiny steps."""

    def make(**changes) -> PriorRecipe:
        values = {
            "data": pictures, "out": tmp_path / "prior", "model": model_files["prior"], "steps": 4,
            "batch": 4, "warmup": 0, "precision": "fp32", "device": "cpu", "eval_pictures": 2,
        }  # fmt: skip
        return PriorRecipe(**(values | changes))

    return make
