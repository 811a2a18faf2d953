"""Recipes refuse what cannot be, and the presets are the paper's."""

import dataclasses
import json
from pathlib import Path

import pytest

from dar_fast.config import PRIORS, TOKENIZERS
from dar_fast.problems import ProblemsError
from dar_train.recipes import (
    PRIOR_L,
    PRIOR_RECIPES,
    PRIOR_XL,
    TOKENIZER_RECIPES,
    TOKENIZER_V1,
    ClassifierRecipe,
    PriorRecipe,
    TokenizerRecipe,
    validate,
)
from dar_train.recipes.memory import estimate


def test_published_tokenizer() -> None:
    r = TOKENIZER_V1
    assert (r.lr, r.betas, r.batch, r.steps) == (2e-4, (0.9, 0.95), 1024, 210_000)
    assert (r.ema, r.warmup, r.weight_decay, r.schedule) == (0.999, 500, 0.0, "constant")
    assert (r.lpips_weight, r.repa_weight, r.optimizer) == (0.5, 0.5, "adamw")
    assert r.config() == TOKENIZERS["v1"]


def test_published_prior() -> None:
    r = PRIOR_L
    assert (r.lr, r.betas, r.batch, r.steps) == (4e-4, (0.9, 0.95), 1024, 360_000)
    assert (r.weight_decay, r.grad_clip, r.dropout, r.class_dropout) == (0.05, 1.0, 0.1, 0.1)
    assert r.schedule == "linear"
    assert r.steps * r.decay_fraction == pytest.approx(60_000)  # the last 50 of 300 epochs
    assert r.lr * r.final_lr == pytest.approx(1e-5)
    assert r.config() == PRIORS["L"]
    assert PRIOR_XL.config() == PRIORS["XL"]


@pytest.mark.parametrize("name", [name for name in PRIOR_RECIPES if name != "demo"])
def test_every_published_prior_is_trained_alike(name) -> None:
    r = PRIOR_RECIPES[name]
    assert r.config() == PRIORS[name]
    alike = dataclasses.replace(
        r, preset="L", model="L", micro_batch=PRIOR_L.micro_batch, parallel=PRIOR_L.parallel
    )
    assert alike == PRIOR_L
    assert (r.ten_crop, r.optimizer, r.warmup, r.ema) == (True, "adamw", 0, 0.0)


def test_every_model_has_a_preset() -> None:
    assert PRIOR_RECIPES.keys() == PRIORS.keys()
    assert TOKENIZER_RECIPES.keys() - {"v1-4096"} == TOKENIZERS.keys()


def test_fewer_codes_are_a_fine_tuning() -> None:
    r = TOKENIZER_RECIPES["v1-4096"]
    assert r.config() == dataclasses.replace(TOKENIZERS["v1"], codebook_size=4096)
    assert r.init is not None
    assert r.codebook_from_data
    assert r.continuous_steps == 0
    assert r.steps < TOKENIZER_V1.steps


PUBLISHED = [r for rs in (TOKENIZER_RECIPES, PRIOR_RECIPES) for r in rs.values() if r.steps]


@pytest.mark.parametrize("recipe", PUBLISHED, ids=lambda r: r.preset)
def test_published_recipes_fit_eight_gpus_of_80_gb(recipe) -> None:
    needs = estimate(recipe, world=8)
    assert needs.total < 64e9  # a fifth left for logits, teachers and the allocator
    whole = estimate(dataclasses.replace(recipe, parallel="ddp"), world=8)
    assert (recipe.parallel == "fsdp") == (whole.states > 50e9)


def test_estimates_count_the_parameters() -> None:
    assert estimate(PRIOR_L).parameters == pytest.approx(343e6, rel=0.01)
    assert estimate(TOKENIZER_V1).parameters == pytest.approx(307e6, rel=0.03)
    half = dataclasses.replace(PRIOR_L, micro_batch=PRIOR_L.micro_batch // 2)
    assert estimate(half).activations == estimate(PRIOR_L).activations / 2
    averaged = dataclasses.replace(PRIOR_L, ema=0.9)
    assert estimate(averaged).states - estimate(PRIOR_L).states == 4 * estimate(half).parameters


def test_a_published_recipe_names_its_weights() -> None:
    with pytest.raises(ProblemsError, match="lpips_weights: expected a weights file"):
        validate(TOKENIZER_V1, 8)


@pytest.mark.parametrize("recipes", [TOKENIZER_RECIPES, PRIOR_RECIPES])
def test_presets_are_named_after_themselves(recipes) -> None:
    for name, recipe in recipes.items():
        assert recipe.preset == name
        recipe.config()
        json.dumps(recipe.to_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "steps, minutes: expected at least one of them"),
        ({"steps": 0}, "steps: expected a positive number, got 0"),
        ({"minutes": -1.0}, "minutes: expected a positive number of minutes, got -1.0"),
        ({"steps": 1, "call_minutes": 0.0}, "call_minutes: expected a positive"),
        ({"steps": 1, "batch": 0}, "batch: expected a positive number, got 0"),
        ({"steps": 1, "batch": 4, "micro_batch": 5}, "micro_batch: expected 1 to the batch, got 5"),
        ({"steps": 1, "lr": 0.0}, "lr: expected a positive number"),
        ({"steps": 1, "betas": (0.9, 1.0)}, "betas: expected two numbers"),
        ({"steps": 1, "weight_decay": -0.1}, "weight_decay: expected a number >= 0"),
        ({"steps": 1, "ema": 1.0}, "ema: expected a number"),
        ({"steps": 1, "decay_fraction": 1.5}, "decay_fraction: expected a number"),
        ({"steps": 1, "seed": -1}, "seed: expected a number >= 0, got -1"),
        ({"steps": 1, "threads": 0}, "threads: expected a positive number, got 0"),
        ({"steps": 1, "lr": float("nan")}, "lr: expected a positive number, got nan"),
    ],
)
def test_bad_values(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        TokenizerRecipe(**changes)


def test_bad_values_of_the_kinds() -> None:
    with pytest.raises(ValueError, match="draws_per_image: expected a positive number, got 0"):
        TokenizerRecipe(steps=1, draws_per_image=0)
    with pytest.raises(ValueError, match="class_dropout: expected a number"):
        PriorRecipe(steps=1, class_dropout=1.0)
    with pytest.raises(ValueError, match="size: expected a positive multiple of 8, got 30"):
        ClassifierRecipe(size=30)


def test_overrides_change_the_model() -> None:
    recipe = TokenizerRecipe(steps=1, override=("dit.depth=3", "encoder_depth=2"))
    config = recipe.config()
    assert (config.dit.depth, config.encoder_depth) == (3, 2)
    assert TOKENIZERS["demo"].dit.depth != 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("depth", "expected key=value with a key of the model, got 'depth'"),
        ("dit.width=3", "expected key=value with a key of the model, got 'dit.width=3'"),
        ("encoder_depth.x=3", "expected key=value with a key"),
        ("encoder_depth=two", "expected a JSON value in 'encoder_depth=two'"),
        ("encoder_depth=0", "expected integer encoder_depth >= 1, got 0"),
    ],
)
def test_bad_overrides(override, message) -> None:
    with pytest.raises(ValueError, match=message):
        TokenizerRecipe(steps=1, override=(override,)).config()


def test_models_from_files(tmp_path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(PRIORS["B"].to_dict()))
    recipe = PriorRecipe(steps=1, model=str(file))
    assert recipe.config() == PRIORS["B"]
    file.write_text("[]")
    with pytest.raises(ValueError, match=r"expected a JSON object in .*, got list"):
        recipe.config()
    file.write_text("{")
    with pytest.raises(ValueError, match="expected JSON in"):
        recipe.config()
    with pytest.raises(ValueError, match=r"expected one of .* or a config.json, got 'huge'"):
        PriorRecipe(steps=1, model="huge").config()


def test_recipes_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TOKENIZER_V1.out = Path("elsewhere")  # type: ignore[misc]
