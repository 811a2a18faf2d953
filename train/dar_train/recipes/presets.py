"""The published recipes, and the embedded model's.

Sources: arXiv 2505.23660, §4, and the released code; the embedded model's were chosen on two CPU
cores. Micro-batches are those that `memory.estimate` puts on an 80 GB GPU, in a run on eight of
them: no GPU has measured them. Models whose states alone would fill one are sharded over the ranks.
"""

import dataclasses
from pathlib import Path
from typing import Any

from dar_train.recipes.classifier import ClassifierRecipe
from dar_train.recipes.prior import PriorRecipe
from dar_train.recipes.tokenizer import TokenizerRecipe

_AT_SCALE: dict[str, Any] = {
    "data": Path("imagenet"), "batch": 1024, "compile": True, "workers": 8,
    "eval_pictures": 1024, "log_minutes": 0.5, "eval_minutes": 60.0, "save_minutes": 15.0,
}  # fmt: skip

TOKENIZER_V1 = TokenizerRecipe(
    preset="v1", model="v1", steps=210_000, micro_batch=32, lr=2e-4, warmup=500, ema=0.999,
    crop=True, flip=True, lpips_weights=Path("weights/vgg16-397923af.pth"),
    repa_weights=Path("weights/dinov2_vitb14_pretrain.pth"), **_AT_SCALE,
)  # fmt: skip
TOKENIZER_LITE = dataclasses.replace(TOKENIZER_V1, preset="lite", model="lite", micro_batch=64)
# Table 1's 4096 codes. The paper says which figures they reach, not how they were trained: here a
# released tokenizer gets a codebook fitted to its own encoder, and a fifth of the training anew.
TOKENIZER_V1_4096 = dataclasses.replace(
    TOKENIZER_V1, preset="v1-4096", override=("codebook_size=4096",), steps=42_000, lr=1e-4,
    init=Path("weights/tokenizer.pt"), codebook_from_data=True, schedule="linear",
    decay_fraction=0.2, final_lr=0.05,
)  # fmt: skip
TOKENIZER_DEMO = TokenizerRecipe(
    preset="demo", model="demo", minutes=90.0, batch=5, optimizer="muon", lr=1e-3, warmup=100,
    schedule="wsd", decay_fraction=0.3, ema=0.998, augment=True, codebook_from_data=True,
    continuous_steps=300, revive_after=50, gate_init=0.1, rollout=2.0,
)  # fmt: skip


def _prior(preset: str, micro_batch: int, **changes: Any) -> PriorRecipe:
    """The published training: 300 epochs of ImageNet, the rate falling over the last 50."""
    values = {
        "preset": preset, "model": preset, "steps": 360_000, "micro_batch": micro_batch,
        "lr": 4e-4, "betas": (0.9, 0.95), "weight_decay": 0.05, "grad_clip": 1.0, "warmup": 0,
        "schedule": "linear", "decay_fraction": 1 / 6, "final_lr": 1e-5 / 4e-4, "dropout": 0.1,
        "class_dropout": 0.1, "ten_crop": True, "ema": 0.0, **_AT_SCALE,
    }  # fmt: skip
    return PriorRecipe(**(values | changes))


PRIOR_B = _prior("B", 256)
PRIOR_L = _prior("L", 64)
PRIOR_XL = _prior("XL", 32)
PRIOR_XXL = _prior("XXL", 16)
PRIOR_XXXL = _prior("XXXL", 16, parallel="fsdp")
PRIOR_1B = _prior("1B", 32)
PRIOR_3B = _prior("3B", 32, parallel="fsdp")
PRIOR_7B = _prior("7B", 16, parallel="fsdp")
PRIOR_DEMO = PriorRecipe(
    preset="demo", model="demo", minutes=40.0, batch=64, optimizer="muon", lr=1e-3,
    weight_decay=0.05, warmup=50, schedule="wsd", decay_fraction=0.3, ema=0.998, flip=True,
    eval_pictures=512,
)  # fmt: skip

TOKENIZER_RECIPES = {
    r.preset: r for r in (TOKENIZER_V1, TOKENIZER_LITE, TOKENIZER_V1_4096, TOKENIZER_DEMO)
}
PRIOR_RECIPES = {
    r.preset: r
    for r in (
        PRIOR_B, PRIOR_L, PRIOR_XL, PRIOR_XXL, PRIOR_XXXL, PRIOR_1B, PRIOR_3B, PRIOR_7B, PRIOR_DEMO
    )
}  # fmt: skip
CLASSIFIER_RECIPES = {"demo": ClassifierRecipe()}
