"""The loop on a line to fit: micro-batches, resumption, limits, broken gradients, signals."""

import json
import os
import signal
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from dar_train.distributed import Ranks
from dar_train.loop import Loop, TrainingError
from dar_train.parallel import parallelize
from dar_train.recipes import ClassifierRecipe
from dar_train.task import Loss

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


class Points(NamedTuple):
    x: Tensor
    y: Tensor


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, -0.5]))

    def loss(self, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        return (x @ self.weight + 0.1 * noise - y).square().mean()


class PointBatches:
    """Sample p of the order is a function of p."""

    def __init__(self, batch: int) -> None:
        self.batch, self.position, self.closed = batch, 0, False

    def next(self) -> Points:
        p = torch.arange(self.position, self.position + self.batch, dtype=torch.float32)
        self.position += self.batch
        x = torch.stack((torch.sin(p), torch.cos(p)), dim=1)
        return Points(x, x @ torch.tensor([2.0, 1.0]))

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state) -> None:
        self.position = state["position"]

    def skipped(self):
        return ()

    def close(self) -> None:
        self.closed = True


class Fit:
    title = "line"

    def __init__(self, recipe, poison=None, backwards=False) -> None:
        self.recipe, self.poison, self.backwards = recipe, poison, backwards
        self.batches = PointBatches(recipe.batch)
        self.parallel = parallelize(Line(), "loss", recipe, ALONE, [])
        self.model = self.parallel.model
        self.seen: list[list[float]] = []
        self.on_step = lambda step: None

    def arrange(self, batch, draws):
        return torch.arange(len(batch.x)).flip(0) if self.backwards else None

    def loss(self, batch, draws) -> Loss:
        self.seen.append(draws.uniform("u").tolist())
        loss = self.parallel.call(*batch, draws.normal("noise"))
        if self.poison is not None and draws.step == self.poison:
            loss = loss * float("nan")
        return Loss(loss, {"twice": 2 * loss})

    def after_step(self, batch, draws, run) -> dict[str, float]:
        self.on_step(run.steps_done)
        return {"noted": float(run.steps_done)}

    def notes(self) -> dict[str, float]:
        return {}

    def evaluate(self, averaged, step) -> dict[str, float]:
        return {"weight": float(averaged.weight[0])}

    def state_dict(self):
        passes = len(self.seen)
        return {"passes": passes, "passes_tensor": torch.tensor([passes])}

    def load_state_dict(self, state) -> None:
        self.seen = [[]] * state["passes"]
        assert int(state["passes_tensor"]) == state["passes"]


@pytest.fixture
def recipe(tmp_path):
    return ClassifierRecipe(
        out=tmp_path / "run", steps=8, batch=6, lr=0.1, warmup=2, ema=0.5, device="cpu",
        precision="fp32", log_steps=1, eval_steps=4, save_steps=3,
    )  # fmt: skip


def lines(recipe, kind="train"):
    records = map(json.loads, (recipe.out / "metrics.jsonl").read_text().splitlines())
    return [r for r in records if r["kind"] == kind]


def curve(recipe):
    return [(r["step"], r["loss"], r["grad_norm"]) for r in lines(recipe)]


def run(recipe, **options) -> Fit:
    task = Fit(recipe, **options)
    assert Loop(recipe, task, task.parallel).run()
    return task


def test_every_step_is_logged_and_the_line_is_fitted(recipe) -> None:
    task = run(replace(recipe, steps=60))
    assert [step for step, _, _ in curve(recipe)] == list(range(1, 61))
    first, last = lines(recipe)[0], lines(recipe)[-1]
    assert last["loss"] < 0.1 * first["loss"]
    assert last["twice"] == pytest.approx(2 * last["loss"])
    assert last["noted"] == 60
    assert first["images_per_s"] > 0
    assert [r["step"] for r in lines(recipe, "held_out")] == [*range(4, 61, 4), 60]
    assert task.batches.closed


@pytest.mark.parametrize("backwards", [False, True])
def test_micro_batches_are_the_batch(recipe, tmp_path, backwards) -> None:
    whole = run(recipe)
    parts = replace(recipe, out=tmp_path / "parts", micro_batch=4)
    pieces = run(parts, backwards=backwards)
    torch.testing.assert_close(pieces.model.weight, whole.model.weight, rtol=1e-5, atol=1e-6)
    first = [u for seen in pieces.seen[:2] for u in seen]
    assert [len(seen) for seen in pieces.seen[:2]] == [4, 2]
    assert (first[::-1] if backwards else first) == whole.seen[0]  # each sample keeps its numbers


@pytest.mark.parametrize("ends", [[1, 2, 5], [3], [7], [1, 2, 3, 4, 5, 6, 7]])
def test_a_resumed_run_is_the_uninterrupted_one(recipe, tmp_path, ends) -> None:
    whole = run(recipe)
    parts = replace(recipe, out=tmp_path / "parts")
    for end in [*ends, 8]:
        task = Fit(parts)

        def stop(step, end=end) -> None:
            if step == end:
                os.kill(os.getpid(), signal.SIGTERM)

        task.on_step = stop if end < 8 else task.on_step
        assert Loop(parts, task, task.parallel).run() == (end == 8)
    assert torch.equal(task.model.weight, whole.model.weight)
    assert curve(parts) == curve(recipe)


def test_lines_after_the_state_are_dropped(recipe) -> None:
    run(replace(recipe, steps=3))
    file = recipe.out / "metrics.jsonl"
    file.write_text(file.read_text() + '{"kind": "train", "step": 7, "loss": 1}\n{"kind": "tra')
    run(recipe)
    assert [step for step, _, _ in curve(recipe)] == list(range(1, 9))


def test_broken_gradients_stop_and_name_the_last_good_state(recipe) -> None:
    task = Fit(recipe, poison=4)
    with pytest.raises(TrainingError, match=r"step 5: the gradients.*step-00000003"):
        Loop(recipe, task, task.parallel).run()
    assert task.batches.closed
    assert run(recipe).model.weight.isfinite().all()  # goes on from step 3, without the poison


def test_broken_gradients_are_skipped_on_request(recipe) -> None:
    task = run(replace(recipe, nonfinite="skip"), poison=4)
    assert task.model.weight.isfinite().all()
    assert [step for step, _, _ in curve(recipe)] == list(range(1, 9))


def test_a_weight_that_is_not_finite_is_not_saved(recipe) -> None:
    task = Fit(recipe)

    def spoil(step: int) -> None:
        if step == 6:
            with torch.no_grad():
                task.model.weight[1] = float("inf")

    task.on_step = spoil
    with pytest.raises(TrainingError, match=r"not saved: weight is not finite.*step-00000003"):
        Loop(recipe, task, task.parallel).run()


def test_another_seed_does_not_resume(recipe) -> None:
    run(replace(recipe, steps=3))
    with pytest.raises(ValueError, match="seed: expected 0 as in"):
        other = Fit(replace(recipe, seed=1))
        Loop(replace(recipe, seed=1), other, other.parallel)


def test_the_state_before_the_decay_is_kept(recipe) -> None:
    decaying = replace(recipe, schedule="linear", decay_fraction=0.5, save_steps=1, keep=1)
    run(decaying)
    kept = sorted(p.name for p in (recipe.out / "states").iterdir() if p.is_dir())
    assert kept == ["step-00000004", "step-00000008"]
    again = Fit(replace(decaying, start="stable"))
    assert Loop(replace(decaying, start="stable"), again, again.parallel).steps_done == 4


def test_without_an_average_the_model_itself_is_evaluated(recipe) -> None:
    plain = replace(recipe, ema=0.0)
    task = run(plain)
    assert lines(plain, "held_out")[-1]["weight"] == float(task.model.weight[0].detach())
    again = Fit(replace(plain, steps=9))
    assert Loop(replace(plain, steps=9), again, again.parallel).steps_done == 8
