"""Training of the tokenizer: loss = flow matching + vq + commitment (+ 0.5 LPIPS + 0.5 REPA).

A step costs three forward passes of encoder, token decoder and pixel DiT.
Source: arXiv 2505.23660, §3.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dar_fast.models.tokenizer import States, Tokenizer, TokenizerTraining
from dar_train import figures
from dar_train.codebook import CodebookUse, encoder_rows, start_from_rows, use_of
from dar_train.data import Order, Pictures, augment, chunks, derived_seed, load_pictures, to_float
from dar_train.export import export_component
from dar_train.loop import Loop, Loss, pick_device
from dar_train.losses import AuxiliaryLoss, alignment_loss, perceptual_loss
from dar_train.recipes import TokenizerRecipe
from dar_train.reporting import logger
from dar_train.rollout import Flight, Rollout

EVAL_CHUNK = 64
GRID_PICTURES = 12
START_PICTURES = 512  # whose encoder rows start the codebook
CODE_NOISE = 0.1  # a channel, in the continuous steps: about the error of 4096 codes on the sphere


def _attention(device: torch.device) -> AbstractContextManager[None]:
    """Plain attention on a CPU: over a hundred tokens its backward pass beats flash's."""
    if device.type == "cpu":
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


class TokenizerTask:
    """What the loop needs of the tokenizer's training."""

    title = "tokenizer"

    def __init__(
        self, recipe: TokenizerRecipe, model: Tokenizer, data: Pictures, device: torch.device
    ) -> None:
        self.recipe = recipe
        self.model = model
        self.device = device
        self.images = data.images.to(device)
        self.order = Order(data.train, recipe.seed)
        self.use = CodebookUse(model.config.codebook_size, device)
        self.autocast = torch.autocast(
            device.type, dtype=torch.bfloat16, enabled=recipe.precision == "bf16"
        )
        self.perceptual: AuxiliaryLoss | None = None
        self.alignment: AuxiliaryLoss | None = None
        if recipe.lpips_weights is not None:
            self.perceptual = perceptual_loss(recipe.lpips_weights, device)
        if recipe.repa_weights is not None:
            if model.config.dit.repa_layer is None:
                raise ValueError("repa_weights: expected a model with dit.repa_layer, got none")
            self.alignment = alignment_loss(recipe.repa_weights, device)
        self.step = 0
        self.rollout = Rollout(model.config, device) if recipe.rollout else None
        if recipe.compile:  # block by block: one compilation serves all blocks of a kind
            for stack in (model.encoder.layers, model.token_decoder.layers, model.pixel_dit.blocks):
                for block in stack:
                    block.compile(dynamic=False)
        generator = torch.Generator().manual_seed(derived_seed(recipe.seed, 2))
        chosen = data.held_out[torch.randperm(len(data.held_out), generator=generator)]
        chosen = chosen[: recipe.eval_pictures].sort().values
        self.held_out = to_float(self.images[chosen.to(device)])
        R = model.config.image_size
        shape = (len(chosen), 3, R, R)
        self._u = torch.rand(len(chosen), generator=generator).to(device)
        self._noise = torch.randn(shape, generator=generator).to(device)

    def _pictures(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        images = to_float(self.images[indices.to(self.device)])
        return augment(images, generator) if self.recipe.augment else images

    def _parts(self, images: Tensor, out: TokenizerTraining) -> Loss:
        parts = {"fm": out.fm, "vq": out.vq, "commit": out.commit}
        if self.perceptual is not None:
            lpips = self.perceptual(images, out.predicted_images)
            parts["lpips"] = self.recipe.lpips_weight * lpips
        if self.alignment is not None and out.repa is not None:
            parts["repa"] = self.recipe.repa_weight * self.alignment(images, out.repa)
        return Loss(torch.stack([v.float() for v in parts.values()]).sum(), parts)

    def _states(self, images: Tensor, generator: torch.Generator) -> Flight | None:
        """The pictures in flight once `images` `[n, 3, R, R]` are aboard, S n of them."""
        if self.rollout is None:
            return None

        def noise(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=generator, device=self.device)

        if self.rollout.flight is None:
            chosen = self.order.take(0, self.model.config.num_steps * len(images))
            filling = self._pictures(chosen, generator)
            self.rollout.fill(filling, noise(filling))
        return self.rollout.board(images, noise(images))

    def loss(self, indices: Tensor, generator: torch.Generator) -> Loss:
        images = self._pictures(indices, generator)
        flight = self._states(images, generator)
        states = None
        if flight is not None and self.rollout is not None:
            images = flight.images
            times, starts = self.rollout.times[flight.step], self.rollout.starts[flight.step]
            states = States(flight.x, times, starts)
        self.shown = images
        draws = self.recipe.draws_per_image
        u = torch.rand(draws * len(images), generator=generator, device=self.device)
        shape = (draws * len(images), *images.shape[1:])
        noise = torch.randn(shape, generator=generator, device=self.device)
        code_noise = None
        if self.step < self.recipe.continuous_steps:
            config = self.model.config
            rows = (len(images), config.num_tokens, config.code_dim)
            code_noise = CODE_NOISE * torch.randn(rows, generator=generator, device=self.device)
        with self.autocast, _attention(self.device):
            out = self.model.training_forward(images, u, noise, code_noise, states)
            loss = self._parts(images.repeat(draws, 1, 1, 1) if draws > 1 else images, out)
        if flight is not None and self.rollout is not None and out.state_velocity is not None:
            rollout = self.recipe.rollout * self.rollout.loss(flight, out.state_velocity)
            loss = Loss(loss.total + rollout, {**loss.parts, "rollout": rollout})
            self.rollout.advance(out.state_velocity.detach())
        self.use.count(out.codes)
        return loss

    def start_codebook(self) -> None:
        """Put the codebook on encoder rows of the first pictures in the order."""
        seed = derived_seed(self.recipe.seed, 3)
        generator = torch.Generator(self.device).manual_seed(seed)
        images = self._pictures(self.order.take(0, START_PICTURES), generator)
        with self.autocast, torch.no_grad():
            rows = torch.cat(
                [encoder_rows(self.model, part) for part in chunks(images, EVAL_CHUNK)]
            )
        start_from_rows(self.model.quantizer.codebook, rows, generator)
        self.use.idle.zero_()

    def after_step(self, step: int, indices: Tensor, loop: Loop) -> dict[str, float]:
        self.step = step
        if step == self.recipe.continuous_steps and self.recipe.codebook_from_data:
            self.start_codebook()
            averaged = loop.ema.module.get_parameter("quantizer.codebook")
            averaged.copy_(self.model.quantizer.codebook.detach())
        if step <= self.recipe.continuous_steps:
            return {}
        after = self.recipe.revive_after
        if after is None or step % after or loop.done > 1 - self.recipe.decay_fraction:
            return {}
        averaged = loop.ema.module.get_parameter("quantizer.codebook")
        with self.autocast:
            moved = self.use.revive(
                self.model, self.shown, after, loop.optimizers, averaged, loop.generator
            )
        return {"revived": float(moved)}

    def notes(self) -> dict[str, float]:
        """Figures for the log line."""
        return self.use.report()

    @torch.no_grad()
    def evaluate(self, averaged: nn.Module, step: int) -> dict[str, float]:
        model = averaged
        if not isinstance(model, Tokenizer):
            raise TypeError(f"evaluate: expected a Tokenizer, got {type(model).__name__}")
        loss = 0.0
        rebuilt, codes = [], []
        for part in range(0, len(self.held_out), EVAL_CHUNK):
            keep = slice(part, part + EVAL_CHUNK)
            images = self.held_out[keep]
            with self.autocast:
                out = model.training_forward(images, self._u[keep], self._noise[keep])
                code = model.encode(images)
                seeds = list(range(part, part + len(images)))
                rebuilt.append(model.decode(code, seeds=seeds).float())
            loss += float(out.fm + out.vq + out.commit) * len(images)
            codes.append(code)
        psnr = figures.psnr(self.held_out, torch.cat(rebuilt))
        counts = torch.bincount(torch.cat(codes).flatten(), minlength=model.config.codebook_size)
        self._draw(model, codes[0][:GRID_PICTURES], rebuilt[0][:GRID_PICTURES], step)
        return {
            "loss": loss / len(self.held_out),
            "psnr": float(psnr.mean()),
            "psnr_of_mean": figures.psnr_of_mean(self.held_out, torch.cat(rebuilt)),
            **use_of(counts),
        }

    def _draw(self, model: Tokenizer, codes: Tensor, rebuilt: Tensor, step: int) -> None:
        """A row a picture: itself, its jump previews step by step, its reconstruction."""
        columns = [self.held_out[: len(codes)]]
        seeds = list(range(len(codes)))
        for k in range(1, model.config.num_steps):
            with self.autocast:
                preview = model.decode(codes, seeds=seeds, stop_after=k, preview="jump")
            columns.append(preview.float())
        columns.append(rebuilt)
        file = self.recipe.out / "pictures" / f"step-{step:08d}.png"
        figures.save_grid(torch.stack(columns, dim=1), file)

    def extra_state(self) -> dict[str, object]:
        tensors = {} if self.rollout is None else self.rollout.tensors()
        return {"idle": self.use.idle.tolist(), "step": self.step, **tensors}

    def load_extra_state(self, state: dict[str, object]) -> None:
        self.step = int(str(state["step"]))
        idle = torch.tensor(state["idle"], dtype=torch.int32, device=self.device)
        if idle.shape != self.use.idle.shape:
            raise ValueError(f"checkpoint: expected {len(self.use.idle)} codes, got {idle.numel()}")
        self.use.idle = idle
        if self.rollout is not None:
            self.rollout.load({k: v for k, v in state.items() if isinstance(v, Tensor)})


def train_tokenizer(recipe: TokenizerRecipe) -> bool:
    """Train, resume or finish a tokenizer; True when the whole run is over.

    Raises:
        ValueError: where the data or the model do not fit the recipe.
        TrainingError: where the loss stops being finite.
    """
    config = recipe.config()
    device = pick_device(recipe.device)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    data = load_pictures(recipe.data, config.image_size)
    torch.manual_seed(derived_seed(recipe.seed, 4))
    model = Tokenizer(config, recipe.gate_init).to(device)
    task = TokenizerTask(recipe, model, data, device)
    if recipe.codebook_from_data and recipe.continuous_steps == 0:
        task.start_codebook()
    loop = Loop(recipe, task, device)
    count = sum(parameter.numel() for parameter in loop.parameters)
    logger.info(
        "tokenizer %s: %.1fM parameters, %d training and %d held-out pictures, %s",
        recipe.model, count / 1e6, len(data.train), len(data.held_out), device,
    )  # fmt: skip
    over = loop.run()
    export_component(loop.ema.module, recipe.out / "tokenizer")
    return over
