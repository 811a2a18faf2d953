"""The prior's loop: cached codes and their manifest, exact resumption, learning, export."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from dar_fast import DARPipeline
from dar_fast.checkpoint import load_model
from dar_fast.config import TokenizerConfig
from dar_fast.models import Prior, Tokenizer
from dar_train import checkpoints
from dar_train.data import load_pictures
from dar_train.export import ExportRecipe, export_component, export_pipeline
from dar_train.prior_loop import train_prior
from dar_train.tokens import folder_hash, tokens_of, unigram

ONE_STEP = 1e-9  # minutes a call


@pytest.fixture
def tokenizer(model_files, tmp_path):
    with open(model_files["tokenizer"]) as file:
        config = TokenizerConfig.from_dict(json.load(file))
    torch.manual_seed(0)
    return export_component(Tokenizer(config, 0.1), tmp_path / "tokenizer")


def test_trains_resumes_and_exports(prior_recipe, tokenizer, tmp_path) -> None:
    recipe = prior_recipe(tokenizer=tokenizer, flip=True, views=1, optimizer="muon", steps=3)
    assert train_prior(recipe)
    parts = replace(recipe, out=tmp_path / "parts", call_minutes=ONE_STEP)
    assert [train_prior(parts) for _ in range(3)] == [False, False, True]
    for name in ("model", "ema", "optimizer-0", "optimizer-1"):
        whole, resumed = (
            load_file(checkpoints.find_state(r.out / "states") / f"{name}.safetensors")
            for r in (recipe, parts)
        )
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    prior = load_model(recipe.out / "prior")
    assert isinstance(prior, Prior)
    lines = (recipe.out / "metrics.jsonl").read_text().splitlines()
    held_out = json.loads(lines[-1])
    assert held_out["kind"] == "held_out"
    assert 0 < held_out["unigram_entropy"] < held_out["unigram_cross_entropy"]
    assert held_out["cross_entropy"] > 0

    out = tmp_path / "pipeline"
    export_pipeline(ExportRecipe(tokenizer=tokenizer, prior=recipe.out / "prior", out=out))
    pipe = DARPipeline.from_pretrained(out)
    assert list(pipe.labels) == ["left", "right"]
    assert pipe("left", seeds=[1], output_type="codes").codes.shape == (1, 8)


def test_learns_to_tell_the_classes(prior_recipe, tokenizer) -> None:
    recipe = prior_recipe(tokenizer=tokenizer, steps=80, lr=1e-2, ema=0.9, batch=16, dropout=0.0)
    train_prior(recipe)
    lines = (recipe.out / "metrics.jsonl").read_text().splitlines()
    held_out = json.loads(lines[-1])
    assert held_out["cross_entropy"] < 0.9 * held_out["unigram_cross_entropy"]


def test_codes_are_cached_and_belong_to_their_tokenizer(tokenizer, pictures, tmp_path) -> None:
    data = load_pictures(pictures, 16)
    model = load_model(tokenizer, dtype=torch.float32)
    digest = folder_hash(tokenizer)
    folder = tmp_path / "tokens"
    first = tokens_of(model, digest, data, folder, flip=True)
    assert first.codes.shape == (2, 20, 8)
    assert first.codes.dtype == torch.uint16
    images = data.images.float() / 127.5 - 1
    assert torch.equal(first.codes[0].long(), model.encode(images))
    assert torch.equal(first.codes[1].long(), model.encode(images.flip(-1)))
    stamp = (folder / "codes.npy").stat().st_mtime_ns
    again = tokens_of(model, digest, data, folder, flip=True)
    assert torch.equal(first.codes, again.codes)
    assert (folder / "codes.npy").stat().st_mtime_ns == stamp
    with pytest.raises(
        ValueError, match=r"tokens: expected tokenizer 0{16} in .*remove the folder"
    ):
        tokens_of(model, "0" * 64, data, folder, flip=True)
    with pytest.raises(ValueError, match="tokens: expected flip False in"):
        tokens_of(model, digest, data, folder)
    other = data._replace(images=data.images.flip(0))
    with pytest.raises(ValueError, match="tokens: expected pictures"):
        tokens_of(model, digest, other, folder, flip=True)


@pytest.mark.parametrize("field", ["vocab_size", "num_tokens", "num_classes"])
def test_prior_must_fit(prior_recipe, tokenizer, field) -> None:
    with pytest.raises(ValueError, match=f"set --override {field}="):
        train_prior(prior_recipe(tokenizer=tokenizer, override=(f"{field}=16",)))


def test_tokenizer_must_be_one(prior_recipe, tokenizer, tmp_path) -> None:
    with pytest.raises(ValueError, match="expected the folder of a trained tokenizer, got"):
        train_prior(prior_recipe(tokenizer=tmp_path / "none"))
    recipe = prior_recipe(tokenizer=tokenizer, steps=1)
    train_prior(recipe)
    with pytest.raises(ValueError, match=r"expected a tokenizer in .*, got Prior"):
        train_prior(replace(recipe, tokenizer=recipe.out / "prior"))


def test_export_needs_both_kinds(tokenizer, tmp_path) -> None:
    labels = tmp_path / "labels.json"
    labels.write_text('["a", "b"]')
    recipe = ExportRecipe(tokenizer=tokenizer, prior=tokenizer, labels=labels, out=tmp_path / "p")
    with pytest.raises(ValueError, match="expected a prior and a tokenizer, got Tokenizer and"):
        export_pipeline(recipe)
    labels.write_text("{}")
    with pytest.raises(ValueError, match="expected a JSON list of names in"):
        export_pipeline(recipe)


def test_unigram_entropy_of_known_counts() -> None:
    train = torch.tensor([0, 0, 1, 1])
    figures = unigram(train, torch.tensor([0, 3]), 4)
    assert figures["unigram_entropy"] == pytest.approx(torch.tensor(2.0).log().item())
    expected = -(torch.tensor(3 / 8).log() + torch.tensor(1 / 8).log()) / 2
    assert figures["unigram_cross_entropy"] == pytest.approx(expected.item())
