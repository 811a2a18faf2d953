"""A model's card, README.md, from the report on it: `dar train card --report … --out …`.

Copies the pictures that the card shows and report.json, so that the next card can compare.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dar_fast.files import atomic_write
from dar_train import card_text
from dar_train.reporting import logger

CURVES = ("tokenizer", "prior")  # runs whose curves the card shows


@dataclass(frozen=True, slots=True, kw_only=True)
class CardRecipe:
    """From which report to which folder."""

    report: Path = Path("runs/demo/report")  # folder that `dar train evaluate` wrote
    out: Path = Path("runs/demo/pipeline")  # folder of the model
    before: Path | None = None  # an older report.json, to show its figures beside
    title: str = "The embedded model"  # first line of the card
    notes: Path | None = None  # Markdown to put under Training: what the runs do not say themselves


def _read(field: str, file: Path) -> dict[str, Any]:
    try:
        report = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{field}: expected a report in {file}, got {error}") from error
    parts = ("pictures", "tokenizer", "prior", "settings")
    if not isinstance(report, dict) or not all(isinstance(report.get(p), dict) for p in parts):
        raise ValueError(f"{field}: expected {', '.join(parts)} in {file}, got another document")
    return report


def write_card(recipe: CardRecipe) -> Path:
    """Write README.md, report.json and the pictures to `recipe.out`; returns the card.

    Raises:
        ValueError: where a report is missing, damaged or lacks what a card says.
        OSError: where the folder cannot be written.
    """
    report = _read("report", recipe.report / "report.json")
    if "models" not in report:
        raise ValueError(f"report: expected models in {recipe.report}, got an older report")
    before = None if recipe.before is None else _read("before", recipe.before)
    try:
        notes = "" if recipe.notes is None else recipe.notes.read_text("utf-8")
    except OSError as error:
        raise ValueError(f"notes: expected a readable file, got {error}") from error
    recipe.out.mkdir(parents=True, exist_ok=True)
    pictures = {"samples.png": "samples.png", "reconstructions.png": "reconstructions.png"}
    for run in report.get("runs", ()):
        if run.get("kind") in CURVES:
            pictures[f"curves-{run['kind']}.png"] = f"curves-{run['name']}.png"
    shown = {name for name, source in pictures.items() if (recipe.report / source).is_file()}
    for name in shown:
        _copy(recipe.report / pictures[name], recipe.out / name)
    try:
        text = _card(recipe.title, report, before, notes, shown)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"report: expected all that a card says, got no {error}") from error
    for file, content in (
        ("report.json", json.dumps(report, indent=1) + "\n"),
        ("README.md", text),
    ):
        with atomic_write(recipe.out / file) as temporary:
            temporary.write_text(content, "utf-8")
    logger.info("wrote %s", recipe.out / "README.md")
    return recipe.out / "README.md"


def _copy(source: Path, target: Path) -> None:
    if source.resolve() != target.resolve():
        with atomic_write(target) as temporary:
            shutil.copyfile(source, temporary)


def _card(
    title: str, report: dict[str, Any], before: dict[str, Any] | None, notes: str, shown: set[str]
) -> str:
    def picture(name: str, caption: str) -> str:
        return f"![{caption}]({name})" if name in shown else ""

    steps = report["models"]["num_steps"]
    curves = [picture(f"curves-{kind}.png", kind.capitalize()) for kind in CURVES]
    caption = f"A row a held-out picture: itself, the estimate after each of the {steps} steps, "
    parts = [
        f"# {title}",
        card_text.introduction(report),
        picture("samples.png", "Samples"),
        "## Data",
        card_text.data(report),
        "## Training",
        card_text.training(report),
        notes,
        "\n".join(filter(None, curves)),
        "## Held-out figures",
        card_text.figures(report, before),
        card_text.judged(report, before),
        picture("reconstructions.png", caption + "the reconstruction"),
        "`dar train card` writes this page from report.json.",
    ]
    return "\n\n".join(part.strip("\n") for part in parts if part.strip()) + "\n"
