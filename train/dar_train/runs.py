"""What a run says of itself beside its numbers: recipe.toml, and a line a call in calls.jsonl.

`dar train card` reads both: what ran, on what, by which versions.
"""

import dataclasses
import json
import os
import platform
import shlex
import time
from pathlib import Path
from typing import Any

import torch

import dar_fast
from dar_fast.doctor import cpu_model
from dar_fast.files import atomic_write
from dar_train.checkpoints import find_intact, read_record
from dar_train.distributed import Ranks
from dar_train.recipes import (
    CLASSIFIER_RECIPES,
    PRIOR_RECIPES,
    TOKENIZER_RECIPES,
    PriorRecipe,
    Recipe,
    TokenizerRecipe,
    read_recipe,
    recipe_toml,
    validate,
)
from dar_train.reporting import logger

RECIPE, CALLS = "recipe.toml", "calls.jsonl"
KINDS = ("tokenizer", "prior", "classifier")  # and the folder that such a run exports


def begin(recipe: Recipe, ranks: Ranks) -> None:
    """Check a recipe before anything is loaded, and note in `out` what runs.

    Raises:
        ProblemsError: a line for each thing wrong with the recipe on this machine.
        OSError: where `out` cannot be written.
    """
    validate(recipe, ranks.world)
    if not ranks.first:
        return
    recipe.out.mkdir(parents=True, exist_ok=True)
    with atomic_write(recipe.out / RECIPE) as temporary:
        temporary.write_text(recipe_toml(recipe), "utf-8")
    call = {
        "began": round(time.time()),
        "command": command_of(recipe),
        "ranks": ranks.world,
        **machine(ranks.device),
    }
    with (recipe.out / CALLS).open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(call) + "\n")


def machine(device: torch.device) -> dict[str, Any]:
    """The device in words, its CPU threads, and the versions that run."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = cpu_model()
    return {
        "type": device.type,
        "device": name,
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "versions": {
            "dar_fast": dar_fast.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def preset_of(recipe: Recipe) -> tuple[str, Recipe]:
    """The kind of a recipe and the preset that it changes."""
    if isinstance(recipe, TokenizerRecipe):
        return "tokenizer", TOKENIZER_RECIPES.get(recipe.preset, TokenizerRecipe(steps=1))
    if isinstance(recipe, PriorRecipe):
        return "prior", PRIOR_RECIPES.get(recipe.preset, PriorRecipe(steps=1))
    return "classifier", CLASSIFIER_RECIPES["demo"]


def command_of(recipe: Recipe) -> str:
    """A command line for this recipe; absolute paths by their last part only."""
    kind, preset = preset_of(recipe)
    words = ["dar", "train", kind]
    if isinstance(recipe, TokenizerRecipe | PriorRecipe):
        words += ["--preset", recipe.preset]
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if isinstance(value, Path) and value.is_absolute():
            value = Path(value.name)
        if field.name in ("preset", "call_minutes") or value == getattr(preset, field.name):
            continue
        flag = f"--{field.name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            values = value if isinstance(value, tuple) else (value,)
            words += [flag, *map(str, values)]
    return shlex.join(words)


def describe_run(folder: Path) -> dict[str, Any]:
    """What a run's folder says: steps, training minutes, samples, calls and its last recipe.

    What an interrupted or an older run did not write is left out.
    """
    kinds = [kind for kind in KINDS if (folder / kind / "config.json").is_file()]
    found: dict[str, Any] = {"name": folder.name, "kind": kinds[0] if kinds else folder.name}
    for record in _json_lines(folder / "metrics.jsonl"):
        found |= {key: record[key] for key in ("step", "minutes") if key in record}
    try:
        state = find_intact(folder / "states")
        record = {} if state is None else read_record(state)
    except ValueError as error:  # states of an older form, for one
        logger.warning("%s", error)
        record = {}
    if {"step", "seconds"} <= record.keys():
        found |= {"step": record["step"], "minutes": record["seconds"] / 60}
    calls = _json_lines(folder / CALLS)
    if calls:
        found["calls"] = calls
    if (folder / RECIPE).is_file():
        found["recipe"] = read_recipe(folder / RECIPE)
    return found


def _json_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; none where it is missing, and a torn last line is left.

    Raises:
        ValueError: where another line is no JSON.
    """
    if not file.is_file():
        return []
    lines = file.read_text("utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{file}: expected JSON in line {number}, got {error}") from error
        if isinstance(record, dict):
            records.append(record)
    return records
