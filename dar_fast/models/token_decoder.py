"""Codes to condition tokens: c = LN(blocks(embedding + position)), causal, so groups can stream.

24 N D^2 FLOPs a block. Source: arXiv 2505.23660, §3.1.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from dar_fast.config import TokenizerConfig
from dar_fast.models.layers import NORM_EPS, GatedBlock
from dar_kernels import layer_norm


class TokenCache(NamedTuple):
    """Keys and values of every layer, each `[layers, B, H, N, Dh]`; `extend` writes them."""

    keys: Tensor
    values: Tensor


class TokenDecoder(nn.Module):
    """`[B, N, D]` embedded codes to `[B, N, D]` conditions; `extend` does it group by group."""

    def __init__(self, config: TokenizerConfig, gate_init: float = 0.0) -> None:
        super().__init__()
        self.num_tokens = config.num_tokens
        self.position_embedding = nn.Embedding(config.query_table, config.decoder_dim)
        self.layers = nn.ModuleList(
            GatedBlock(config.decoder_dim, config.head_dim, gate_init)
            for _ in range(config.decoder_depth)
        )

    def forward(
        self,
        x: Tensor,
        cache: TokenCache | None = None,
        positions: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> Tensor:
        """Conditions `[B, n, D]` of the first n embedded codes `x` `[B, n, D]`.

        Args:
            cache, positions: `x` are those at `positions` `[n]` int64 instead, and go behind the
                others in `cache`, as `extend` has it, by a graph of one shape.
            columns: `[m B, Q]` int64, the conditions wanted, without a cache: row i those of
                picture i mod B; the result is `[m B, Q, D]`.
        """
        table = self.position_embedding.weight
        if cache is None or positions is None:
            x = x + table[: x.shape[1]]
            last = len(self.layers) - 1
            for i, layer in enumerate(self.layers):
                x = layer(x, prefix=0, wanted=columns if i == last else None)
        else:
            x = x + table[positions]
            for layer, keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
                x = cast(GatedBlock, layer).extend_at(x, keys, values, positions)
        return layer_norm(x, eps=NORM_EPS)

    def cache(self, batch: int) -> TokenCache:
        """An empty cache for `batch` pictures of up to N tokens."""
        layer = cast(GatedBlock, self.layers[0]).attention
        D, Dh = layer.k.in_features, layer.head_dim
        shape = len(self.layers), batch, D // Dh, self.num_tokens, Dh
        return TokenCache(layer.k.weight.new_zeros(shape), layer.v.weight.new_zeros(shape))

    def extend(self, x: Tensor, cache: TokenCache, past: int, rows: Tensor | None = None) -> Tensor:
        """Conditions `[B, n, D]` of the n embedded codes `x` behind `past` others in `cache`.

        `rows`: int64 `[B]`, each picture's row of the cache; None: the first B, in order.
        """
        end = past + x.shape[1]
        if self._compiled_call_impl is not None and rows is None and len(x) == cache.keys.shape[1]:
            conditions: Tensor = self(x, cache, torch.arange(past, end, device=x.device))
            return conditions
        x = x + self.position_embedding.weight[past:end]
        for layer, keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
            x = cast(GatedBlock, layer).extend(x, keys, values, past, rows)
        return layer_norm(x, eps=NORM_EPS)
