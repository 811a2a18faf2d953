"""Training of the prior: cross-entropy of all N codes given the class and the codes before each.

A step costs 6 FLOPs a weight and code. Source: arXiv 2505.23660, §3.3 and §4.
"""

import json

import torch
from torch import Tensor, nn

from dar_fast.config import PriorConfig
from dar_fast.files import atomic_write
from dar_fast.models.prior import Prior
from dar_fast.models.tokenizer import Tokenizer
from dar_train import figures
from dar_train.data import Order, Pictures, chunks, derived_seed, load_pictures
from dar_train.export import export_component
from dar_train.loop import Loop, Loss, pick_device
from dar_train.recipes import PriorRecipe
from dar_train.reporting import logger
from dar_train.tokens import Tokens, folder_hash, tokens_of, unigram

EVAL_CHUNK = 64
SAMPLE_ROWS, SAMPLE_COLUMNS = 4, 8
SAMPLE_GUIDANCE = 3.0


class PriorTask:
    """What the loop needs of the prior's training."""

    title = "prior"

    def __init__(
        self,
        recipe: PriorRecipe,
        model: Prior,
        tokenizer: Tokenizer,
        data: Pictures,
        tokens: Tokens,
        device: torch.device,
    ) -> None:
        self.recipe = recipe
        self.model = model
        self.tokenizer = tokenizer
        self.device = device
        views, self.pictures, N = tokens.codes.shape
        self.codes = tokens.codes.view(-1, N).to(torch.int32).to(device)  # [views·M, N]
        self.labels = data.labels.to(device)
        every_view = torch.arange(views)[:, None] * self.pictures + data.train  # [views, train]
        self.order = Order(every_view.flatten(), recipe.seed)
        self.autocast = torch.autocast(
            device.type, dtype=torch.bfloat16, enabled=recipe.precision == "bf16"
        )
        generator = torch.Generator().manual_seed(derived_seed(recipe.seed, 6))
        chosen = data.held_out[torch.randperm(len(data.held_out), generator=generator)]
        self.held_out = chosen[: recipe.eval_pictures].to(device)
        self.unigram = unigram(
            tokens.codes[0, data.train],
            tokens.codes[0, self.held_out.cpu()],
            model.config.vocab_size,
        )
        shown = torch.unique(data.labels[chosen], sorted=False)[: SAMPLE_ROWS * SAMPLE_COLUMNS]
        self.shown = shown.to(device)
        self._loss = torch.compile(model.loss) if recipe.compile else model.loss

    def loss(self, indices: Tensor, generator: torch.Generator) -> Loss:
        indices = indices.to(self.device)
        codes = self.codes[indices].long()
        labels = self.labels[indices % self.pictures]
        draw = torch.rand(len(labels), generator=generator, device=self.device)
        labels = labels.masked_fill(draw < self.recipe.class_dropout, self.model.config.null_class)
        with self.autocast:
            return Loss(self._loss(codes, labels), {})

    def after_step(self, step: int, indices: Tensor, loop: Loop) -> dict[str, float]:
        return {}

    def notes(self) -> dict[str, float]:
        return {}

    @torch.no_grad()
    def evaluate(self, averaged: nn.Module, step: int) -> dict[str, float]:
        if not isinstance(averaged, Prior):
            raise TypeError(f"evaluate: expected a Prior, got {type(averaged).__name__}")
        total = 0.0
        for part in chunks(self.held_out, EVAL_CHUNK):
            codes = self.codes[part].long()
            with self.autocast:
                loss = averaged.loss(codes, self.labels[part], reduction="sum")
            total += float(loss) / codes.shape[1]
        self._draw(averaged, step)
        return {"cross_entropy": total / len(self.held_out), **self.unigram}

    def _draw(self, model: Prior, step: int) -> None:
        """Guided samples of held-out pictures' labels."""
        seeds = list(range(len(self.shown)))
        with self.autocast:
            codes = model.generate(self.shown, guidance_scale=SAMPLE_GUIDANCE, seeds=seeds)
            images = self.tokenizer.decode(codes, seeds=seeds).float()
        columns = min(SAMPLE_COLUMNS, len(images))
        rows = len(images) // columns
        grid = images[: rows * columns].reshape(rows, columns, *images.shape[1:])
        figures.save_grid(grid, self.recipe.out / "pictures" / f"step-{step:08d}.png")

    def extra_state(self) -> dict[str, object]:
        return {}

    def load_extra_state(self, state: dict[str, object]) -> None:
        return None


def _check_fit(config: PriorConfig, tokenizer: Tokenizer, labels: int) -> None:
    made = tokenizer.config
    for field, expected in (
        ("vocab_size", made.codebook_size),
        ("num_tokens", made.num_tokens),
        ("num_classes", labels),
    ):
        got = getattr(config, field)
        if got != expected:
            raise ValueError(
                f"model: expected {field} {expected} for this tokenizer and data, got {got}; "
                f"set --override {field}={expected}"
            )


def train_prior(recipe: PriorRecipe) -> bool:
    """Train, resume or finish a prior; True when the whole run is over.

    Raises:
        ValueError: where the data, the tokenizer or the model do not fit the recipe.
        TrainingError: where the loss stops being finite.
    """
    from dar_fast.checkpoint import load_model

    config = recipe.config()
    device = pick_device(recipe.device)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    tokenizer_hash = folder_hash(recipe.tokenizer)
    tokenizer = load_model(recipe.tokenizer, device=device, dtype=torch.float32)
    if not isinstance(tokenizer, Tokenizer):
        raise ValueError(
            f"tokenizer: expected a tokenizer in {recipe.tokenizer}, got {type(tokenizer).__name__}"
        )
    tokenizer.eval().requires_grad_(False)
    data = load_pictures(recipe.data, tokenizer.config.image_size)
    _check_fit(config, tokenizer, len(data.label_names))
    tokens = tokens_of(
        tokenizer, tokenizer_hash, data, recipe.out / "tokens",
        flip=recipe.flip, views=recipe.views, seed=recipe.seed,
    )  # fmt: skip
    torch.manual_seed(derived_seed(recipe.seed, 4))
    model = Prior(config, dropout=recipe.dropout).to(device)
    task = PriorTask(recipe, model, tokenizer, data, tokens, device)
    loop = Loop(recipe, task, device)
    count = sum(parameter.numel() for parameter in loop.parameters)
    logger.info(
        "prior %s: %.1fM parameters, %d sequences of %d training pictures, %s",
        recipe.model, count / 1e6, len(task.order.indices), len(data.train), device,
    )  # fmt: skip
    with atomic_write(recipe.out / "labels.json") as temporary:
        temporary.write_text(json.dumps(data.label_names) + "\n")
    over = loop.run()
    export_component(loop.ema.module, recipe.out / "prior")
    return over
