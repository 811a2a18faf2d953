"""Recipes as TOML files: `dar train show` prints one, `--recipe` reads one, each run leaves one.

A key is a field; "none" stands for a field that is not set; the table [model] holds changes to the
model's configuration, and `name` in it the model. Flags win over the file, the file over the
preset; changes to the model add up.
"""

import dataclasses
import inspect
import io
import json
import tokenize
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from dar_fast.problems import ProblemsError
from dar_train.recipes.base import Recipe
from dar_train.recipes.checks import NONE, did_you_mean, from_file, hints, of_known
from dar_train.recipes.models import merged_overrides

RecipeT = TypeVar("RecipeT", bound=Recipe)

GROUPS = {  # of flags in the help, and of keys in a file
    "run": (
        "preset", "out", "start", "init", "steps", "minutes", "call_minutes", "seed", "nonfinite"
    ),
    "model": ("model", "override", "gate_init", "dropout", "class_dropout", "size", "width"),
    "data": (
        "data", "tokenizer", "tokens", "crop", "flip", "augment", "ten_crop", "views", "workers"
    ),
    "losses": (
        "lpips_weights", "lpips_weight", "repa_weights", "repa_weight", "perceptual",
        "perceptual_weight", "draws_per_image", "rollout",
    ),
    "codebook": ("codebook_from_data", "continuous_steps", "revive_after"),
    "optimizer": (
        "optimizer", "batch", "micro_batch", "lr", "muon_lr", "betas", "weight_decay", "grad_clip",
        "ema",
    ),
    "schedule": ("schedule", "warmup", "decay_fraction", "final_lr"),
    "scale": (
        "device", "threads", "precision", "compile", "attention", "recompute", "parallel", "float8"
    ),
    "reports": (
        "log_minutes", "log_steps", "eval_minutes", "eval_steps", "eval_pictures", "save_minutes",
        "save_steps", "keep", "async_save",
    ),
}  # fmt: skip


def grouped(cls: type[Recipe]) -> dict[str, list[str]]:
    """The fields of a recipe by group; what no group names comes last."""
    names = [field.name for field in dataclasses.fields(cls)]
    found = {title: [n for n in group if n in names] for title, group in GROUPS.items()}
    named = {name for group in found.values() for name in group}
    found["other"] = [name for name in names if name not in named]
    return {title: group for title, group in found.items() if group}


def field_help(cls: type) -> dict[str, str]:
    """What the comments behind the fields of a dataclass say, its bases' included."""
    found: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(owner):
            continue
        try:
            source = inspect.getsource(owner)
        except OSError:  # installed without sources
            continue
        found |= dict(_comments(source))
    return found


def _comments(source: str) -> Iterator[tuple[str, str]]:
    """Names that begin a logical line, each with the comment that ends it."""
    name, fresh = "", True
    for token in tokenize.generate_tokens(io.StringIO(inspect.cleandoc(source)).readline):
        if token.type == tokenize.COMMENT and name:
            yield name, token.string.lstrip("# ")
        elif token.type == tokenize.NAME and fresh:
            name = token.string
        if token.type in (tokenize.NEWLINE, tokenize.NL):
            name, fresh = "", True
        elif token.type not in (tokenize.INDENT, tokenize.DEDENT):
            fresh = False


def _toml(value: object) -> str:
    if value is None:
        return json.dumps(NONE)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007F")


def recipe_toml(recipe: Recipe) -> str:
    """All fields, a line each with what it is for; `resolve` makes the same recipe of it."""
    comments = field_help(type(recipe))
    parts = []
    for title, names in grouped(type(recipe)).items():
        lines = [f"# {title}"]
        for name in names:
            line = f"{name} = {_toml(getattr(recipe, name))}"
            lines.append(f"{line:<40}  # {comments[name]}" if name in comments else line)
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def read_recipe(file: Path) -> dict[str, Any]:
    """The keys and values of a recipe file.

    Raises:
        ValueError: where it is missing or no TOML.
    """
    try:
        return tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"recipe: expected a readable file, got {file} ({error})") from error
    except ValueError as error:
        raise ValueError(f"recipe: expected TOML in {file}, got: {error}") from error


def resolve(
    recipes: Mapping[str, RecipeT],
    values: Mapping[str, Any] | None = None,
    preset: str | None = None,
) -> RecipeT:
    """The recipe of a preset and of a file's `values`, which win over it.

    Args:
        recipes: by preset.
        values: keys and plain values as in a recipe file.
        preset: wins over the one that `values` names; without either, demo.

    Raises:
        ProblemsError: a line for each unknown key, value of another type or out of its range, and
            contradiction.
    """
    values = dict(values or {})
    named = preset or values.pop("preset", "demo")
    values.pop("preset", None)
    if not isinstance(named, str):
        raise ProblemsError([f"preset: expected text, got {named!r}"])
    if named not in recipes:
        raise ProblemsError([of_known("preset", named, recipes)])
    base = recipes[named]
    types = hints(type(base))
    problems = _model_table(values) if "override" in types else []
    problems += [
        f"{key if key.isidentifier() else 'recipe'}: expected a field of the recipe, "
        f"got {key!r}{did_you_mean(key, types)}"
        for key in values
        if key not in types
    ]
    changes = {k: from_file(v, types[k]) for k, v in values.items() if k in types}
    if isinstance(changes.get("override"), tuple):
        changes["override"] = _merged(base, changes["override"], problems)
    try:
        recipe = dataclasses.replace(base, **changes)
    except ProblemsError as error:
        raise ProblemsError([*problems, *error.problems]) from None
    if problems:
        raise ProblemsError(problems)
    return recipe


def _merged(base: Recipe, changes: tuple[Any, ...], problems: list[str]) -> tuple[str, ...]:
    before: tuple[str, ...] = getattr(base, "override", ())
    texts = [change for change in changes if isinstance(change, str)]
    if len(texts) < len(changes):
        problems.append(f"override: expected a list of texts, got {list(changes)!r}")
    return merged_overrides(before, texts)


def _model_table(values: dict[str, Any]) -> list[str]:
    """Replace a table [model] in `values` by the fields `model` and `override`."""
    table = values.get("model")
    if not isinstance(table, Mapping):
        return []
    del values["model"]
    changes = dict(table)
    if "name" in changes:
        values["model"] = changes.pop("name")
    texts, problems = [], []
    for key, value in _flat(changes):
        try:
            texts.append(f"{key}={json.dumps(value)}")
        except (TypeError, ValueError):
            problems.append(f"model.{key}: expected a plain value, got {value!r}")
    before = values.get("override", [])
    if isinstance(before, list):
        values["override"] = [*before, *texts]
    return problems


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
