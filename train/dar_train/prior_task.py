"""The prior's loss: cross-entropy of all N codes given the class and the codes before each.

A step costs 6 FLOPs a weight and code. Source: arXiv 2505.23660, §3.3 and §4.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from dar_fast.models.prior import Prior
from dar_fast.models.tokenizer import Tokenizer
from dar_train import figures
from dar_train.data import chunks, derived_seed
from dar_train.draws import Draws
from dar_train.parallel import Parallel
from dar_train.recipes import PriorRecipe
from dar_train.task import Batches, Loss, Run, autocast_of
from dar_train.tokens import CodeBatch, Store, unigram

EVAL_CHUNK = 64
EVAL_STREAM = 6  # of a seed
SAMPLE_ROWS, SAMPLE_COLUMNS = 4, 8
SAMPLE_GUIDANCE = 3.0
UNIGRAM_PICTURES = 65_536  # training pictures whose single codes are counted


class PriorTask:
    """What the loop needs of the prior's training.

    Args:
        parallel: of a Prior and its `loss`.
        tokenizer: whose codes they are; decodes the samples of an evaluation. None: no samples.
    """

    title = "prior"

    def __init__(
        self,
        recipe: PriorRecipe,
        parallel: Parallel,
        batches: Batches[CodeBatch],
        store: Store,
        tokenizer: Tokenizer | None,
    ) -> None:
        self.recipe = recipe
        self.parallel = parallel
        self.batches = batches
        self.store = store
        self.tokenizer = tokenizer
        self.device = parallel.ranks.device
        self.autocast = autocast_of(recipe, self.device)
        generator = torch.Generator().manual_seed(derived_seed(recipe.seed, EVAL_STREAM))
        chosen = store.held_out[torch.randperm(len(store.held_out), generator=generator)]
        self.held_out = chosen[: recipe.eval_pictures]
        shown = torch.unique(store.labels[chosen], sorted=False)[: SAMPLE_ROWS * SAMPLE_COLUMNS]
        self.shown = shown.to(self.device)
        self._unigram: dict[str, float] | None = None

    @property
    def model(self) -> Prior:
        """The prior; its parameters may be shards."""
        return cast(Prior, self.parallel.model)

    def arrange(self, batch: CodeBatch, draws: Draws) -> Tensor | None:
        """Samples are cut into micro-batches as they come: all cost the same."""
        return None

    def loss(self, batch: CodeBatch, draws: Draws) -> Loss:
        """Cross-entropy a code in nats; some labels give way to the null class."""
        dropped = draws.uniform("class") < self.recipe.class_dropout
        labels = batch.labels.masked_fill(dropped, self.model.config.null_class)
        with self.autocast:
            return Loss(self.parallel.call(batch.codes, labels), {})

    def after_step(self, batch: CodeBatch, draws: Draws, run: Run) -> dict[str, float]:
        """Nothing."""
        return {}

    def notes(self) -> dict[str, float]:
        """None."""
        return {}

    @torch.no_grad()
    def evaluate(self, averaged: nn.Module, step: int) -> dict[str, float]:
        """Cross-entropy of held-out pictures' codes in nats, beside that of single codes.

        Also draws a sheet of guided samples.
        """
        if not isinstance(averaged, Prior):
            raise TypeError(f"evaluate: expected a Prior, got {type(averaged).__name__}")
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for part in chunks(self.held_out, EVAL_CHUNK):
            codes = self.store.rows(self.store.plain, part).to(self.device)
            labels = self.store.labels[part].to(self.device)
            with self.autocast:
                total += averaged.loss(codes, labels, reduction="sum")
        if self._unigram is None:
            self._unigram = self._single_codes(averaged.config.vocab_size)
        if self.tokenizer is not None:
            self._draw(averaged, self.tokenizer, step)
        codes_seen = len(self.held_out) * averaged.config.num_tokens
        return {"cross_entropy": float(total) / codes_seen, **self._unigram}

    def _single_codes(self, vocab_size: int) -> dict[str, float]:
        every = max(1, len(self.store.train) // UNIGRAM_PICTURES)
        train = self.store.rows(self.store.plain, self.store.train[::every])
        return unigram(train, self.store.rows(self.store.plain, self.held_out), vocab_size)

    def _draw(self, model: Prior, tokenizer: Tokenizer, step: int) -> None:
        """Guided samples of held-out pictures' labels."""
        seeds = list(range(len(self.shown)))
        with self.autocast:
            codes = model.generate(self.shown, guidance_scale=SAMPLE_GUIDANCE, seeds=seeds)
            images = tokenizer.decode(codes, seeds=seeds).float()
        columns = min(SAMPLE_COLUMNS, len(images))
        rows = len(images) // columns
        grid = images[: rows * columns].reshape(rows, columns, *images.shape[1:])
        figures.save_grid(grid, self.recipe.out / "pictures" / f"step-{step:08d}.png")

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the order of the codes is the batches'."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""
