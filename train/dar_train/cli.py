"""`dar train …`: one typed subcommand a job; every flag is a field of a recipe.

dar train tokenizer --data emoji-32.npz --out runs/tokenizer --minutes 80
dar train show prior --preset XL > xl.toml
torchrun --nproc-per-node 8 -m dar_train.cli prior --recipe xl.toml
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

from dar_fast.cli.errors import status_of
from dar_fast.cli.parse import read_flags
from dar_train.flags import recipe_of_flags
from dar_train.recipes import (
    CLASSIFIER_RECIPES,
    PRIOR_RECIPES,
    TOKENIZER_RECIPES,
    PriorRecipe,
    TokenizerRecipe,
    recipe_toml,
)
from dar_train.recipes.base import Recipe
from dar_train.recipes.checks import did_you_mean, of_known
from dar_train.reporting import shown_logs

KINDS: Mapping[str, Mapping[str, Recipe]] = {
    "tokenizer": TOKENIZER_RECIPES,
    "prior": PRIOR_RECIPES,
    "classifier": CLASSIFIER_RECIPES,
}


def tokenizer(argv: Sequence[str]) -> None:
    """Train the tokenizer; presets v1, lite, v1-4096, demo."""
    recipe = recipe_of_flags(TOKENIZER_RECIPES, argv, "dar train tokenizer")
    from dar_train.tokenizer_loop import train_tokenizer

    train_tokenizer(recipe)


def prior(argv: Sequence[str]) -> None:
    """Train the prior over a tokenizer's codes; presets B to XXXL, 1B, 3B, 7B, demo."""
    recipe = recipe_of_flags(PRIOR_RECIPES, argv, "dar train prior")
    from dar_train.prior_loop import train_prior

    train_prior(recipe)


def classifier(argv: Sequence[str]) -> None:
    """Train the small classifier that judges samples."""
    recipe = recipe_of_flags(CLASSIFIER_RECIPES, argv, "dar train classifier")
    from dar_train.classifier import train_classifier

    train_classifier(recipe)


def show(argv: Sequence[str]) -> None:
    """Print a recipe as TOML for --recipe: dar train show prior --preset XL."""
    if not argv or argv[0].startswith("-"):
        names = "|".join(KINDS)
        if argv and argv[0] in ("-h", "--help"):
            text = f"usage: dar train show {names} [--preset NAME] [--recipe FILE] [flags]\n"
            sys.stdout.write(text)
            return
        raise ValueError(f"show: expected {names}, got {argv[0] if argv else 'none'}")
    if argv[0] not in KINDS:
        raise ValueError(of_known("show", argv[0], KINDS))
    recipe = recipe_of_flags(KINDS[argv[0]], argv[1:], f"dar train show {argv[0]}")
    if isinstance(recipe, TokenizerRecipe | PriorRecipe):
        recipe.config()  # says what is wrong with the model
    sys.stdout.write(recipe_toml(recipe))


def evaluate(argv: Sequence[str]) -> None:
    """Report a pipeline's figures on held-out pictures."""
    from dar_train.evaluate import EvaluateRecipe
    from dar_train.evaluate import evaluate as report

    report(read_flags(EvaluateRecipe, argv, "dar train evaluate"))


def export(argv: Sequence[str]) -> None:
    """Join a trained tokenizer and prior into one pipeline folder."""
    from dar_train.export import ExportRecipe, export_pipeline

    export_pipeline(read_flags(ExportRecipe, argv, "dar train export"))


def card(argv: Sequence[str]) -> None:
    """Write the embedded model's card from a report."""
    from dar_train.card import CardRecipe, write_card

    write_card(read_flags(CardRecipe, argv, "dar train card"))


def demo(argv: Sequence[str]) -> None:
    """Train, export, report and describe the embedded model, in calls that resume one another."""
    from dar_train.demo import DemoRecipe, train_demo

    train_demo(read_flags(DemoRecipe, argv, "dar train demo"))


def emoji(argv: Sequence[str]) -> None:
    """Build the emoji data set."""
    from dar_train.emoji import build_command

    build_command(argv, "dar train emoji")


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    command.__name__: command
    for command in (demo, emoji, tokenizer, prior, classifier, export, evaluate, card, show)
}


def run(argv: Sequence[str]) -> None:
    """Run one subcommand; errors come out as they are.

    Raises:
        ValueError: for an unknown subcommand or a bad flag value.
    """
    if not argv or argv[0] in ("-h", "--help"):
        lines = (f"  {name:<12}{command.__doc__}" for name, command in COMMANDS.items())
        sys.stdout.write("usage: dar train COMMAND [flags]\n\n" + "\n".join(lines) + "\n")
        return
    if argv[0] not in COMMANDS:
        known = ", ".join(sorted(COMMANDS))
        raise ValueError(
            f"dar train: expected one of {known}, got {argv[0]!r}{did_you_mean(argv[0], COMMANDS)}"
        )
    first = os.environ.get("RANK", "0") == "0"  # of several ranks, one speaks; all warn
    with shown_logs() if first else nullcontext():
        COMMANDS[argv[0]](argv[1:])


def main(argv: Sequence[str] | None = None) -> int:
    """Run and return the exit status: 0 done, 1 failed, 2 bad usage, 130 interrupted."""
    return status_of(run, argv, "dar train")


if __name__ == "__main__":
    sys.exit(main())
