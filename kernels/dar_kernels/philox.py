"""Philox4x32-10: random bits as a function of a 64-bit key and a counter, the same on any device.

Ten rounds of two 32 x 32 → 64 bit products give four words: 20 products for four codes. No state is
kept, so a draw depends on its (seed, position, code) and never on a neighbour in the batch.
Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (2011).
"""

import torch
from torch import Tensor

from dar_kernels.triton_support import tl, triton

STREAM_CODES, STREAM_NOISE = 0, 1  # third word of the counter: draws for codes and for pictures
_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_A, _B = (tl.constexpr(m) for m in _MULTIPLIERS)
_WEYL_A, _WEYL_B = (tl.constexpr(w) for w in _WEYL)
_CODES = tl.constexpr(STREAM_CODES)


def philox(key: Tensor, c0: Tensor, c1: Tensor, c2: int, c3: int = 0) -> tuple[Tensor, ...]:
    """Philox4x32-10 of a 64-bit key and the counter (c0, c1, c2, c3): four tensors of 32 bits."""
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    x0, x1 = c0 + torch.zeros_like(c1), c1 + torch.zeros_like(c0)
    x2, x3 = torch.full_like(x0, c2), torch.full_like(x0, c3)
    for _ in range(10):
        p0, p1 = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]  # low 64 bits; the sign is masked off
        x0, x1, x2, x3 = (
            ((p1 >> 32) & _MASK) ^ x1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ x3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return x0, x1, x2, x3


def open_uniform(bits: Tensor) -> Tensor:
    """fp32 in (0, 1), never 0 or 1: the middle of one of 2^23 cells."""
    return ((bits >> 9).float() + 0.5) * 2.0**-23


def gumbel(bits: Tensor) -> Tensor:
    """Gumbel noise fp32 of words of 32 bits."""
    return -torch.log(-torch.log(open_uniform(bits)))


def code_bits(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """The word of every code, `[..., V]` int64, for seeds and positions `[...]` int64."""
    blocks = torch.arange(-(-vocab_size // 4), device=seeds.device)
    words = philox(seeds[..., None], blocks, positions[..., None], STREAM_CODES)
    return torch.stack(words, dim=-1).flatten(-2)[..., :vocab_size]


@triton.jit
def code_bits_row(seed, position, BLOCK_V: tl.constexpr):
    """The words of codes 0 … BLOCK_V - 1, uint32, as `code_bits`; 4 divides BLOCK_V."""
    x0 = tl.arange(0, BLOCK_V // 4).to(tl.uint32)
    x1 = x0 * 0 + position.to(tl.uint32)
    x2 = x0 * 0 + _CODES
    x3 = x0 * 0
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(x0, _A), x0 * _A
        high2, low2 = tl.umulhi(x2, _B), x2 * _B
        x0, x1, x2, x3 = high2 ^ x1 ^ k0, low2, high0 ^ x3 ^ k1, low0
        k0 += _WEYL_A
        k1 += _WEYL_B
    words = tl.join(tl.join(x0, x2), tl.join(x1, x3))  # [V / 4, 2, 2]: words 0, 1, 2, 3 of a block
    return tl.reshape(words, [BLOCK_V])


@triton.jit
def gumbel_row(seed, position, BLOCK_V: tl.constexpr):
    """Gumbel noise of codes 0 … BLOCK_V - 1, fp32."""
    cells = (code_bits_row(seed, position, BLOCK_V) >> 9).to(tl.int32).to(tl.float32)
    return -tl.log(-tl.log((cells + 0.5) * 1.1920928955078125e-07))  # 2^-23
