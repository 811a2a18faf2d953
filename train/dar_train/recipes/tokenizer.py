"""A training of the sequential diffusion tokenizer. Source: arXiv 2505.23660, §3 and §4."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from dar_fast.config import TOKENIZERS, TokenizerConfig
from dar_train.recipes.base import Recipe
from dar_train.recipes.checks import NOT_NEGATIVE, POSITIVE, Clash, Rule
from dar_train.recipes.models import build_config

_STEPS = Rule("a number of steps >= 0", NOT_NEGATIVE.holds)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerRecipe(Recipe):
    """Training of the sequential diffusion tokenizer."""

    RULES: ClassVar[dict[str, Rule]] = Recipe.RULES | {
        "draws_per_image": POSITIVE,
        "continuous_steps": _STEPS,
        "revive_after": Rule("a positive number of steps", POSITIVE.holds),
        "lpips_weight": NOT_NEGATIVE,
        "repa_weight": NOT_NEGATIVE,
        "perceptual_weight": NOT_NEGATIVE,
        "rollout": NOT_NEGATIVE,
        "gate_init": Rule("a finite number", math.isfinite),
    }

    CLASHES: ClassVar[tuple[Clash, ...]] = (
        *Recipe.CLASHES,
        Clash(
            ("micro_batch", "rollout"),
            lambda r: r.rollout and r.micro_batch,
            lambda r: f"micro_batch: expected none with a rollout, got {r.micro_batch}",
        ),
    )

    out: Path = Path("runs/tokenizer")  # folder for states, metrics, pictures and the final weights
    preset: str = "demo"  # the recipe whose values the other flags override
    model: str = "demo"  # a preset of dar_fast.config, or a config.json
    override: tuple[str, ...] = ()  # changes to the model, such as dit.depth=8
    crop: bool = False  # random square crops, else the centre
    flip: bool = False  # mirror every other picture, drawn
    augment: bool = False  # flips, small affine maps on white, colour changes
    lpips_weights: Path | None = None  # VGG-16 weights; adds the perceptual loss
    lpips_weight: float = 0.5  # of the perceptual loss
    repa_weights: Path | None = None  # DINOv2 ViT-B/14 weights; adds the alignment loss
    repa_weight: float = 0.5  # of the alignment loss
    perceptual: Path | None = None  # a feature network of one's own, by save_feature_network
    perceptual_weight: float = 0.5  # of its loss
    draws_per_image: int = 1  # noise levels a picture and step; the encoder runs once for all
    codebook_from_data: bool = False  # fit the codebook to encoder outputs of the first pictures
    gate_init: float = 0.0  # start of the gates; 0.1 instead of the published 0 starts faster
    continuous_steps: int = 0  # first steps without quantising, before the codebook is fitted
    rollout: float = 0.0  # weight of the loss on the solver's own states; not as published
    revive_after: int | None = None  # steps without use after which a code restarts from the data

    def config(self) -> TokenizerConfig:
        """The model's configuration, overrides applied.

        Raises:
            ProblemsError: where it cannot be read or contradicts itself.
        """
        return build_config(TokenizerConfig, TOKENIZERS, self.model, self.override)
