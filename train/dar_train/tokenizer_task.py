"""The tokenizer's loss: flow matching + vq + commitment, and 0.5 LPIPS + 0.5 REPA where asked for.

A step costs three forward passes of encoder, token decoder and pixel DiT. A picture draws one group
of tokens, and needs none behind it: an optimizer batch is cut into micro-batches by group, and each
computes the tokens up to its last, on average a little over half of them.
Source: arXiv 2505.23660, §3.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from dar_fast.flow import drawn_group_start
from dar_fast.models.tokenizer import Tokenizer, TokenizerTraining
from dar_train.codebook import CodebookUse, encoder_rows, of_first_rank, start_from_rows
from dar_train.data import PictureBatch, augment_drawn, chunks, derived_seed, to_float
from dar_train.data.augmentation import DRAWS as AUGMENT_DRAWS
from dar_train.draws import Draws
from dar_train.losses import AuxiliaryLoss, alignment_loss, feature_loss, perceptual_loss
from dar_train.parallel import Parallel
from dar_train.recipes import TokenizerRecipe
from dar_train.rollout import Flight, Rollout
from dar_train.shards import assign, whole
from dar_train.task import Batches, Loss, Run, autocast_of
from dar_train.tokenizer_figures import HeldOutFigures

ENCODE_CHUNK = 64  # pictures a pass without gradients
CODE_NOISE = 0.1  # a channel, in the continuous steps: about the error of 4096 codes on the sphere
CODEBOOK_SEED, REVIVAL_SEED = 3, 30  # streams of a recipe's seed
RECENT = "codebook.recent"


class TokenizerTask:
    """What the loop needs of the tokenizer's training.

    Args:
        parallel: of a Tokenizer and its `training_forward`.
        first_pictures: uint8 `[M, 3, R, R]` to start the codebook from, the same on every rank.
    """

    title = "tokenizer"

    def __init__(
        self,
        recipe: TokenizerRecipe,
        parallel: Parallel,
        batches: Batches[PictureBatch],
        held_out: HeldOutFigures,
        first_pictures: Callable[[], Tensor],
    ) -> None:
        self.recipe = recipe
        self.parallel = parallel
        self.batches = batches
        self.held_out = held_out
        self.first_pictures = first_pictures
        self.config = self.model.config
        self.device = parallel.ranks.device
        self.use = CodebookUse(self.config.codebook_size, self.device)
        self.rollout = Rollout(self.config, self.device) if recipe.rollout else None
        self.autocast = autocast_of(recipe, self.device)
        self.on_pictures: dict[str, tuple[float, AuxiliaryLoss]] = {}
        if recipe.lpips_weights is not None:
            lpips = perceptual_loss(recipe.lpips_weights, self.device)
            self.on_pictures["lpips"] = recipe.lpips_weight, lpips
        if recipe.perceptual is not None:
            own = feature_loss(recipe.perceptual, self.config.image_size, self.device)
            self.on_pictures["perceptual"] = recipe.perceptual_weight, own
        self.alignment: AuxiliaryLoss | None = None
        if recipe.repa_weights is not None:
            if self.config.dit.repa_layer is None:
                raise ValueError("repa_weights: expected a model with dit.repa_layer, got none")
            self.alignment = alignment_loss(recipe.repa_weights, self.device)
        self._saved_flight: dict[str, Tensor] = {}  # of all ranks, until this one's place is known
        self._positions = torch.arange(0)  # of this rank's samples in the last batch

    @property
    def model(self) -> Tokenizer:
        """The tokenizer; its parameters may be shards."""
        return cast(Tokenizer, self.parallel.model)

    @property
    def rows_each(self) -> int:
        """Draws of a sample: m, for each of the S pictures in flight that it stands for, if any."""
        flights = 1 if self.rollout is None else self.rollout.num_steps
        return self.recipe.draws_per_image * flights

    def _ends(self, u: Tensor) -> Tensor:
        """Tokens that draws `u` read up to."""
        N, K = self.config.num_tokens, self.config.num_groups
        return drawn_group_start(u, K, N) + self.config.group_size

    def arrange(self, batch: PictureBatch, draws: Draws) -> Tensor | None:
        """By the last group that a sample draws."""
        if self.rollout is not None:
            return None
        ends = self._ends(draws.host_uniform("time", self.rows_each)).amax(1)
        return ends.argsort(stable=True)

    def _pictures(self, batch: PictureBatch, draws: Draws) -> Tensor:
        images = to_float(batch.images)
        if self.recipe.augment:
            images = augment_drawn(images, draws.uniform("augment", AUGMENT_DRAWS))
        return images

    def _board(self, images: Tensor, draws: Draws) -> Flight | None:
        """The pictures in flight once `images` `[b, 3, R, R]` are aboard, S b of them."""
        if self.rollout is None:
            return None
        shape = images.shape[1:]
        if self._saved_flight:
            self.rollout.load(self._saved_flight, draws.positions)
            self._saved_flight = {}
        if self.rollout.flight is None:
            S = self.rollout.num_steps
            noise = draws.normal("fill", S - 1, *shape).transpose(0, 1).flatten(0, 1)
            self.rollout.fill(images.repeat(S - 1, 1, 1, 1), noise)
        return self.rollout.board(images, draws.normal("board", *shape))

    def loss(self, batch: PictureBatch, draws: Draws) -> Loss:
        images = self._pictures(batch, draws)
        flight = self._board(images, draws)
        self._positions = draws.positions
        if flight is not None:
            images = flight.images
        self._shown = images
        m, total = self.rows_each, draws.total
        drawn = draws.host_uniform("time", m)
        count = float(self._ends(draws.whole().host_uniform("time", m)).sum()) / total * len(drawn)
        options: dict[str, Any] = {"tokens": int(self._ends(drawn).max())}
        if flight is not None and self.rollout is not None:
            count += self.rollout.tokens_used()
            options |= {"tokens": None, "states": self.rollout.states(flight)}
        if draws.step < self.recipe.continuous_steps:
            N, C = self.config.num_tokens, self.config.code_dim
            rows = len(images) // len(drawn)  # a sample: the pictures in flight
            noise = draws.normal("code", rows, N, C).transpose(0, 1).flatten(0, 1)
            options["code_noise"] = CODE_NOISE * noise
        with self.autocast:
            out: TokenizerTraining = self.parallel.call(
                images, _by_draw(draws.uniform("time", m)),
                _by_draw(draws.normal("noise", m, *images.shape[1:])),
                count=count, align=self.alignment is not None, **options,
            )  # fmt: skip
            loss = self._summed(images, out)
        if flight is not None and self.rollout is not None and out.state_velocity is not None:
            rollout = self.recipe.rollout * self.rollout.loss(flight, out.state_velocity)
            loss = Loss(loss.total + rollout, {**loss.parts, "rollout": rollout})
            self.rollout.advance(out.state_velocity.detach())
        self.use.count(out.codes, out.used)
        return loss

    def _summed(self, images: Tensor, out: TokenizerTraining) -> Loss:
        parts = {"fm": out.fm, "vq": out.vq, "commit": out.commit}
        for name, (weight, distance) in self.on_pictures.items():
            parts[name] = weight * distance(images, out.predicted_images)
        if self.alignment is not None and out.repa is not None:
            parts["repa"] = self.recipe.repa_weight * self.alignment(images, out.repa)
        return Loss(torch.stack([v.float() for v in parts.values()]).sum(), parts)

    @torch.no_grad()
    def _encoder_rows(self, images: Tensor) -> Tensor:
        with self.autocast:
            parts = [encoder_rows(self.model, part) for part in chunks(images, ENCODE_CHUNK)]
        return torch.cat(parts)

    def start_codebook(self, averages: Sequence[nn.Module] = ()) -> None:
        """Put the codebook, and that of averages, on encoder rows of the first pictures."""
        seed = derived_seed(self.recipe.seed, CODEBOOK_SEED)
        rows = self._encoder_rows(to_float(self.first_pictures().to(self.device)))
        fitted = whole(self.model.quantizer.codebook).clone()
        start_from_rows(fitted, rows, torch.Generator().manual_seed(seed))
        fitted = of_first_rank(self.parallel, fitted)  # sums on a GPU have an order of their own
        for codebook in (self.model.quantizer.codebook, *map(_codebook, averages)):
            assign(codebook, fitted)
        self.use.recent.zero_()

    def after_step(self, batch: PictureBatch, draws: Draws, run: Run) -> dict[str, float]:
        recipe, step = self.recipe, run.steps_done
        if step == recipe.continuous_steps and recipe.codebook_from_data:
            self.start_codebook([run.ema.module])
        after = recipe.revive_after
        if step <= recipe.continuous_steps or after is None or step % after:
            return {}
        if run.done > 1 - recipe.decay_fraction:
            return {}
        seed = derived_seed(recipe.seed, REVIVAL_SEED, step)
        moved = self.use.revive(
            self.parallel, (self.model.quantizer.codebook, _codebook(run.ema.module)),
            self._encoder_rows(self._shown[:ENCODE_CHUNK]), run.optimizers,
            torch.Generator().manual_seed(seed),
        )  # fmt: skip
        return {"revived": float(moved)}

    def notes(self) -> dict[str, float]:
        """Use of the codebook; every rank calls it."""
        return self.use.report(self.parallel)

    def evaluate(self, averaged: nn.Module, step: int) -> dict[str, float]:
        if not isinstance(averaged, Tokenizer):
            raise TypeError(f"evaluate: expected a Tokenizer, got {type(averaged).__name__}")
        with self.autocast:
            return self.held_out.evaluate(averaged, step)

    def state_dict(self) -> dict[str, Any]:
        """Of all ranks together, the same on each; every rank calls it."""
        state: dict[str, Any] = {RECENT: self.parallel.sum(self.use.recent).clone()}
        if self.rollout is None or self._saved_flight:
            return state | self._saved_flight
        mine = self.rollout.tensors(self._positions, self.recipe.batch)
        return state | {name: self.parallel.sum(tensor) for name, tensor in mine.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        recent = state.get(RECENT, torch.zeros_like(self.use.recent))  # older states have none
        if recent.shape != self.use.recent.shape:
            raise ValueError(
                f"checkpoint: expected {len(self.use.recent)} codes, got {list(recent.shape)}"
            )
        recent = recent if self.parallel.ranks.first else torch.zeros_like(recent)
        self.use.recent.copy_(recent)
        flight = {name: t for name, t in state.items() if name.startswith("rollout.")}
        steps = flight.get("rollout.step", torch.empty(0))  # [S - 1, batch] int64
        if steps.shape == (self.config.num_steps - 1, self.recipe.batch):
            self._saved_flight = flight  # else another batch: the flight starts anew


def _by_draw(numbers: Tensor) -> Tensor:
    """`[b, m, …]` of b samples as rows of draws, `[m b, …]`: row i is one of sample i mod b."""
    return numbers.transpose(0, 1).flatten(0, 1)


def _codebook(module: nn.Module) -> Tensor:
    return module.get_parameter("quantizer.codebook")
