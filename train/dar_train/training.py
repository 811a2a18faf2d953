"""What every training does around its loop: threads, ranks, checks, then the run and the export."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn

from dar_kernels import prefer
from dar_train.data import derived_seed
from dar_train.distributed import Ranks, joined
from dar_train.host_memory import keep_freed_memory
from dar_train.loop import Loop
from dar_train.recipes import Recipe
from dar_train.runs import begin

RecipeT = TypeVar("RecipeT", bound=Recipe)

WEIGHTS_STREAM = 4  # of a recipe's seed


def seed_weights(recipe: Recipe) -> None:
    """Seed what a model draws while it is built."""
    torch.manual_seed(derived_seed(recipe.seed, WEIGHTS_STREAM))


def attention_of(recipe: Recipe) -> AbstractContextManager[None]:
    """Within it, the back end of attention that the recipe names, if any.

    Raises:
        ValueError, UnavailableError: where there is none of that name, or not here.
    """
    return nullcontext() if recipe.attention is None else prefer(recipe.attention, op="attention")


def parameter_millions(model: nn.Module) -> float:
    """Its size, for log lines."""
    return sum(p.numel() for p in model.parameters()) / 1e6


def train(
    recipe: RecipeT,
    make_loop: Callable[[RecipeT, Ranks], Loop[Any]],
    export: Callable[[nn.Module], object],
) -> bool:
    """Train, resume or finish a run; True when the whole run is over.

    Args:
        make_loop: the run's loop on these ranks, resumed where the recipe says so.
        export: writes the averaged model, whole; called on the first rank.

    Raises:
        ValueError: where the recipe, the data or the model do not fit.
        TrainingError: where the gradients stop being finite.
    """
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    with attention_of(recipe), joined(recipe.device) as ranks:
        begin(recipe, ranks)
        if ranks.device.type == "cpu":
            keep_freed_memory()
        loop = make_loop(recipe, ranks)
        over = loop.run()
        averaged = loop.parallel.gathered(loop.ema.module)
        if averaged is not None and ranks.first:
            export(averaged)
    return over
