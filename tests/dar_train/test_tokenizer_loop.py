"""A tokenizer's training: exact resumption, what it writes, what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dar_fast.checkpoint import load_model
from dar_kernels import UnavailableError
from dar_train.data import open_pictures
from dar_train.distributed import Ranks
from dar_train.loop import Loop
from dar_train.tokenizer_loop import first_pictures, tokenizer_loop, train_tokenizer

ALONE = Ranks(0, 1, 0, torch.device("cpu"))
ONE_STEP = 1e-9  # minutes a call


def make_loop(recipe) -> Loop:
    return tokenizer_loop(recipe, ALONE)


def everything(loop: Loop) -> dict[str, Tensor]:
    """Weights, average, optimizer states and the task's own, by names."""
    found = {f"model {n}": t for n, t in loop.task.model.state_dict().items()}
    found |= {f"average {n}": t for n, t in loop.ema.module.state_dict().items()}
    for i, optimizer in enumerate(loop.optimizers):
        for number, state in optimizer.state_dict()["state"].items():
            found |= {f"optimizer {i} {number} {k}": torch.as_tensor(v) for k, v in state.items()}
    found |= {f"task {n}": torch.as_tensor(v) for n, v in loop.task.state_dict().items()}
    return {name: tensor.clone() for name, tensor in found.items()}


@pytest.mark.parametrize(("optimizer", "rollout"), [("adamw", 0.0), ("muon", 1.0)])
def test_resumed_equals_uninterrupted(tokenizer_recipe, tmp_path, optimizer, rollout) -> None:
    recipe = tokenizer_recipe(
        optimizer=optimizer, rollout=rollout, schedule="linear", decay_fraction=0.3, augment=True,
        steps=5, codebook_from_data=True, continuous_steps=2, revive_after=2, draws_per_image=2,
        batch=4, micro_batch=None if rollout else 3, gate_init=0.1, workers=0,
    )  # fmt: skip
    whole = make_loop(recipe)
    assert whole.run()
    parts = replace(recipe, out=tmp_path / "parts", call_minutes=ONE_STEP)
    loops = []
    for _ in range(5):
        loops.append(make_loop(parts))
        assert loops[-1].run() is (len(loops) == 5)
    expected, actual = everything(whole), everything(make_loop(parts))
    assert expected.keys() == actual.keys()
    assert [n for n in expected if not torch.equal(expected[n], actual[n])] == []
    assert [n for n in expected if not torch.isfinite(expected[n].float()).all()] == []


def test_another_batch_starts_its_flight_anew(tokenizer_recipe) -> None:
    recipe = tokenizer_recipe(rollout=1.0, steps=1, workers=0)
    assert make_loop(recipe).run()
    other = make_loop(replace(recipe, batch=2, steps=2))
    assert other.run()
    assert len(other.task.rollout.flight.x) == 2 * (other.task.config.num_steps - 1)


def test_other_seeds_train_otherwise(tokenizer_recipe, tmp_path) -> None:
    recipe = tokenizer_recipe(steps=1, workers=0)
    loops = [make_loop(r) for r in (recipe, replace(recipe, seed=1, out=tmp_path / "other"))]
    assert all(loop.run() for loop in loops)
    a, b = (loop.task.model.state_dict() for loop in loops)
    assert not all(torch.equal(a[name], b[name]) for name in a)


def test_training_reduces_the_held_out_loss(tokenizer_recipe) -> None:
    recipe = tokenizer_recipe(steps=60, lr=3e-3, ema=0.9, batch=8, gate_init=0.1, workers=0)
    loop = make_loop(recipe)
    before = loop.task.evaluate(loop.ema.module, 0)
    loop.run()
    after = loop.task.evaluate(loop.ema.module, 1)
    assert after["loss"] < 0.8 * before["loss"]
    assert after["psnr"] > before["psnr"]


def test_what_a_run_leaves(tokenizer_recipe) -> None:
    recipe = tokenizer_recipe(
        log_steps=1, revive_after=1, micro_batch=2, recompute="selective", precision="bf16",
        decay_fraction=0.0, workers=0,
    )  # fmt: skip
    assert train_tokenizer(recipe)
    lines = [json.loads(line) for line in (recipe.out / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train] == [1, 2, 3, 4]
    for line in train:
        assert line["loss"] == pytest.approx(line["fm"] + line["vq"] + line["commit"], rel=1e-3)
        assert line["codes_dead"] == 32 * (1 - line["codes_used"]) > 0
        assert line["revived"] == min(line["codes_dead"], 2 * 8)  # rows of a micro-batch
    held_out = lines[-1]
    assert held_out["kind"] == "held_out"
    assert {"loss", "psnr", "psnr_of_mean", "codes_used", "perplexity"} <= set(held_out)
    assert (recipe.out / "pictures" / "step-00000004.png").is_file()
    assert load_model(recipe.out / "tokenizer").config == recipe.config()


def test_the_codebook_starts_on_the_first_pictures(tokenizer_recipe) -> None:
    recipe = tokenizer_recipe(codebook_from_data=True, augment=True, workers=0)
    pictures = open_pictures(recipe.data, 16)
    images = first_pictures(recipe, pictures, 16)
    assert images.shape == (512, 3, 16, 16)
    assert torch.equal(images, first_pictures(recipe, pictures, 16))
    loops = [make_loop(recipe), make_loop(replace(recipe, codebook_from_data=False))]
    fitted, random = (loop.task.model.quantizer.codebook for loop in loops)
    assert not torch.equal(fitted, random)
    assert torch.equal(fitted, loops[0].ema.module.quantizer.codebook)
    rows = loops[0].task._encoder_rows(images.float() / 127.5 - 1)
    nearest = [(2 - 2 * rows @ codebook.T).amin(1).mean() for codebook in (fitted, random)]
    assert nearest[0] < 0.5 * nearest[1]


def test_a_head_without_its_loss_is_not_trained(tokenizer_recipe, model_files, tmp_path) -> None:
    values = json.loads(Path(model_files["tokenizer"]).read_text())
    values["dit"]["repa_layer"] = 0
    model = tmp_path / "with-head.json"
    model.write_text(json.dumps(values))
    loop = make_loop(tokenizer_recipe(model=str(model), steps=1, workers=0))
    before = loop.task.model.pixel_dit.repa_out[0].weight.clone()
    assert loop.run()
    assert torch.equal(loop.task.model.pixel_dit.repa_out[0].weight, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("repa_weights", r"repa_weights: expected a model with dit\.repa_layer"),
        ("lpips_weights", "lpips_weights: expected a weights file, got"),
        ("perceptual", r"perceptual: expected a \.safetensors file of"),
    ],
)
def test_losses_need_their_files(tokenizer_recipe, tmp_path, change, message) -> None:
    with pytest.raises(ValueError, match=message):
        make_loop(tokenizer_recipe(**{change: tmp_path / "none.pth"}, workers=0))


def test_attention_by_name(tokenizer_recipe) -> None:
    with pytest.raises((ValueError, UnavailableError), match=r"attention: flash-attn: "):
        train_tokenizer(tokenizer_recipe(attention="flash-attn", workers=0))
    assert train_tokenizer(tokenizer_recipe(attention="sdpa", steps=1, workers=0))
