"""FLOPs of a training step, counted as the mathematics needs them: products and attention only.

A forward pass of one picture, times 3 for the gradients:
    prior      2 N (weights of the products) + 2 L N^2 D, causal attention being half of N^2
    tokenizer  encoder over P + n and token decoder over n tokens, n the tokens up to the drawn
               group's end, on average over the draws; one evaluation of the pixel DiT
Work that an implementation adds, such as tokens behind the drawn group or a second forward pass,
does not count, so utilisation is of what was needed. Source: REFERENCE §8.
"""

import torch

from dar_fast.bench.floors import linear_flops, product_weights, step_flops
from dar_fast.config import PriorConfig, TokenizerConfig
from dar_fast.flow import drawn_group_start

PASSES = 3  # forward, and twice that for the gradients
DRAWS = 100_001  # of u, for the mean over the drawn groups


def prior_flops(c: PriorConfig) -> float:
    """FLOPs of one picture in a training step of the prior."""
    N = c.num_tokens
    return PASSES * (2.0 * N * product_weights(c) + 2 * c.depth * N * N * c.dim)


def tokenizer_flops(c: TokenizerConfig) -> float:
    """FLOPs of one picture in a training step of the tokenizer, without LPIPS and REPA."""
    u = (torch.arange(DRAWS) + 0.5) / DRAWS
    ends = (drawn_group_start(u, c.num_groups, c.num_tokens) + c.group_size).double()
    n, n2 = float(ends.mean()), float(ends.square().mean())
    P, D, E = (c.image_size // c.patch_size) ** 2, c.decoder_dim, c.encoder_dim
    encoder = 2 * 12 * (P + n) * E * E + 4 * E * (P * P + P * n + n2 / 2)
    decoder = 2 * 12 * n * D * D + 4 * D * n2 / 2
    nearest = c.codebook_size / PASSES  # has no gradients
    ends_of_it = 2 * P * 3 * c.patch_size**2 * E + 2 * n * c.code_dim * (E + D + nearest)
    conditions = linear_flops(c.group_size, c.dit.dim, 1)
    return PASSES * (
        c.encoder_depth * encoder
        + c.decoder_depth * decoder
        + ends_of_it
        + conditions
        + step_flops(c)
    )
