"""Image to encoder rows: p = LN(patchify image); [p ; queries] through masked blocks; LN(queries).

Patches see all patches and no query; query i sees all patches and the queries up to i.
24 (P + N) D^2 FLOPs a block for P patches. Source: arXiv 2505.23660, §3.1.
"""

from functools import partial

import torch
from torch import Tensor, nn

from dar_fast.config import TokenizerConfig
from dar_fast.models.layers import NORM_EPS, GatedBlock, Rotary, grid_angles
from dar_kernels import layer_norm


class Encoder(nn.Module):
    """`[B, 3, R, R]` in [-1, 1] to `[B, N, D]`: one normalised row a query."""

    def __init__(self, config: TokenizerConfig, gate_init: float = 0.0) -> None:
        super().__init__()
        D, P = config.encoder_dim, config.patch_size
        self.num_tokens = config.num_tokens
        self.grid = config.image_size // P
        self.patchify = nn.Conv2d(3, D, P, stride=P)
        self.query_embedding = nn.Embedding(config.query_table, config.code_dim)
        self.query_linear = nn.Linear(config.code_dim, D)
        self.layers = nn.ModuleList(
            GatedBlock(D, config.head_dim, gate_init) for _ in range(config.encoder_depth)
        )
        self.rotary = Rotary(
            partial(grid_angles, self.grid, self.grid, config.head_dim, config.num_tokens)
        )

    def forward(self, images: Tensor, tokens: int | None = None) -> Tensor:
        """Rows of the first `tokens` queries, or of all N: no query sees a later one."""
        tokens = self.num_tokens if tokens is None else tokens
        patches = layer_norm(
            self.patchify(images).flatten(2).transpose(1, 2), eps=NORM_EPS
        )  # [B, P, D]
        queries = self.query_linear(self.query_embedding.weight[:tokens])  # [n, D]
        queries = queries.to(patches.dtype).expand(len(images), -1, -1)
        x = torch.cat((patches, queries), dim=1)  # [B, P + n, D]
        cos, sin = self.rotary.tables(x.device)
        tables = cos[: x.shape[1]], sin[: x.shape[1]]
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            x = layer(x, tables, prefix=self.grid**2, wanted=tokens if i == last else None)
        return layer_norm(x, eps=NORM_EPS)
