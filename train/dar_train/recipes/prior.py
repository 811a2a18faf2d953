"""A training of the prior over a tokenizer's codes. Source: arXiv 2505.23660, §4."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from dar_fast.config import PRIORS, PriorConfig
from dar_train.recipes.base import Recipe
from dar_train.recipes.checks import BELOW_ONE, NOT_NEGATIVE, Rule
from dar_train.recipes.models import build_config


@dataclass(frozen=True, slots=True, kw_only=True)
class PriorRecipe(Recipe):
    """Training of the prior over a tokenizer's codes."""

    RULES: ClassVar[dict[str, Rule]] = Recipe.RULES | {
        "dropout": BELOW_ONE,
        "class_dropout": BELOW_ONE,
        "views": NOT_NEGATIVE,
    }

    out: Path = Path("runs/prior")  # folder for states, metrics and the final weights
    preset: str = "demo"  # the recipe whose values the other flags override
    model: str = "demo"  # a preset of dar_fast.config, or a config.json
    override: tuple[str, ...] = ()  # changes to the model, such as dit.depth=8
    tokenizer: Path = Path("runs/tokenizer/tokenizer")  # folder of the trained tokenizer
    tokens: Path | None = None  # folder that dar tokenize wrote; None: encode `data` in this run
    ten_crop: bool = False  # views are ten crops of pictures at 1.1 times the size, as published
    flip: bool = False  # also train on mirrored pictures
    views: int = 0  # further augmented encodings of every picture
    dropout: float = 0.1  # on embeddings, attention output and feed-forward output
    class_dropout: float = 0.1  # labels replaced by the null class

    def config(self) -> PriorConfig:
        """The model's configuration, overrides applied.

        Raises:
            ProblemsError: where it cannot be read or contradicts itself.
        """
        return build_config(PriorConfig, PRIORS, self.model, self.override)
