"""A training of the small classifier that judges samples."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from dar_train.optim import Schedule
from dar_train.recipes.base import Recipe
from dar_train.recipes.checks import Rule

_BY_EIGHT = Rule("a positive multiple of 8", lambda x: x > 0 and x % 8 == 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifierRecipe(Recipe):
    """Training of the small classifier that judges samples."""

    RULES: ClassVar[dict[str, Rule]] = Recipe.RULES | {"size": _BY_EIGHT, "width": _BY_EIGHT}

    out: Path = Path("runs/classifier")  # folder for states, metrics and the final weights
    steps: int | None = 2000  # optimizer steps of the whole run, over all calls
    lr: float = 1e-3  # peak rate of AdamW
    weight_decay: float = 0.05  # on tensors of two or more dimensions
    warmup: int = 100  # steps of linear warm-up
    schedule: Schedule = "cosine"  # shape of the learning rate after the warm-up
    ema: float = 0.99  # decay of the weight average
    size: int = 32  # pixels a side of the pictures
    width: int = 32  # channels at full size, a multiple of 8
