"""What encoder, token decoder and pixel DiT share: norms, rotary tables, attention, MLP.

LN(x) = (x - mean) / sqrt(var + 1e-6); attention is softmax(q k^T / sqrt(Dh)) v with a LayerNorm on
each head of q and k before the rotation. A block costs 24 N D^2 + 4 N^2 D FLOPs over N tokens.
Source: arXiv 2505.23660, §3.1; RoPE from Su et al. (2021), interleaved pairs.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6
ROPE_BASE = 10_000.0


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm over the last dimension without scale or shift."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


def rope_angles(positions: Tensor, dim: int, base: float = ROPE_BASE) -> Tensor:
    """Angles `[N, dim / 2]` in the dtype of `positions` `[N]`: position · base^(-2 i / dim)."""
    exponents = torch.arange(0, dim, 2, dtype=positions.dtype, device=positions.device) / dim
    return positions[:, None] * base**-exponents


def grid_angles(
    rows: int, columns: int, head_dim: int, identity: int, device: torch.device
) -> Tensor:
    """fp64 angles `[rows columns + identity, Dh / 2]`: the row's on half a head, then the column's.

    `identity` unrotated tokens follow the grid.
    """
    half = head_dim // 2
    row = rope_angles(torch.arange(rows, dtype=torch.float64, device=device), half)
    column = rope_angles(torch.arange(columns, dtype=torch.float64, device=device), half)
    shape = (rows, columns, half // 2)
    grid = torch.cat((row[:, None].expand(shape), column[None].expand(shape)), dim=-1)
    return F.pad(grid.flatten(0, 1), (0, 0, 0, identity))


class Rotary:
    """Rotation tables, one a device, made at first use: cos and sin of `[N, Dh / 2]` in fp32.

    They are no buffers: a cast of the model to bf16 must leave the angles alone.
    """

    def __init__(self, angles: Callable[[torch.device], Tensor]) -> None:
        self.angles = angles
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(cos, sin), each `[N, Dh / 2]` fp32 on `device`."""
        if device not in self._tables:
            angles = self.angles(device)
            self._tables[device] = angles.cos().float(), angles.sin().float()
        return self._tables[device]


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the interleaved pairs (0, 1), (2, 3), … of `x` `[..., N, Dh]`; fp32 inside."""
    cos, sin = tables  # [N, Dh / 2]
    even, odd = x.view(*x.shape[:-1], -1, 2).unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Multi-head attention with per-head LayerNorm on q and k before the rotation.

    Keys and values come from `context` where one is given (then only q is rotated), else from x.
    """

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.q_norm = nn.LayerNorm(head_dim, eps=NORM_EPS)
        self.k_norm = nn.LayerNorm(head_dim, eps=NORM_EPS)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)  # [B, H, N, Dh]

    def keys_values(
        self, context: Tensor, tables: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, H, N, Dh]` of `context` `[B, N, D]`."""
        k = self.k_norm(self._heads(self.k(context)))
        if tables is not None:
            k = rotate(k, tables)
        return k, self._heads(self.v(context))

    def attend(
        self,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        tables: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        """Attention of `x` `[B, N, D]` over ready keys and values; `mask`: where a query looks."""
        q = self.q_norm(self._heads(self.q(x)))
        if tables is not None:
            q = rotate(q, tables)
        y = F.scaled_dot_product_attention(
            q.to(values.dtype), keys.to(values.dtype), values, attn_mask=mask, is_causal=causal
        )
        return self.proj(y.transpose(1, 2).flatten(2))

    def forward(
        self,
        x: Tensor,
        tables: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        keys, values = self.keys_values(x, tables)
        return self.attend(x, keys, values, tables, mask, causal)


class MLP(nn.Module):
    """fc2(silu(fc1 x)), four times the width inside."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x)))


class GatedBlock(nn.Module):
    """x += gate1 · attention(LN1 x); x += gate2 · mlp(LN2 x): block of encoder and token decoder.

    `gate_init` is the start of both gate vectors: zero as published; 0.1 leaves the start faster.
    """

    def __init__(self, dim: int, head_dim: int, gate_init: float = 0.0) -> None:
        super().__init__()
        self.gate1 = nn.Parameter(torch.full((dim,), gate_init))
        self.gate2 = nn.Parameter(torch.full((dim,), gate_init))
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attention = Attention(dim, head_dim)
        self.mlp = MLP(dim)

    def forward(
        self,
        x: Tensor,
        tables: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        x = x + self.gate1 * self.attention(self.norm1(x), tables, mask, causal)
        return x + self.gate2 * self.mlp(self.norm2(x))

    def extend(
        self, x: Tensor, cache: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Causal pass of the new tokens `x` `[B, n, D]` behind a cache of keys and values."""
        normed = self.norm1(x)
        keys, values = self.attention.keys_values(normed)
        n = x.shape[1]
        past = 0
        if cache is not None:
            past = cache[0].shape[2]
            keys, values = torch.cat((cache[0], keys), 2), torch.cat((cache[1], values), 2)
        mask = torch.ones(n, past + n, dtype=torch.bool, device=x.device).tril(past)
        x = x + self.gate1 * self.attention.attend(normed, keys, values, mask=mask)
        return x + self.gate2 * self.mlp(self.norm2(x)), (keys, values)
