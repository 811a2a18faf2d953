"""Small decoders and their pages for the tests of the native decode step."""

from typing import NamedTuple

import torch
from torch import Tensor

from dar_kernels.decode_step import decode_step_ref
from dar_kernels.decoder_weights import (
    DecoderPages,
    DecoderWeights,
    LayerWeights,
    Weight,
    new_decoder_pages,
)
from dar_kernels.linear_decode import plain
from dar_kernels.pages import LARGEST_CODE, dequantise, quantise


class Shape(NamedTuple):
    layers: int = 2
    D: int = 96
    heads: int = 4
    kv_heads: int = 2
    F: int = 200
    V: int = 77
    N: int = 80


ODD = Shape()
PLAIN = Shape(D=64, heads=2, kv_heads=2, F=128, V=64)
WIDE_HEADS = Shape(layers=1, D=200, heads=2, kv_heads=1, F=70, V=33)  # Dh = 100, as prior 3B
TINY_HEADS = Shape(D=36, heads=6, kv_heads=3, F=35, V=9)  # Dh = 6
PRIOR_L = Shape(layers=1, D=1024, heads=16, kv_heads=16, F=2816, V=1000)


def make_weights(shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0) -> DecoderWeights:
    """Random weights that keep activations near one."""
    generator = torch.Generator().manual_seed(seed)
    L, D, H, Hkv, F, V, N = shape
    Dh = D // H

    def normal(*size: int, std: float | None = None) -> Tensor:
        x = torch.randn(*size, generator=generator)
        return (x * (size[-1] ** -0.5 if std is None else std)).to(dtype)

    def norm() -> Tensor:
        return 1 + normal(D, std=0.1)

    layers = [
        LayerWeights(
            norm(), normal((H + 2 * Hkv) * Dh, D), normal(D, H * Dh),
            norm(), normal(F, D), normal(F, D), normal(D, F),
        )
        for _ in range(L)
    ]  # fmt: skip
    angles = torch.arange(N)[:, None] * 10_000 ** (-torch.arange(0, Dh, 2) / Dh)
    return DecoderWeights(
        layers, norm(), normal(V, D), normal(V, D, std=1.0), angles.cos(), angles.sin(), H, Hkv
    )


def widen(weights: DecoderWeights, dtype: torch.dtype = torch.float64) -> DecoderWeights:
    return weights.map(lambda t: t.to(dtype))


def dequantized(weights: DecoderWeights) -> DecoderWeights:
    """What quantised weights stand for, in fp64."""

    def read(weight: Weight) -> Tensor:
        return plain(weight, torch.float64)

    layers = [layer.map_products(read) for layer in weights.layers]
    return widen(weights._replace(layers=layers, head=read(weights.head)))


def make_pages(
    weights: DecoderWeights, rows: int, dtype: torch.dtype, seed: int = 0
) -> tuple[DecoderPages, Tensor]:
    """Pages of random keys and values, more than needed, and a shuffled table `[rows, P]`."""
    generator = torch.Generator().manual_seed(seed)
    per_row = -(-len(weights.cos) // 32)
    pages = new_decoder_pages(weights, rows * per_row + 3, dtype)
    for tensor, scales in ((pages.keys, pages.key_scales), (pages.values, pages.value_scales)):
        x = torch.randn(tensor.shape, generator=generator)
        if scales is not None:
            x, new = quantise(x, dtype)
            scales.copy_(new)
        tensor.copy_(x)
    order = torch.randperm(rows * per_row + 3, generator=generator)[: rows * per_row]
    return pages, order.view(rows, per_row).to(torch.int32)


def clone(
    pages: DecoderPages, dtype: torch.dtype | None = None, device: str | None = None
) -> DecoderPages:
    """A copy; in another dtype without scales."""
    if dtype is not None and dtype not in LARGEST_CODE:
        pages = DecoderPages(
            dequantise(pages.keys, pages.key_scales, dtype),
            dequantise(pages.values, pages.value_scales, dtype),
        )
    return DecoderPages(*(None if p is None else p.to(device, copy=True) for p in pages))


def reference(
    weights: DecoderWeights, x: Tensor, pages: DecoderPages, table: Tensor, positions: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, DecoderPages]:  # fmt: skip
    """Logits, and pages after the step, all in `dtype`."""
    own = clone(pages, dtype)
    wide = widen(weights, dtype)
    return decode_step_ref(wide, x.to(dtype), own, table, positions), own


class Settings(NamedTuple):
    """What `run` needs beside inputs and pages, for B requests and n steps."""

    seeds: Tensor
    guidance: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor

    def rows(self, index: Tensor | slice) -> "Settings":
        return Settings(*(t[index].contiguous() for t in self))

    def steps(self, first: int, last: int) -> "Settings":
        return self._replace(guidance=self.guidance[:, first:last].contiguous())


def make_settings(B: int, n: int, seed: int = 0) -> Settings:
    """Requests that differ in everything; scales on both sides of 1, some greedy."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator)

    return Settings(
        seeds=torch.randint(0, 2**63 - 1, (B,), generator=generator),
        guidance=0.5 + 4 * uniform(B, n),
        temperature=torch.where(uniform(B) < 0.3, 0.0, 0.5 + uniform(B)),
        top_k=torch.randint(0, 20, (B,), generator=generator, dtype=torch.int32),
        top_p=torch.where(uniform(B) < 0.5, 1.0, 0.2 + 0.7 * uniform(B)),
    )
