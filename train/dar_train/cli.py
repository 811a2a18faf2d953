"""`dar train …`: one typed subcommand a job; every flag is a field of a recipe.

python -m dar_train.cli tokenizer --data emoji-32.npz --out runs/tokenizer --minutes 80
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import tyro

from dar_train.recipes import PRIOR_RECIPES, TOKENIZER_RECIPES, ClassifierRecipe
from dar_train.reporting import shown_logs

R = TypeVar("R")


def _parse(recipes: Mapping[str, R], argv: Sequence[str], program: str) -> R:
    """The preset that `--preset` names, changed by the other flags."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="demo")
    preset = first.parse_known_args(argv)[0].preset
    if preset not in recipes:
        raise ValueError(f"preset: expected one of {sorted(recipes)}, got {preset!r}")
    default = recipes[preset]
    return tyro.cli(type(default), default=default, args=list(argv), prog=program)


def tokenizer(argv: Sequence[str]) -> None:
    """Train the tokenizer; presets v1, lite, demo."""
    recipe = _parse(TOKENIZER_RECIPES, argv, "dar train tokenizer")
    from dar_train.tokenizer_loop import train_tokenizer

    train_tokenizer(recipe)


def prior(argv: Sequence[str]) -> None:
    """Train the prior over a tokenizer's codes; presets L, XL, demo."""
    recipe = _parse(PRIOR_RECIPES, argv, "dar train prior")
    from dar_train.prior_loop import train_prior

    train_prior(recipe)


def classifier(argv: Sequence[str]) -> None:
    """Train the small classifier that judges samples."""
    recipe = tyro.cli(ClassifierRecipe, args=list(argv), prog="dar train classifier")
    from dar_train.classifier import train_classifier

    train_classifier(recipe)


def evaluate(argv: Sequence[str]) -> None:
    """Report a pipeline's figures on held-out pictures."""
    from dar_train.evaluate import EvaluateRecipe
    from dar_train.evaluate import evaluate as report

    report(tyro.cli(EvaluateRecipe, args=list(argv), prog="dar train evaluate"))


def export(argv: Sequence[str]) -> None:
    """Join a trained tokenizer and prior into one pipeline folder."""
    from dar_train.export import ExportRecipe, export_pipeline

    export_pipeline(tyro.cli(ExportRecipe, args=list(argv), prog="dar train export"))


def demo(argv: Sequence[str]) -> None:
    """Train, export and report the embedded model, in calls that resume one another."""
    from dar_train.demo import DemoRecipe, train_demo

    train_demo(tyro.cli(DemoRecipe, args=list(argv), prog="dar train demo"))


def emoji(argv: Sequence[str]) -> None:
    """Build the emoji data set."""
    from dar_train.emoji import main as build

    tyro.cli(build, args=list(argv), prog="dar train emoji")


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    command.__name__: command
    for command in (demo, emoji, tokenizer, prior, export, classifier, evaluate)
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
        raise ValueError(f"dar train: expected one of {sorted(COMMANDS)}, got {argv[0]!r}")
    with shown_logs():
        COMMANDS[argv[0]](argv[1:])


def main(argv: Sequence[str] | None = None) -> int:
    """Run and return the exit status: 0 done, 1 failed, 2 bad usage."""
    try:
        run(sys.argv[1:] if argv is None else argv)
    except (ValueError, TypeError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except (RuntimeError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
