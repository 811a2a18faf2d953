"""How many numbers the models hold, from their configurations: exact, without making them."""

from dar_fast.config import PixelDiTConfig, PriorConfig, TokenizerConfig
from dar_fast.models.pixel_dit import REPA_DIM, REPA_HIDDEN


def _linear(dim: int, out: int, bias: bool = True) -> int:
    return dim * out + (out if bias else 0)


def prior_products(config: PriorConfig) -> tuple[int, int]:
    """Weights and output channels of the products and the head."""
    D, F, Dh = config.dim, config.hidden_dim, config.head_dim
    qkv = (config.heads + 2 * config.key_value_heads) * Dh
    weights = config.depth * (qkv * D + D * D + 3 * F * D) + config.vocab_size * D
    return weights, config.depth * (qkv + D + 2 * F + D) + config.vocab_size


def prior_parameters(config: PriorConfig) -> int:
    """Numbers that a `Prior` holds."""
    embeddings = (config.num_classes + 1 + config.vocab_size) * config.dim
    norms = (2 * config.depth + 1) * config.dim
    return prior_products(config)[0] + embeddings + norms


def _attention(dim: int, head_dim: int) -> int:
    return 4 * _linear(dim, dim) + 4 * head_dim


def _mlp(dim: int) -> int:
    return _linear(dim, 4 * dim) + _linear(4 * dim, dim)


def _gated_blocks(depth: int, dim: int, head_dim: int) -> int:
    return depth * (6 * dim + _attention(dim, head_dim) + _mlp(dim))


def _pixel_dit(config: PixelDiTConfig, cond_dim: int) -> int:
    D, channels = config.dim, 3 * config.patch_size**2
    block = 2 * _attention(D, config.head_dim) + _mlp(D) + _linear(D, 6 * D) + 4 * _linear(D, D)
    ends = _linear(cond_dim, D) + _linear(channels, D) + _linear(D, channels)
    return config.depth * block + ends


def tokenizer_parameters(config: TokenizerConfig) -> tuple[int, int]:
    """Numbers that a `Tokenizer` holds: those that sampling reads, and the others."""
    De, Dd, C, P = config.encoder_dim, config.decoder_dim, config.code_dim, config.patch_size
    read = config.codebook_size * C + C * Dd + config.query_table * Dd
    read += _gated_blocks(config.decoder_depth, Dd, config.head_dim)
    read += _pixel_dit(config.dit, Dd)
    other = _linear(3 * P * P, De) + config.query_table * C + _linear(C, De) + De * C
    other += _gated_blocks(config.encoder_depth, De, config.head_dim)
    if config.dit.repa_layer is not None:
        other += _linear(config.dit.dim, REPA_HIDDEN) + _linear(REPA_HIDDEN, REPA_HIDDEN)
        other += _linear(REPA_HIDDEN, REPA_DIM)
    return read, other


def packed_numbers(config: PixelDiTConfig) -> int:
    """Weights of the pixel DiT's `Linear`s, which `pack` copies."""
    D = config.dim
    return config.depth * 22 * D * D + 2 * 3 * config.patch_size**2 * D


__all__ = ["packed_numbers", "prior_parameters", "prior_products", "tokenizer_parameters"]
