"""Bytes that a step of a recipe takes on one rank, estimated: what presets' micro-batches go by.

    states      = P · (4 weight + 4 gradient + 8 AdamW + 4 average, if any) / ranks of FSDP
    copies      = 2 · P, the weights in bf16
    activations = micro-batch · Σ over stacks of bytes · width · depth · positions

The bytes kept for the backward pass, by width and layer of a position, were counted at width 256
with the hooks of autograd, under bf16 autocast on a CPU and without recomputation; a GPU's kernels
keep other things. Logits, teachers of the auxiliary losses and the allocator come on top.
"""

from typing import NamedTuple

import torch

from dar_fast.config import TokenizerConfig
from dar_fast.models import Prior, Tokenizer
from dar_train.recipes.prior import PriorRecipe
from dar_train.recipes.tokenizer import TokenizerRecipe

PRIOR_BYTES, ENCODER_BYTES, DECODER_BYTES, DIT_BYTES = 75, 63, 76, 90


class Memory(NamedTuple):
    """Bytes on one rank."""

    parameters: int  # their number
    states: float
    activations: float

    @property
    def total(self) -> float:
        """States and activations."""
        return self.states + self.activations


def estimate(recipe: TokenizerRecipe | PriorRecipe, world: int = 1) -> Memory:
    """What a step takes without recomputation.

    Args:
        world: ranks; with FSDP they share the states.

    Raises:
        ProblemsError: where the model contradicts itself.
    """
    config = recipe.config()
    with torch.device("meta"):
        model = Tokenizer(config) if isinstance(config, TokenizerConfig) else Prior(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    shards = world if recipe.parallel == "fsdp" else 1
    states = count * (16 + (4 if recipe.ema else 0)) / shards + 2 * count / shards
    if isinstance(config, TokenizerConfig):
        patches = (config.image_size // config.patch_size) ** 2 + config.num_tokens
        dit = config.dit
        sample = (
            ENCODER_BYTES * config.encoder_dim * config.encoder_depth * patches
            + DECODER_BYTES * config.decoder_dim * config.decoder_depth * config.num_tokens
            + DIT_BYTES * dit.dim * dit.depth * (config.image_size // dit.patch_size) ** 2
        )
    else:
        sample = PRIOR_BYTES * config.dim * config.depth * config.num_tokens
    rows = min(recipe.micro_batch or recipe.batch, recipe.batch // world)
    return Memory(count, states, rows * sample)
