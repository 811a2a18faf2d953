"""Recipe files: round trips, every mistake by its name, and nothing but ValueError for any."""

import tomllib
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dar_fast.problems import ProblemsError
from dar_kernels.attention import OP
from dar_train.recipes import (
    CLASSIFIER_RECIPES,
    PRIOR_RECIPES,
    TOKENIZER_DEMO,
    TOKENIZER_RECIPES,
    ClassifierRecipe,
    PriorRecipe,
    TokenizerRecipe,
    read_recipe,
    recipe_toml,
    resolve,
    validate,
)
from dar_train.recipes.files import GROUPS
from dar_train.recipes.models import merged_overrides

KINDS = {
    "tokenizer": TOKENIZER_RECIPES,
    "prior": PRIOR_RECIPES,
    "classifier": CLASSIFIER_RECIPES,
}
ALL = [(kind, name) for kind, recipes in KINDS.items() for name in recipes]


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_presets_survive_a_file(kind, name) -> None:
    recipe = KINDS[kind][name]
    assert resolve(KINDS[kind], tomllib.loads(recipe_toml(recipe))) == recipe


texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)


@settings(max_examples=60, deadline=None)
@given(
    out=texts,
    steps=st.none() | st.integers(1, 2**40),
    minutes=st.floats(1e-12, 1e300),
    betas=st.tuples(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True)),
    override=st.lists(texts, max_size=3).map(lambda each: merged_overrides(each)),
    lpips=st.none() | texts,
)
def test_any_recipe_survives_a_file(out, steps, minutes, betas, override, lpips) -> None:
    recipe = replace(
        TOKENIZER_DEMO, out=Path(out), steps=steps, minutes=minutes, betas=betas,
        override=override, lpips_weights=None if lpips is None else Path(lpips),
    )  # fmt: skip
    if lpips == "none" or out == "none":  # "none" is nothing; ./none is a file of that name
        return
    assert resolve(TOKENIZER_RECIPES, tomllib.loads(recipe_toml(recipe))) == recipe


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=4,
)
names = sorted({field.name for cls in (TokenizerRecipe, PriorRecipe) for field in fields(cls)})


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    values=st.dictionaries(st.sampled_from(names) | st.text(max_size=8), plain, max_size=4),
)
def test_random_files_are_recipes_or_named_mistakes(kind, values) -> None:
    try:
        recipe = resolve(KINDS[kind], values)
    except ProblemsError as error:
        known = {*names, "size", "width", "model", "recipe"}
        for line in error.problems:
            field = line.partition(":")[0].partition(",")[0].partition(".")[0]
            assert field in known or field in values, line
            assert "expected" in line
            assert "got" in line
        return
    assert recipe == resolve(KINDS[kind], tomllib.loads(recipe_toml(recipe)))
    if not isinstance(recipe, ClassifierRecipe):
        try:
            recipe.config()
        except ProblemsError as error:
            assert all(line.partition(":")[0].startswith(("model", "override"))
                       for line in error.problems)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(
    changes=st.dictionaries(
        st.sampled_from(["dit", "dit.depth", "patch_size", "num_groups", "dit.data_std", "heads"]),
        plain,
        max_size=3,
    )
)
def test_random_models_are_models_or_named_mistakes(changes) -> None:
    recipe = resolve(TOKENIZER_RECIPES, {"model": changes}) if _plain(changes) else TOKENIZER_DEMO
    try:
        assert recipe.config().num_tokens == 64
    except ProblemsError as error:
        assert all("expected" in line for line in error.problems)


def _plain(changes) -> bool:
    try:
        resolve(TOKENIZER_RECIPES, {"model": changes})
    except ProblemsError:
        return False
    return True


@pytest.mark.parametrize(
    ("values", "lines"),
    [
        ({"bath": 3}, ["bath: expected a field of the recipe, got 'bath'; did you mean 'batch'?"]),
        ({"batch": "64"}, ["batch: expected an integer, got '64'"]),
        ({"batch": True}, ["batch: expected an integer, got True"]),
        ({"batch": 64.0}, ["batch: expected an integer, got 64.0"]),
        ({"lr": "fast"}, ["lr: expected a number, got 'fast'"]),
        ({"augment": 1}, ["augment: expected true or false, got 1"]),
        ({"betas": [0.9]}, ["betas: expected 2 numbers, got (0.9,)"]),
        ({"data": 3}, ["data: expected a path, got 3"]),
        ({"steps": "many"}, ["steps: expected an integer or none, got 'many'"]),
        ({"start": "now"}, ["start: expected one of 'latest', 'stable', 'fresh', got 'now'"]),
        ({"override": [3]}, ["override: expected a list of texts, got [3]"]),
        ({"device": "gpu"}, ["device: expected auto, cpu, cuda or cuda:<n>, got 'gpu'"]),
        (
            {"preset": "dem"},
            ["preset: expected one of v1, lite, v1-4096, demo, got 'dem'; did you mean 'demo'?"],
        ),
        ({"preset": 3}, ["preset: expected text, got 3"]),
        (
            {"batch": 0, "lr": -1, "minutes": "none"},
            [
                "batch: expected a positive number, got 0",
                "lr: expected a positive number, got -1.0",
                "steps, minutes: expected at least one of them, got neither",
            ],
        ),
        (
            {"micro_batch": 9, "batch": 8},
            [
                "micro_batch: expected 1 to the batch, got 9 of 8",
                "micro_batch: expected none with a rollout, got 9",
            ],
        ),
        (
            {"bath": 3, "ema": 1},
            [
                "bath: expected a field of the recipe, got 'bath'; did you mean 'batch'?",
                "ema: expected a number in [0, 1), got 1.0",
            ],
        ),
    ],
)
def test_mistakes_are_named_all_together(values, lines) -> None:
    with pytest.raises(ProblemsError) as raised:
        resolve(TOKENIZER_RECIPES, values)
    assert list(raised.value.problems) == lines


def test_models_that_contradict_themselves() -> None:
    recipe = resolve(
        TOKENIZER_RECIPES,
        {"model": {"num_groups": 7, "patch_size": 5, "dit": {"patch_size": 3, "data_std": "x"}}},
    )
    with pytest.raises(ProblemsError) as raised:
        recipe.config()
    assert list(raised.value.problems) == [
        "model.dit.data_std: expected a number, got 'x'",
        "model.patch_size: expected a divisor of image_size 32, got 5",
        "model.dit.patch_size: expected a divisor of image_size 32, got 3",
        "model.num_groups: expected a divisor of num_tokens 64, got 7",
    ]


def test_the_model_table() -> None:
    recipe = resolve(
        TOKENIZER_RECIPES,
        {"override": ["num_steps=4"], "model": {"name": "lite", "dit": {"depth": 6}}},
    )
    assert (recipe.model, recipe.override) == ("lite", ("num_steps=4", "dit.depth=6"))
    assert (recipe.config().dit.depth, recipe.config().dit.dim) == (6, 512)
    changed = resolve(TOKENIZER_RECIPES, {"preset": "v1-4096", "override": ["codebook_size=2048"]})
    assert changed.override == ("codebook_size=2048",)


def test_unreadable_files(tmp_path) -> None:
    with pytest.raises(ValueError, match="recipe: expected a readable file, got"):
        read_recipe(tmp_path / "none.toml")
    file = tmp_path / "bad.toml"
    for content in (b"lr = ", b"lr = 1\nlr = 2", b"\xff\xfe"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"recipe: expected TOML in .*bad.toml"):
            read_recipe(file)


def test_every_field_has_one_group() -> None:
    grouped = [name for group in GROUPS.values() for name in group]
    assert len(grouped) == len(set(grouped))
    for cls in (TokenizerRecipe, PriorRecipe, ClassifierRecipe):
        assert {field.name for field in fields(cls)} <= set(grouped)


def _problems(recipe, world=1):
    with pytest.raises(ProblemsError) as raised:
        validate(recipe, world)
    return list(raised.value.problems)


def test_a_sound_recipe_is_valid_and_leaves_no_trace(tokenizer_recipe) -> None:
    recipe = tokenizer_recipe()
    validate(recipe)
    validate(recipe, world=2)
    assert not recipe.out.exists()


def test_contradictions_with_the_machine(tokenizer_recipe, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    recipe = tokenizer_recipe(
        steps=4, warmup=4, batch=10, float8=True, out=tmp_path / "file" / "run",
        lpips_weights=tmp_path / "vgg.pth", repa_weights=tmp_path / "dino.pth",
        init=tmp_path / "init.pt", parallel="fsdp", optimizer="muon",
    )  # fmt: skip
    lines = _problems(recipe, world=4)
    starts = [line.partition(",")[0] for line in lines]
    assert starts[:4] == [
        "batch: expected a multiple of the 4 ranks",
        "warmup: expected fewer than the 4 steps",
        "float8: expected false on a CPU",
        "optimizer: expected 'adamw' with parallel 'fsdp'",
    ]
    assert "https://download.pytorch.org/models/vgg16-397923af.pth" in lines[4]
    assert "dinov2_vitb14_pretrain.pth" in lines[5]
    assert starts[6] == "init: expected a component folder or an official .pt"
    assert lines[7].startswith("out: expected a folder that can be written")
    assert lines[8].startswith("repa_weights: expected none for a model without dit.repa_layer")
    assert len(lines) == 9


def test_one_shape_of_micro_batches_under_compile(tokenizer_recipe) -> None:
    validate(tokenizer_recipe(batch=10, micro_batch=4))
    validate(tokenizer_recipe(batch=16, micro_batch=4, compile=True), world=2)
    validate(tokenizer_recipe(batch=4, micro_batch=4, compile=True), world=2)
    (line,) = _problems(tokenizer_recipe(batch=20, micro_batch=4, compile=True), world=2)
    assert line.startswith("micro_batch: expected a divisor of the 10 samples of a rank")


def test_back_ends_of_attention(tokenizer_recipe) -> None:
    validate(tokenizer_recipe(attention=OP.implementations[-1].name))
    (line,) = _problems(tokenizer_recipe(attention="flash_attn5"))
    assert line.startswith("attention: expected one of ")
    assert "got 'flash_attn5'; did you mean 'flash" in line
    absent = next(i for i in OP.implementations if i.missing() is not None)
    (line,) = _problems(tokenizer_recipe(attention=absent.name))
    assert line.startswith(f"attention: expected a back end that is here, got '{absent.name}': ")


def test_data(tokenizer_recipe, prior_recipe, tmp_path) -> None:
    (line,) = _problems(tokenizer_recipe(data=tmp_path / "none"))
    assert line.startswith("data: expected a packed file or a folder of pictures, got")
    validate(tokenizer_recipe(data=Path("shards-{000..127}.tar")))
    (tmp_path / "packed.npz").write_text("")
    (line,) = _problems(tokenizer_recipe(data=tmp_path / "packed.npz", crop=True))
    assert line.startswith("crop: expected false with a packed file")
    (tmp_path / "manifest.json").write_text("{}")
    validate(prior_recipe(data=tmp_path / "none", tokens=tmp_path, tokenizer=tmp_path))


def test_what_a_prior_needs(prior_recipe, tmp_path) -> None:
    recipe = prior_recipe(tokenizer=tmp_path / "none", tokens=tmp_path / "codes", model="hugs")
    assert [line.partition(",")[0] for line in _problems(recipe)] == [
        "model: expected one of ['1B'",
        "tokenizer: expected the folder of a trained tokenizer",
        "tokens: expected a folder that dar tokenize wrote",
    ]
