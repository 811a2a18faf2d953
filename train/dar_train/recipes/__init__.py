"""What a training run is: frozen recipes, the paper's and the embedded model's."""

from dar_train.recipes.base import Precision, Recipe, Start
from dar_train.recipes.classifier import ClassifierRecipe
from dar_train.recipes.files import read_recipe, recipe_toml, resolve
from dar_train.recipes.presets import (
    CLASSIFIER_RECIPES,
    PRIOR_1B,
    PRIOR_3B,
    PRIOR_7B,
    PRIOR_B,
    PRIOR_DEMO,
    PRIOR_L,
    PRIOR_RECIPES,
    PRIOR_XL,
    PRIOR_XXL,
    PRIOR_XXXL,
    TOKENIZER_DEMO,
    TOKENIZER_LITE,
    TOKENIZER_RECIPES,
    TOKENIZER_V1,
    TOKENIZER_V1_4096,
)
from dar_train.recipes.prior import PriorRecipe
from dar_train.recipes.tokenizer import TokenizerRecipe
from dar_train.recipes.validation import validate

__all__ = [
    "CLASSIFIER_RECIPES",
    "PRIOR_1B",
    "PRIOR_3B",
    "PRIOR_7B",
    "PRIOR_B",
    "PRIOR_DEMO",
    "PRIOR_L",
    "PRIOR_RECIPES",
    "PRIOR_XL",
    "PRIOR_XXL",
    "PRIOR_XXXL",
    "TOKENIZER_DEMO",
    "TOKENIZER_LITE",
    "TOKENIZER_RECIPES",
    "TOKENIZER_V1",
    "TOKENIZER_V1_4096",
    "ClassifierRecipe",
    "Precision",
    "PriorRecipe",
    "Recipe",
    "Start",
    "TokenizerRecipe",
    "read_recipe",
    "recipe_toml",
    "resolve",
    "validate",
]
