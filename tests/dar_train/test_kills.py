"""Thirty SIGKILLs, ten of them while a state is written: every run goes on as if nothing was."""

import dataclasses
import json
import random
import signal
import time
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import kill_runs
import pytest
import torch

from dar_train.checkpoints import find_intact, read_record, read_weights
from dar_train.recipes import TokenizerRecipe

pytestmark = pytest.mark.slow
RUNS, KILLS = 3, 10  # of each run; every third one while saving
STEPS, SAVE_STEPS = 75, 3
CLOCK = ("time", "images_per_s", "minutes")  # what a metrics line says of the machine
PATIENCE = 120  # seconds
WARM = ["dar_train.tokenizer_loop", "torch._dynamo", "torch.utils.tensorboard"]  # imported once


def start(*arguments: object) -> BaseProcess:
    context = get_context("forkserver")  # imports once, has one thread, forks
    context.set_forkserver_preload(WARM)
    child = context.Process(target=kill_runs.train, args=arguments)
    child.start()
    return child


def lines(recipe: TokenizerRecipe) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics, without what the clock says."""
    try:
        text = (recipe.out / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return []
    records = [json.loads(line) for line in text.splitlines(keepends=True) if line[-1:] == "\n"]
    return [{k: v for k, v in record.items() if k not in CLOCK} for record in records]


def wait_for_lines(child: BaseProcess, recipe: TokenizerRecipe, rng: random.Random) -> None:
    """Until a random moment, some steps after the run goes on, or while it starts."""
    wanted, end = rng.randint(0, 6), time.monotonic() + PATIENCE
    written = (recipe.out / "metrics.jsonl").stat if wanted else None
    first = last = None
    while written is not None and wanted and child.is_alive() and time.monotonic() < end:
        try:
            size = written().st_size
        except FileNotFoundError:
            size = 0
        first = size if first is None else first
        if last is not None and size > last:
            wanted -= 1
        last = size
        time.sleep(0.0005)
    time.sleep(rng.uniform(0, 0.02))


def wait_for_steps(child: BaseProcess, recipe: TokenizerRecipe) -> None:
    """Until a started run has made a step, and so listens to signals."""
    end, before = time.monotonic() + PATIENCE, len(lines(recipe))
    while len(lines(recipe)) <= before and child.is_alive() and time.monotonic() < end:
        time.sleep(0.002)


def same_weights(a: Path, b: Path) -> bool:
    for averaged in (False, True):
        mine, theirs = (read_weights(state, averaged=averaged) for state in (a, b))
        if mine.keys() != theirs.keys():
            return False
        if not all(torch.equal(mine[name], theirs[name]) for name in mine):
            return False
    return True


@pytest.fixture(scope="module")
def module_recipe(pictures, model_files, tmp_path_factory) -> TokenizerRecipe:
    return TokenizerRecipe(
        data=pictures, out=tmp_path_factory.mktemp("kills") / "whole",
        model=model_files["tokenizer"], steps=STEPS, batch=4, warmup=2, precision="fp32",
        device="cpu", eval_pictures=2, workers=0, log_steps=1, save_steps=SAVE_STEPS,
        eval_steps=STEPS, optimizer="muon", schedule="linear", augment=True, revive_after=4,
        continuous_steps=4, codebook_from_data=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(module_recipe) -> tuple[list[dict[str, Any]], int]:
    """The lines of an uninterrupted run, and how many moments a save of it has."""
    count_file = module_recipe.out.parent / "moments"
    child = start(module_recipe, 2, None, count_file)
    child.join(PATIENCE)
    assert child.exitcode == 0
    return lines(module_recipe), int(count_file.read_text())


@pytest.mark.parametrize("run", range(RUNS))
def test_killed_runs_are_the_uninterrupted_one(module_recipe, whole, run, caplog) -> None:
    expected, moments = whole
    assert len(expected) >= STEPS and moments > 300
    rng = random.Random(run)
    recipe = dataclasses.replace(
        module_recipe, out=module_recipe.out.parent / f"killed-{run}", async_save=run == 1
    )
    steps = []
    for kill in range(KILLS):
        saving = kill % 3 == 2 or (kill == 0 and run == 0)
        fatal = rng.randint(1, moments) if saving else None
        child = start(recipe, rng.randint(1, 2), fatal, None)
        if not saving:
            wait_for_lines(child, recipe, rng)
            child.kill()
        child.join(PATIENCE)
        assert child.exitcode == -signal.SIGKILL, "the run ended before it was killed"
        seen = lines(recipe)
        assert seen == expected[: len(seen)]
        state = find_intact(recipe.out / "states")
        steps.append(0 if state is None else read_record(state)["step"])
    assert steps == sorted(steps) and steps[-1] > 0
    assert "taken instead" not in caplog.text  # the pointer never named a damaged state
    child = start(recipe, 1, None, None)
    child.join(PATIENCE)
    assert child.exitcode == 0
    assert lines(recipe) == expected
    final = [find_intact(r.out / "states") for r in (recipe, module_recipe)]
    assert read_record(final[0])["step"] == STEPS
    assert same_weights(*final)


def test_a_terminated_run_saves_and_goes_on(module_recipe, whole) -> None:
    expected, _ = whole
    rng = random.Random(RUNS)
    recipe = dataclasses.replace(module_recipe, out=module_recipe.out.parent / "terminated")
    for _ in range(3):
        child = start(recipe, 1, None, None)
        wait_for_steps(child, recipe)
        wait_for_lines(child, recipe, rng)
        child.terminate()
        child.join(PATIENCE)
        assert child.exitcode == kill_runs.STOPPED
        seen = lines(recipe)
        assert seen == expected[: len(seen)]
        assert read_record(find_intact(recipe.out / "states"))["step"] == len(seen)
    child = start(recipe, 1, None, None)
    child.join(PATIENCE)
    assert child.exitcode == 0
    assert lines(recipe) == expected
