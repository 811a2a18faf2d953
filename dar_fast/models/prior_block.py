"""A block of the prior: x += W_o attention(RMSNorm x); x += W_2 (silu(W_1 h) * W_3 h).

(2 H + 2 Hkv) D Dh + 3 D F weights, read once a decode step. Source: arXiv 2505.23660, §3.3.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dar_fast.config import PriorConfig
from dar_fast.models.kv_cache import KVCache, StaticCache
from dar_fast.models.quantized import Product
from dar_kernels import NormedResidual, attention, dropout, rms_norm_residual, rope_2d, swiglu

Cache = KVCache | StaticCache


class RMSNorm(nn.Module):
    """The scale of x rsqrt(mean x^2 + eps), which `rms_norm_residual` computes."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor, delta: Tensor | None = None) -> NormedResidual:
        """Norm of the residual stream `x` plus a branch `delta`, and that sum."""
        return rms_norm_residual(x, delta, self.weight, self.eps)


class Dropout(nn.Dropout):
    """nn.Dropout by the op `dropout`, which a CPU has in C++."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p) if self.training else x


class PriorAttention(nn.Module):
    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.key_value_heads
        self.head_dim = config.head_dim
        self.qkv = Product(config.dim, (self.heads + 2 * self.kv_heads) * self.head_dim)
        self.proj = Product(config.dim, config.dim)

    def forward(
        self, x: Tensor, tables: tuple[Tensor, Tensor], cache: Cache | None, layer: int
    ) -> Tensor:
        H, Hkv = self.heads, self.kv_heads
        q, k, v = (
            self.qkv(x)
            .unflatten(-1, (H + 2 * Hkv, self.head_dim))
            .transpose(1, 2)
            .split((H, Hkv, Hkv), dim=1)
        )  # [B, H, n, Dh]
        q, k = rope_2d(q, *tables), rope_2d(k, *tables)
        n, mask = x.shape[1], None
        if cache is not None:
            k, v, mask = cache.append(layer, k, v)
        if cache is None:
            y = attention(q, k, v, prefix=0)
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None and n > 1, enable_gqa=H != Hkv
            )
        return self.proj(y.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate = Product(dim, hidden_dim)
        self.up = Product(dim, hidden_dim)
        self.down = Product(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(swiglu(self.gate(x), self.up(x)))


class PriorBlock(nn.Module):
    def __init__(self, config: PriorConfig, dropout: float) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = PriorAttention(config)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = SwiGLU(config.dim, config.hidden_dim)
        self.dropout = Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        delta: Tensor | None,
        tables: tuple[Tensor, Tensor],
        cache: Cache | None,
        layer: int,
    ) -> tuple[Tensor, Tensor]:
        """The residual stream, and the last branch, which the next norm adds to it."""
        normed, x = self.attention_norm(x, delta)
        delta = self.dropout(self.attention(normed, tables, cache, layer))
        normed, x = self.mlp_norm(x, delta)
        return x, self.dropout(self.mlp(normed))
