"""A recipe's fields as flags: in groups, with the recipe so far as defaults."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from dar_fast.cli.parse import read_flags
from dar_train.recipes import Recipe, read_recipe, resolve
from dar_train.recipes.checks import hints
from dar_train.recipes.files import field_help, grouped
from dar_train.recipes.models import merged_overrides

RecipeT = TypeVar("RecipeT", bound=Recipe)
_ANNOTATED: Any = Annotated  # for types that are made here
_GROUP: Any = tyro.conf.OmitArgPrefixes
FILE_HELP = "recipe file; its values win over the preset's, flags over both"


def recipe_of_flags(recipes: Mapping[str, RecipeT], argv: Sequence[str], program: str) -> RecipeT:
    """The recipe that `--preset`, `--recipe FILE` and the other flags stand for, in this order.

    Raises:
        ValueError: where a flag is unknown, or the recipe is wrong: a line for each problem.
        SystemExit: with status 0, where help was asked for.
    """
    first = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, exit_on_error=False, argument_default=None
    )
    first.add_argument("--preset", nargs="?")
    first.add_argument("--recipe", nargs="?")
    named = first.parse_known_args(list(argv))[0]  # tyro finds what is wrong with them
    values = read_recipe(Path(named.recipe)) if named.recipe else {}
    base = resolve(recipes, values, named.preset)
    flags = read_flags(_flags(base), argv, program)
    given = _flat(flags)
    given.pop("recipe")
    if "override" in given:
        given["override"] = merged_overrides(getattr(base, "override", ()), given["override"])
    return dataclasses.replace(base, **given)


def _flags(base: Recipe) -> type:
    """A dataclass of dataclasses, one a group of fields, whose defaults are those of `base`."""
    kind = type(base)
    types, comments = hints(kind), field_help(kind)
    groups = []
    for title, names in grouped(kind).items():
        fields: list[Any] = []
        for name in names:
            hint: Any = _ANNOTATED[types[name], tyro.conf.arg(help=comments.get(name, ""))]
            default = () if name == "override" else getattr(base, name)
            fields.append((name, hint, dataclasses.field(default=default)))
        if title == "run":
            hint = _ANNOTATED[Path | None, tyro.conf.arg(help=FILE_HELP)]
            fields.insert(0, ("recipe", hint, dataclasses.field(default=None)))
        group = dataclasses.make_dataclass(title, fields, frozen=True, kw_only=True)
        group.__doc__ = ""
        groups.append((title, _GROUP[group], dataclasses.field(default=group())))
    flags = dataclasses.make_dataclass("Flags", groups, frozen=True, kw_only=True)
    flags.__doc__ = ""
    return flags


def _flat(flags: Any) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for group in dataclasses.fields(flags):
        values = getattr(flags, group.name)
        given |= {field.name: getattr(values, field.name) for field in dataclasses.fields(values)}
    return given
