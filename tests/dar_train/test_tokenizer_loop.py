"""The tokenizer's loop: exact resumption, budgets, signals, failures, and what it writes."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from dar_fast.models import Tokenizer
from dar_train import checkpoints
from dar_train.data import load_pictures
from dar_train.loop import Loop, Stop, TrainingError, pick_device
from dar_train.tokenizer_loop import TokenizerTask

ONE_STEP = 1e-9  # minutes a call


def make_loop(recipe) -> Loop:
    config = recipe.config()
    torch.manual_seed(recipe.seed)
    device = torch.device("cpu")
    model = Tokenizer(config, recipe.gate_init)
    task = TokenizerTask(recipe, model, load_pictures(recipe.data, config.image_size), device)
    if recipe.codebook_from_data:
        task.start_codebook()
    return Loop(recipe, task, device)


def files_of(recipe) -> dict[str, torch.Tensor]:
    state = checkpoints.find_state(recipe.out / "states")
    assert state is not None
    return {
        f"{file.name}/{name}": tensor
        for file in sorted(state.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize(("optimizer", "rollout"), [("adamw", 0.0), ("muon", 1.0)])
def test_resumed_equals_uninterrupted(tokenizer_recipe, tmp_path, optimizer, rollout) -> None:
    recipe = tokenizer_recipe(
        optimizer=optimizer, rollout=rollout, schedule="linear", decay_fraction=0.3, augment=True,
        steps=5, codebook_from_data=True, continuous_steps=2, revive_after=2, draws_per_image=2,
        batch=4, micro_batch=None if rollout else 3, gate_init=0.1,
    )  # fmt: skip
    assert make_loop(recipe).run()
    whole = files_of(recipe)
    parts = replace(recipe, out=tmp_path / "parts", call_minutes=ONE_STEP)
    finished = [make_loop(parts).run() for _ in range(5)]
    assert finished == [False] * 4 + [True]
    resumed = files_of(parts)
    assert whole.keys() == resumed.keys()
    different = [name for name in whole if not torch.equal(whole[name], resumed[name])]
    assert different == []


def test_other_seeds_train_otherwise(tokenizer_recipe, tmp_path) -> None:
    recipe = tokenizer_recipe(steps=1)
    other = replace(recipe, seed=1, out=tmp_path / "other")
    assert make_loop(recipe).run()
    assert make_loop(other).run()
    a, b = files_of(recipe), files_of(other)
    assert not all(torch.equal(a[name], b[name]) for name in a)


def test_training_reduces_the_held_out_loss(tokenizer_recipe) -> None:
    recipe = tokenizer_recipe(steps=60, lr=3e-3, ema=0.9, batch=8, gate_init=0.1)
    loop = make_loop(recipe)
    before = loop.task.evaluate(loop.ema.module, 0)
    loop.run()
    after = loop.task.evaluate(loop.ema.module, 1)
    assert after["loss"] < 0.8 * before["loss"]
    assert after["psnr"] > before["psnr"]


def test_time_budget_ends_the_run(tokenizer_recipe) -> None:
    recipe = tokenizer_recipe(steps=None, minutes=0.005)
    loop = make_loop(recipe)
    assert loop.run()
    assert loop.done == 1.0
    assert loop.step >= 1
    again = make_loop(recipe)
    assert (again.step, again.samples) == (loop.step, loop.samples)
    assert again.run()  # nothing is left to do
    assert again.step == loop.step


def test_a_longer_budget_goes_on(tokenizer_recipe) -> None:
    recipe = tokenizer_recipe(steps=2)
    assert make_loop(recipe).run()
    longer = make_loop(replace(recipe, steps=3))
    assert longer.step == 2
    assert longer.run()
    assert longer.step == 3


def test_stable_state_is_kept_and_trained_on(tokenizer_recipe) -> None:
    recipe = tokenizer_recipe(steps=8, schedule="wsd", decay_fraction=0.5, save_minutes=1e-9)
    assert make_loop(recipe).run()
    folder = recipe.out / "states"
    stable = checkpoints.find_state(folder, "stable")
    assert stable is not None
    assert stable.name == "step-00000004"
    assert make_loop(replace(recipe, start="stable")).step == 4
    assert sorted(p.name for p in folder.glob("step-*")) == [
        "step-00000004", "step-00000007", "step-00000008",
    ]  # fmt: skip


def test_start_stable_without_one(tokenizer_recipe) -> None:
    with pytest.raises(ValueError, match="expected a state named 'stable'"):
        make_loop(tokenizer_recipe(start="stable"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_stops(tokenizer_recipe, number) -> None:
    recipe = tokenizer_recipe(steps=1000)
    loop = make_loop(recipe)
    inner = loop.task.after_step

    def after_step(step, indices, running):
        if step == 2:
            os.kill(os.getpid(), number)
        return inner(step, indices, running)

    loop.task.after_step = after_step
    before = signal.getsignal(number)
    assert not loop.run()
    assert signal.getsignal(number) is before
    assert make_loop(recipe).step == loop.step in (2, 3)


def test_nan_stops_and_names_the_last_good_state(tokenizer_recipe) -> None:
    recipe = tokenizer_recipe(steps=10, save_minutes=1e-9)
    loop = make_loop(recipe)
    inner = loop.task.loss

    def loss(indices, generator):
        good = inner(indices, generator)
        return good if loop.step < 3 else good._replace(total=good.total * float("nan"))

    loop.task.loss = loss
    with pytest.raises(TrainingError, match=r"step 4: the loss is nan .*states/step-00000003"):
        loop.run()
    assert make_loop(recipe).step == 3


def test_bad_weights_are_not_saved(tokenizer_recipe) -> None:
    loop = make_loop(tokenizer_recipe())
    with torch.no_grad():
        loop.parameters[0][:] = float("inf")
    with pytest.raises(TrainingError, match="is not finite; the last good state is none"):
        loop.save()
    assert not (loop.folder / "latest").exists()


def test_another_seed_or_model_does_not_resume(tokenizer_recipe) -> None:
    recipe = tokenizer_recipe(steps=1)
    make_loop(recipe).run()
    with pytest.raises(ValueError, match="seed: expected 0"):
        make_loop(replace(recipe, seed=1))
    with pytest.raises(ValueError, match="expected the weights of this model"):
        make_loop(replace(recipe, override=("dit.depth=2",)))
    with pytest.raises(ValueError, match="expected the states of 2 optimizers"):
        make_loop(replace(recipe, optimizer="muon"))


def test_a_damaged_state_is_refused(tokenizer_recipe) -> None:
    recipe = tokenizer_recipe(steps=1)
    make_loop(recipe).run()
    state = checkpoints.find_state(recipe.out / "states")
    (state / "ema.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"expected a readable .*ema\.safetensors"):
        make_loop(recipe)
    (recipe.out / "states" / "latest").write_text("../../elsewhere\n")
    with pytest.raises(ValueError, match=r"to name a saved state, got '\.\./\.\./elsewhere'"):
        make_loop(recipe)


def test_metrics_and_pictures(tokenizer_recipe) -> None:
    recipe = tokenizer_recipe(log_minutes=1e-9, revive_after=1)
    make_loop(recipe).run()
    lines = [json.loads(line) for line in (recipe.out / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train] == [1, 2, 3, 4]
    assert {"loss", "fm", "vq", "commit", "grad_norm", "rate", "images_per_s", "codes_used"} <= set(
        train[0]
    )
    assert train[0]["loss"] == pytest.approx(train[0]["fm"] + train[0]["vq"] + train[0]["commit"])
    held_out = lines[-1]
    assert held_out["kind"] == "held_out"
    assert {"loss", "psnr", "psnr_of_mean", "codes_used", "perplexity"} <= set(held_out)
    assert (recipe.out / "pictures" / "step-00000004.png").is_file()


def test_repa_needs_a_model_with_the_head(tokenizer_recipe, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"repa_weights: expected a model with dit\.repa_layer"):
        make_loop(tokenizer_recipe(repa_weights=tmp_path / "none"))


def test_lpips_needs_its_file(tokenizer_recipe, tmp_path) -> None:
    with pytest.raises(ValueError, match="lpips_weights: expected a weights file, got"):
        make_loop(tokenizer_recipe(lpips_weights=tmp_path / "vgg16.pth"))


def test_stop_restores_handlers_outside_the_main_thread() -> None:
    stop = Stop()
    before = signal.getsignal(signal.SIGTERM)
    with stop.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(100):
            if stop.reason:
                break
    assert stop.reason == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("name", "message"), [("abacus", "expected auto, cpu"), ("cuda:0", "without a GPU")]
)
def test_bad_devices(name, message, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        pick_device(name)
    assert pick_device("auto").type == "cpu"
