"""A prior's training: its codes, exact resumption, learning, export, what it refuses."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dar_fast import DARPipeline
from dar_fast.checkpoint import load_model
from dar_fast.config import TokenizerConfig
from dar_fast.models import Prior, Tokenizer
from dar_train.data import open_pictures
from dar_train.distributed import Ranks
from dar_train.draws import Draws
from dar_train.export import ExportRecipe, export_component, export_pipeline
from dar_train.loop import Loop
from dar_train.parallel import Parallel
from dar_train.prior_loop import prior_loop, train_prior
from dar_train.prior_task import PriorTask
from dar_train.tokens import code_batches, folder_hash
from dar_train.tokens.command import tokenize

ALONE = Ranks(0, 1, 0, torch.device("cpu"))
ONE_STEP = 1e-9  # minutes a call


@pytest.fixture
def tokenizer(model_files, tmp_path):
    with open(model_files["tokenizer"]) as file:
        config = TokenizerConfig.from_dict(json.load(file))
    torch.manual_seed(0)
    return export_component(Tokenizer(config, 0.1), tmp_path / "tokenizer")


def everything(loop: Loop) -> dict[str, Tensor]:
    """Weights, average and optimizer states, by names."""
    found = {f"model {n}": t for n, t in loop.task.model.state_dict().items()}
    found |= {f"average {n}": t for n, t in loop.ema.module.state_dict().items()}
    for i, optimizer in enumerate(loop.optimizers):
        for number, state in optimizer.state_dict()["state"].items():
            found |= {f"optimizer {i} {number} {k}": torch.as_tensor(v) for k, v in state.items()}
    return {name: tensor.clone() for name, tensor in found.items()}


def held_out(recipe) -> dict[str, float]:
    """Figures of the last evaluation."""
    lines = (recipe.out / "metrics.jsonl").read_text().splitlines()
    figures = json.loads(lines[-1])
    assert figures["kind"] == "held_out"
    return figures


def test_trains_resumes_and_exports(prior_recipe, tokenizer, tmp_path) -> None:
    recipe = prior_recipe(
        tokenizer=tokenizer, flip=True, views=1, optimizer="muon", steps=3, workers=0
    )
    assert train_prior(recipe)
    parts = replace(recipe, out=tmp_path / "parts", call_minutes=ONE_STEP)
    assert [train_prior(parts) for _ in range(3)] == [False, False, True]
    whole, resumed = (everything(prior_loop(r, ALONE)) for r in (recipe, parts))
    assert whole.keys() == resumed.keys()
    assert [n for n in whole if not torch.equal(whole[n], resumed[n])] == []
    assert isinstance(load_model(recipe.out / "prior"), Prior)
    figures = held_out(recipe)
    assert 0 < figures["unigram_entropy"] < figures["unigram_cross_entropy"]
    assert figures["cross_entropy"] > 0
    assert (recipe.out / "pictures" / "step-00000003.png").is_file()

    out = tmp_path / "pipeline"
    export_pipeline(ExportRecipe(tokenizer=tokenizer, prior=recipe.out / "prior", out=out))
    pipe = DARPipeline.from_pretrained(out)
    assert list(pipe.labels) == ["left", "right"]
    assert pipe("left", seeds=[1], output_type="codes").codes.shape == (1, 8)


def test_learns_to_tell_the_classes(prior_recipe, tokenizer) -> None:
    recipe = prior_recipe(
        tokenizer=tokenizer, steps=80, lr=1e-2, ema=0.9, batch=16, dropout=0.0, workers=0
    )
    train_prior(recipe)
    figures = held_out(recipe)
    assert figures["cross_entropy"] < 0.9 * figures["unigram_cross_entropy"]


@pytest.mark.parametrize("field", ["vocab_size", "num_tokens", "num_classes"])
def test_prior_must_fit(prior_recipe, tokenizer, field, tmp_path) -> None:
    with pytest.raises(ValueError, match=f"set --override {field}="):
        train_prior(prior_recipe(tokenizer=tokenizer, override=(f"{field}=16",), workers=0))
    assert not (tmp_path / "prior" / "tokens").exists()


def test_tokenizer_must_be_one(prior_recipe, tokenizer, tmp_path) -> None:
    with pytest.raises(ValueError, match="expected the folder of a trained tokenizer, got"):
        train_prior(prior_recipe(tokenizer=tmp_path / "none"))
    recipe = prior_recipe(tokenizer=tokenizer, steps=1, workers=0)
    train_prior(recipe)
    with pytest.raises(ValueError, match=r"expected a tokenizer in .*, got Prior"):
        train_prior(replace(recipe, tokenizer=recipe.out / "prior"))


@pytest.fixture
def tokens(tokenizer, pictures, tmp_path) -> Path:
    """What dar tokenize writes of the pictures, with their mirror images."""
    folder = tmp_path / "tokens"
    tokenize(tokenizer=tokenizer, data=pictures, out=folder, flip=True, workers=0, batch=8)
    return folder


def test_trains_on_what_dar_tokenize_wrote(prior_recipe, tokenizer, tokens, pictures) -> None:
    recipe = prior_recipe(tokenizer=tokenizer, tokens=tokens, flip=True, steps=2, workers=0)
    assert train_prior(recipe)
    assert not (recipe.out / "tokens").exists()
    inside = replace(recipe, tokens=None, out=recipe.out.with_name("inside"))
    assert train_prior(inside)
    a, b = (load_file(r.out / "prior" / "model.safetensors") for r in (recipe, inside))
    assert all(torch.equal(a[name], b[name]) for name in a)
    elsewhere = replace(recipe, data=Path("not-here"), out=recipe.out.with_name("elsewhere"))
    assert train_prior(elsewhere)


def test_refuses_tokens_of_something_else(
    prior_recipe, tokenizer, tokens, pictures, tmp_path, model_files
) -> None:
    recipe = prior_recipe(tokenizer=tokenizer, tokens=tokens, flip=True, workers=0)
    with open(model_files["tokenizer"]) as file:
        config = TokenizerConfig.from_dict(json.load(file))
    other = export_component(Tokenizer(config, 0.1), tmp_path / "other")
    hashes = f"{folder_hash(other)[:12]}, got {folder_hash(tokenizer)[:12]} in"
    with pytest.raises(ValueError, match=f"tokens: expected those of tokenizer {hashes}"):
        train_prior(replace(recipe, tokenizer=other))
    fewer = tmp_path / "fewer"
    shutil.copytree(pictures, fewer)
    (fewer / "left" / "0.png").unlink()
    prints = [open_pictures(data, 16).fingerprint[:12] for data in (fewer, pictures)]
    expected = f"those of pictures {prints[0]}, got {prints[1]} in .*set --data to"
    with pytest.raises(ValueError, match=f"tokens: expected {expected}"):
        train_prior(replace(recipe, data=fewer))
    (fewer / "right").rename(fewer / "up")
    with pytest.raises(ValueError, match="tokens: expected those of label names"):
        train_prior(replace(recipe, data=fewer))
    with pytest.raises(ValueError, match=r"views, plain, got plain; plain mirrored in .*--flip"):
        train_prior(replace(recipe, flip=False))
    manifest = tokens / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"complete": true', '"complete": false'))
    with pytest.raises(ValueError, match="got 0 of 3 chunks; run the same dar tokenize again"):
        train_prior(recipe)


def test_other_tokens_do_not_resume_a_run(prior_recipe, tokenizer, tokens) -> None:
    recipe = prior_recipe(tokenizer=tokenizer, tokens=tokens, flip=True, steps=2, workers=0)
    assert not train_prior(replace(recipe, call_minutes=ONE_STEP))
    with pytest.raises(ValueError, match="on which this run was trained, got"):
        train_prior(replace(recipe, tokens=None, views=1))


def test_two_ranks_step_as_one(prior_recipe, tokenizer, tokens) -> None:
    """The parts of two ranks, one after the other: their mean gradient is that of one rank."""
    recipe = prior_recipe(
        tokenizer=tokenizer, tokens=tokens, flip=True, workers=0, batch=8, class_dropout=0.5,
        dropout=0.0,
    )  # fmt: skip
    whole = prior_loop(recipe, ALONE)
    whole.step()
    store, model = whole.task.store, prior_loop(recipe, ALONE).task.model
    for rank in (0, 1):
        ranks = Ranks(rank, 2, rank, torch.device("cpu"))
        parallel = Parallel(model, "loss", ranks)
        batches = code_batches(store, batch=8, seed=recipe.seed, ranks=ranks)
        task = PriorTask(recipe, parallel, batches, store, None)
        draws = Draws(recipe.seed, 0, 8, torch.arange(4) + 4 * rank, ranks.device)
        (task.loss(batches.next(), draws).total / 2).backward()
        batches.close()
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip)
    pairs = zip(whole.task.model.parameters(), model.parameters(), strict=True)
    for expected, actual in pairs:
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-4, atol=1e-6)


def test_labels_give_way_as_often_as_asked(prior_recipe, tokenizer, tokens, monkeypatch) -> None:
    recipe = prior_recipe(
        tokenizer=tokenizer, tokens=tokens, flip=True, workers=0, batch=400, class_dropout=0.25
    )
    loop, seen = prior_loop(recipe, ALONE), []

    def call(codes, labels):
        seen.append(labels)
        return loop.task.model.loss(codes, labels)

    monkeypatch.setattr(loop.parallel, "call", call)
    loop.step()
    null = float((torch.cat(seen) == loop.task.model.config.null_class).float().mean())
    assert 0.15 < null < 0.35
    loop.task.batches.close()


def test_export_needs_both_kinds(tokenizer, tmp_path) -> None:
    labels = tmp_path / "labels.json"
    labels.write_text('["a", "b"]')
    recipe = ExportRecipe(tokenizer=tokenizer, prior=tokenizer, labels=labels, out=tmp_path / "p")
    with pytest.raises(ValueError, match="expected a prior and a tokenizer, got Tokenizer and"):
        export_pipeline(recipe)
    labels.write_text("{}")
    with pytest.raises(ValueError, match="expected a JSON list of names in"):
        export_pipeline(recipe)
