"""What a training run is: frozen recipes, the paper's and the embedded model's.

Source: arXiv 2505.23660, §4; the embedded model's were chosen on two CPU cores (DESIGN.md).
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dar_fast.config import PRIORS, TOKENIZERS, PriorConfig, TokenizerConfig
from dar_train.optim import Schedule

Precision = Literal["bf16", "fp32"]
Start = Literal["latest", "stable", "fresh"]


def _check(recipe: object, field: str, ok: bool, expected: str) -> None:
    if not ok:
        raise ValueError(f"{field}: expected {expected}, got {getattr(recipe, field)!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What every training run has.

    Raises:
        ValueError: where a value is out of its range, or neither steps nor minutes bound the run.
    """

    data: Path = Path("emoji-32.npz")  # a packed data set, or a folder with a sub-folder a label
    out: Path = Path("runs/run")  # folder for states, metrics, pictures and the final weights
    start: Start = "latest"  # resume the newest state, the one before the decay, or start afresh
    steps: int | None = None  # optimizer steps of the whole run, over all calls
    minutes: float | None = None  # training minutes of the whole run, over all calls
    call_minutes: float | None = None  # stop this call cleanly after so many minutes; resume later
    batch: int = 64  # pictures an optimizer step
    micro_batch: int | None = None  # pictures a backward pass; the whole batch by default
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: hidden matrices only, AdamW for the rest
    lr: float = 2e-4  # peak rate of AdamW
    muon_lr: float = 0.02  # peak rate of Muon
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW
    weight_decay: float = 0.0  # on tensors of two or more dimensions
    warmup: int = 500  # steps of linear warm-up
    schedule: Schedule = "constant"  # shape of the learning rate after the warm-up
    decay_fraction: float = 0.2  # last part of the run over which linear and wsd fall
    final_lr: float = 0.0  # rate at the end, as a fraction of the peak
    ema: float = 0.999  # decay of the weight average
    grad_clip: float = 1.0  # largest gradient norm
    precision: Precision = "bf16"  # of the forward and backward pass; the weights stay in fp32
    seed: int = 0  # of the weights, the order and every draw
    device: str = "auto"  # auto, cpu, cuda or cuda:<n>
    compile: bool = False  # torch.compile on the training pass
    threads: int | None = None  # CPU threads; the machine's own choice by default
    log_minutes: float = 1.0  # between log lines
    eval_minutes: float = 10.0  # between evaluations of the averaged model on held-out pictures
    save_minutes: float = 5.0  # between saved states
    log_steps: int | None = None  # steps between log lines, in place of log_minutes
    eval_steps: int | None = None  # steps between evaluations, in place of eval_minutes
    save_steps: int | None = None  # steps between saved states, in place of save_minutes
    eval_pictures: int = 128  # held-out pictures an evaluation
    init: Path | None = None  # component folder or official .pt whose weights to start from
    keep: int = 2  # saved states kept
    async_save: bool = False  # write states while training goes on
    nonfinite: Literal["stop", "skip"] = "stop"  # at a loss that is not finite; skip: leave it out
    workers: int = 4  # processes that read pictures, a rank; 0: none
    attention: str | None = None  # back end of attention by name (dar doctor); None: by rule
    recompute: Literal["none", "selective", "full"] = "none"  # activations recomputed, not kept
    parallel: Literal["ddp", "fsdp"] = "ddp"  # many ranks: whole models, or shards of one
    float8: bool = False  # large products in float8, by torchao

    def __post_init__(self) -> None:
        _check(self, "steps", self.steps is None or self.steps > 0, "a positive number")
        for field in ("minutes", "call_minutes"):
            value = getattr(self, field)
            _check(self, field, value is None or value > 0, "a positive number of minutes")
        if self.steps is None and self.minutes is None:
            raise ValueError("steps, minutes: expected at least one of them, got neither")
        for field in ("batch", "eval_pictures"):
            _check(self, field, getattr(self, field) > 0, "a positive number")
        micro = self.micro_batch
        _check(self, "micro_batch", micro is None or 0 < micro <= self.batch, "1 to the batch")
        for field in ("lr", "muon_lr", "grad_clip", "log_minutes", "eval_minutes", "save_minutes"):
            _check(self, field, getattr(self, field) > 0, "a positive number")
        _check(self, "betas", all(0 <= b < 1 for b in self.betas), "two numbers in [0, 1)")
        _check(self, "weight_decay", self.weight_decay >= 0, "a number >= 0")
        _check(self, "warmup", self.warmup >= 0, "a number >= 0")
        _check(self, "decay_fraction", 0 <= self.decay_fraction <= 1, "a number in [0, 1]")
        _check(self, "final_lr", 0 <= self.final_lr <= 1, "a number in [0, 1]")
        _check(self, "ema", 0 <= self.ema < 1, "a number in [0, 1)")
        _check(self, "seed", self.seed >= 0, "a number >= 0")
        _check(self, "threads", self.threads is None or self.threads > 0, "a positive number")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerRecipe(Recipe):
    """Training of the sequential diffusion tokenizer."""

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
    perceptual: Path | None = None  # a feature network of one's own, exported by torch.export
    perceptual_weight: float = 0.5  # of its loss
    draws_per_image: int = 1  # noise levels a picture and step; the encoder runs once for all
    codebook_from_data: bool = False  # fit the codebook to encoder outputs of the first pictures
    gate_init: float = 0.0  # start of the gates; 0.1 instead of the published 0 starts faster
    continuous_steps: int = 0  # first steps without quantising, before the codebook is fitted
    rollout: float = 0.0  # weight of the loss on the solver's own states; not as published
    revive_after: int | None = None  # steps without use after which a code restarts from the data

    def __post_init__(self) -> None:
        # a slotted dataclass is a new class, so the zero-argument super() does not find it
        Recipe.__post_init__(self)
        _check(self, "draws_per_image", self.draws_per_image > 0, "a positive number")
        continuous = self.continuous_steps
        _check(self, "continuous_steps", continuous >= 0, "a number of steps >= 0")
        revive = self.revive_after
        _check(self, "revive_after", revive is None or revive > 0, "a positive number of steps")
        _check(self, "micro_batch", not (self.rollout and self.micro_batch), "none with a rollout")
        for field in ("lpips_weight", "repa_weight", "rollout"):
            _check(self, field, getattr(self, field) >= 0, "a number >= 0")

    def config(self) -> TokenizerConfig:
        """The model's configuration, overrides applied."""
        values = _model_values(self.model, {k: v.to_dict() for k, v in TOKENIZERS.items()})
        return TokenizerConfig.from_dict(_overridden(values, self.override))


@dataclass(frozen=True, slots=True, kw_only=True)
class PriorRecipe(Recipe):
    """Training of the prior over a tokenizer's codes."""

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

    def __post_init__(self) -> None:
        Recipe.__post_init__(self)
        for field in ("dropout", "class_dropout"):
            _check(self, field, 0 <= getattr(self, field) < 1, "a number in [0, 1)")
        _check(self, "views", self.views >= 0, "a number >= 0")

    def config(self) -> PriorConfig:
        """The model's configuration, overrides applied."""
        values = _model_values(self.model, {k: v.to_dict() for k, v in PRIORS.items()})
        return PriorConfig.from_dict(_overridden(values, self.override))


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifierRecipe(Recipe):
    """Training of the small classifier that judges samples."""

    out: Path = Path("runs/classifier")  # folder for states, metrics and the final weights
    steps: int | None = 2000  # optimizer steps of the whole run, over all calls
    lr: float = 1e-3  # peak rate of AdamW
    weight_decay: float = 0.05  # on tensors of two or more dimensions
    warmup: int = 100  # steps of linear warm-up
    schedule: Schedule = "cosine"  # shape of the learning rate after the warm-up
    ema: float = 0.99  # decay of the weight average
    size: int = 32  # pixels a side of the pictures
    width: int = 32  # channels at full size, a multiple of 8

    def __post_init__(self) -> None:
        Recipe.__post_init__(self)
        _check(self, "size", self.size >= 8 and self.size % 8 == 0, "a positive multiple of 8")
        _check(self, "width", self.width > 0 and self.width % 8 == 0, "a positive multiple of 8")


def _model_values(model: str, presets: dict[str, dict[str, Any]]) -> dict[str, Any]:
    if model in presets:
        return presets[model]
    file = Path(model)
    if not file.is_file():
        raise ValueError(
            f"model: expected one of {sorted(presets)} or a config.json, got {model!r}"
        )
    try:
        values = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"model: expected JSON in {file}, got {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"model: expected a JSON object in {file}, got {type(values).__name__}")
    return values


def _overridden(values: dict[str, Any], overrides: tuple[str, ...]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(json.dumps(values))
    for text in overrides:
        path, separator, raw = text.partition("=")
        *parents, leaf = path.split(".")
        place: Any = result
        for parent in parents:
            place = place.get(parent) if isinstance(place, dict) else None
        if not separator or not isinstance(place, dict) or leaf not in place:
            raise ValueError(f"override: expected key=value with a key of the model, got {text!r}")
        try:
            place[leaf] = json.loads(raw)
        except json.JSONDecodeError as error:
            raise ValueError(f"override: expected a JSON value in {text!r}") from error
    return result


TOKENIZER_V1 = TokenizerRecipe(
    preset="v1", model="v1", steps=210_000, batch=1024, micro_batch=128, lr=2e-4, warmup=500,
    ema=0.999,
)  # fmt: skip
TOKENIZER_LITE = dataclasses.replace(TOKENIZER_V1, preset="lite", model="lite")
TOKENIZER_DEMO = TokenizerRecipe(
    preset="demo", model="demo", minutes=90.0, batch=5, optimizer="muon", lr=1e-3, warmup=100,
    schedule="wsd", decay_fraction=0.3, ema=0.998, augment=True, codebook_from_data=True,
    continuous_steps=300, revive_after=50, gate_init=0.1, rollout=2.0,
)  # fmt: skip

PRIOR_L = PriorRecipe(
    preset="L", model="L", steps=360_000, batch=1024, micro_batch=256, lr=4e-4, weight_decay=0.05,
    warmup=0, schedule="linear", decay_fraction=1 / 6, final_lr=1e-5 / 4e-4, flip=True, views=8,
)  # fmt: skip
PRIOR_XL = dataclasses.replace(PRIOR_L, preset="XL", model="XL", micro_batch=128)
PRIOR_DEMO = PriorRecipe(
    eval_pictures=512,
    preset="demo", model="demo", minutes=40.0, batch=64, optimizer="muon", lr=1e-3,
    weight_decay=0.05, warmup=50, schedule="wsd", decay_fraction=0.3, ema=0.998, flip=True,
)  # fmt: skip

TOKENIZER_RECIPES = {r.preset: r for r in (TOKENIZER_V1, TOKENIZER_LITE, TOKENIZER_DEMO)}
PRIOR_RECIPES = {r.preset: r for r in (PRIOR_L, PRIOR_XL, PRIOR_DEMO)}
