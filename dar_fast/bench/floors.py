"""The least seconds that a picture can take: bytes over bandwidth, and FLOPs over the matrix rate.

T = N W / bandwidth, keys and values read again added; D = S DiT steps / rate. Overlapped, a picture
takes max(T + D / S, T / K + D): the last step needs all codes, the first the first group.
Source: REFERENCE §8.
"""

from typing import NamedTuple

from dar_fast.config import PriorConfig, TokenizerConfig
from dar_fast.models import Prior

WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1, "fp8": 1}
QUANTISED = ("int8", "fp8")  # one fp32 scale an output channel
DENSER = 2  # products of one byte run at most so many times as fast as those of two


def linear_flops(tokens: int, dim: int, matrices: int) -> int:
    """FLOPs of `matrices` products with [D, D] over so many tokens."""
    return 2 * tokens * dim * dim * matrices


def encode_flops(c: TokenizerConfig) -> int:
    """Products and attention of the encoder, one picture."""
    n = (c.image_size // c.patch_size) ** 2 + c.num_tokens
    return c.encoder_depth * (linear_flops(n, c.encoder_dim, 12) + 4 * n * n * c.encoder_dim)


def step_flops(c: TokenizerConfig) -> int:
    """Products and attention of one pixel DiT evaluation, one picture."""
    n, D = (c.image_size // c.dit.patch_size) ** 2, c.dit.dim
    block = linear_flops(n, D, 6 + 4 + 2 + 8) + 4 * n * n * D + 4 * n * c.group_size * D
    ends = 2 * 2 * n * 3 * c.dit.patch_size**2 * D
    return c.dit.depth * (block + linear_flops(c.group_size, D, 4)) + ends


def prior_bytes(model: Prior) -> int:
    """Bytes of the weights that one code reads: all but the embedding tables."""
    tables = {id(model.class_embedding.weight), id(model.token_embedding.weight)}
    return sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in tables)


def product_weights(c: PriorConfig) -> int:
    """Weights of the prior's products, which a code reads once for all rows."""
    qkv = (c.heads + 2 * c.key_value_heads) * c.head_dim
    return c.depth * c.dim * (qkv + c.dim + 3 * c.hidden_dim) + c.vocab_size * c.dim


def code_bytes(c: PriorConfig, weights: str) -> int:
    """Bytes of weights that one code reads, the products in `weights`: "bf16", "int8", …"""
    qkv = (c.heads + 2 * c.key_value_heads) * c.head_dim
    channels = c.depth * (qkv + 2 * c.dim + 2 * c.hidden_dim) + c.vocab_size
    scales = 4 * channels if weights in QUANTISED else 0
    return product_weights(c) * WEIGHT_BYTES[weights] + scales


def kv_bytes(c: PriorConfig, itemsize: int = 2) -> int:
    """Bytes of one token's keys and values in all layers, one row."""
    return 2 * c.depth * c.key_value_heads * c.head_dim * itemsize


def codes_bytes(
    c: PriorConfig, weights: str, *, rows: int = 2, itemsize: int = 2, steps: int | None = None
) -> int:
    """Bytes read by all steps of one batch: weights once a step, keys and values once a row.

    Args:
        rows: requests, twice for guided ones.
        itemsize: of keys and values.
        steps: the first so many codes; None: all N.
    """
    n = c.num_tokens if steps is None else steps
    return n * code_bytes(c, weights) + rows * kv_bytes(c, itemsize) * n * (n + 1) // 2


class Floor(NamedTuple):
    """Seconds that n pictures take at least, in batches of b requests."""

    codes: float  # all decode steps
    group: float  # those of the first group
    steps: float  # all DiT steps
    first_preview: float  # a group of codes, and one DiT step of one picture
    overlapped: float  # decode steps beside DiT steps
    sequential: float  # one after the other


def picture_floor(
    prior: PriorConfig,
    tokenizer: TokenizerConfig,
    weights: str,
    *,
    bandwidth: float,
    rate: float,
    pictures: int = 1,
    batch: int = 1,
    guided: bool = True,
    itemsize: int = 2,
) -> Floor:
    """The floor of so many pictures, decoded `batch` at a time.

    Args:
        weights: of the prior's products: a key of WEIGHT_BYTES.
        bandwidth: bytes/s of reading.
        rate: FLOP/s of matrix products in the tokenizer's type.
        itemsize: of keys and values.
    """
    N, K, S = prior.num_tokens, tokenizer.num_groups, tokenizer.num_steps
    rows = batch * (2 if guided else 1)

    def decode(steps: int) -> float:
        """Of one batch: bound by memory, or at large batches by arithmetic."""
        read = codes_bytes(prior, weights, rows=rows, itemsize=itemsize, steps=steps) / bandwidth
        fastest = rate * (DENSER if weights in QUANTISED else 1)
        return max(read, 2 * product_weights(prior) * rows * steps / fastest)

    step = step_flops(tokenizer) / rate
    codes, steps = decode(N) * pictures / batch, pictures * S * step
    group = decode(N // K)
    return Floor(
        codes, group, steps, group + step, max(codes + step, group + steps), codes + steps
    )  # fmt: skip


__all__ = [
    "WEIGHT_BYTES", "Floor", "code_bytes", "codes_bytes", "encode_flops", "kv_bytes",
    "linear_flops", "picture_floor", "prior_bytes", "product_weights", "step_flops",
]  # fmt: skip
