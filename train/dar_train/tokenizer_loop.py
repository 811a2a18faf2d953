"""A training of the tokenizer from its recipe: data, model, ranks and loop put together.

The loss and what it costs are `tokenizer_task`'s.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from dar_fast.config import TokenizerConfig
from dar_fast.models.tokenizer import Tokenizer
from dar_train.data import (
    PictureBatch,
    PictureSet,
    held_out_pictures,
    open_pictures,
    picture_batches,
)
from dar_train.distributed import Ranks
from dar_train.export import export_component
from dar_train.init import start_weights
from dar_train.loop import Loop
from dar_train.parallel import Parallel, parallelize
from dar_train.recipes import TokenizerRecipe
from dar_train.recompute import recompute
from dar_train.reporting import logger
from dar_train.tokenizer_figures import HeldOutFigures
from dar_train.tokenizer_task import TokenizerTask
from dar_train.training import parameter_millions, seed_weights, train

START_PICTURES = 512  # whose encoder rows start the codebook


def make_tokenizer(
    recipe: TokenizerRecipe, config: TokenizerConfig, device: torch.device
) -> Tokenizer:
    """The model as a run starts with it; heads that no loss of the recipe reads are not trained.

    Raises:
        ValueError: where the weights to start from do not fit.
    """
    seed_weights(recipe)
    model = Tokenizer(config, recipe.gate_init).to(device)
    if recipe.init is not None:
        start_weights(model, recipe.init)
    if recipe.repa_weights is None and config.dit.repa_layer is not None:
        model.pixel_dit.repa_out.requires_grad_(False)
    return model


def parallel_tokenizer(recipe: TokenizerRecipe, ranks: Ranks) -> Parallel:
    """That model on all ranks.

    Raises:
        ValueError: as `make_tokenizer` does.
    """
    model = make_tokenizer(recipe, recipe.config(), ranks.device)
    blocks = [*model.encoder.layers, *model.token_decoder.layers, *model.pixel_dit.blocks]
    recompute(blocks, recipe.recompute)
    return parallelize(model, "training_forward", recipe, ranks, blocks, also=("pre_quantize",))


def first_pictures(recipe: TokenizerRecipe, pictures: PictureSet, size: int) -> Tensor:
    """uint8 `[512, 3, R, R]`: the first of the run's order, centre crops, whoever asks."""
    alone = Ranks(0, 1, 0, torch.device("cpu"))
    settings = replace(
        recipe, batch=START_PICTURES, micro_batch=None, workers=0, rollout=0.0, device="cpu"
    )
    batches = picture_batches(settings, size, alone, crop=False, flip=False, pictures=pictures)
    try:
        return batches.next().images
    finally:
        batches.close()


def tokenizer_loop(recipe: TokenizerRecipe, ranks: Ranks) -> Loop[PictureBatch]:
    """The loop of a run, resumed where the recipe says so.

    Raises:
        ValueError: where the data, the weights or the model do not fit the recipe.
    """
    size = recipe.config().image_size
    pictures = open_pictures(recipe.data, size)
    batches = picture_batches(
        recipe, size, ranks, crop=recipe.crop, flip=recipe.flip, pictures=pictures
    )
    parallel = parallel_tokenizer(recipe, ranks)
    chosen = held_out_pictures(pictures, size, recipe.eval_pictures, recipe.seed)
    held_out = HeldOutFigures(chosen.images, recipe.seed, recipe.out / "pictures", ranks.device)
    start = partial(first_pictures, recipe, pictures, size)
    task = TokenizerTask(recipe, parallel, batches, held_out, start)
    if recipe.codebook_from_data and recipe.continuous_steps == 0:
        task.start_codebook()
    loop = Loop(recipe, task, parallel)
    logger.info(
        "tokenizer %s: %.1fM parameters, %d training and %d held-out pictures, %s",
        recipe.model, parameter_millions(parallel.model),
        len(pictures.train), len(pictures.held_out), ranks.device,
    )  # fmt: skip
    return loop


def train_tokenizer(recipe: TokenizerRecipe) -> bool:
    """Train, resume or finish a tokenizer into `recipe.out / "tokenizer"`, as `train` says."""
    folder = recipe.out / "tokenizer"
    return train(recipe, tokenizer_loop, partial(export_component, folder=folder))
