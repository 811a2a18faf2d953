"""Codes to condition tokens: c = LN(blocks(embedding + position)), causal, so groups can stream.

24 N D^2 FLOPs a block. Source: arXiv 2505.23660, §3.1.
"""

from typing import cast

from torch import Tensor, nn

from dar_fast.config import TokenizerConfig
from dar_fast.models.layers import NORM_EPS, GatedBlock
from dar_kernels import layer_norm

TokenCache = list[tuple[Tensor, Tensor]]  # keys and values [B, H, n, Dh] of every layer


class TokenDecoder(nn.Module):
    """`[B, N, D]` embedded codes to `[B, N, D]` conditions; `extend` does it group by group."""

    def __init__(self, config: TokenizerConfig, gate_init: float = 0.0) -> None:
        super().__init__()
        self.position_embedding = nn.Embedding(config.query_table, config.decoder_dim)
        self.layers = nn.ModuleList(
            GatedBlock(config.decoder_dim, config.head_dim, gate_init)
            for _ in range(config.decoder_depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.position_embedding.weight[: x.shape[1]]
        for layer in self.layers:
            x = layer(x, causal=True)
        return layer_norm(x, eps=NORM_EPS)

    def extend(self, x: Tensor, cache: TokenCache | None = None) -> tuple[Tensor, TokenCache]:
        """Conditions `[B, n, D]` of the next n tokens, and the cache grown by them."""
        start = cache[0][0].shape[2] if cache else 0
        x = x + self.position_embedding.weight[start : start + x.shape[1]]
        grown: TokenCache = []
        for i, layer in enumerate(self.layers):
            x, entry = cast(GatedBlock, layer).extend(x, cache[i] if cache else None)
            grown.append(entry)
        return layer_norm(x, eps=NORM_EPS), grown
