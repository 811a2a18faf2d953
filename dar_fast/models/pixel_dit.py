"""The pixel DiT: velocity v(x_t, t, c_g) of one group's conditions, over P x P pixel patches.

    s = cross_attention(LN x, cond_embed(c))
    shift, scale, gate (twice) = W silu(time + s), each patch its own
    x += gate_a self_attention(LN(x)(1 + scale_a) + shift_a)
    x += gate_m mlp(LN(x)(1 + scale_m) + shift_m)

Compute bound: 40 D^2 FLOPs a patch and block beside attention. Source: arXiv 2505.23660, §3.2.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dar_fast.config import PixelDiTConfig
from dar_fast.models.layers import MLP, Attention, Rotary, grid_angles, layer_norm

TIME_PERIOD = 10_000.0
TIME_SCALE = 1000.0
REPA_GRID, REPA_HIDDEN, REPA_DIM = 16, 2048, 768


class Modulation(NamedTuple):
    shift: Tensor
    scale: Tensor
    gate: Tensor


class Velocity(NamedTuple):
    velocity: Tensor  # [B, 3, R, R]
    alignment: Tensor | None  # [B, 256, 768], the REPA head's output where it was asked for


def time_features(t: Tensor, channels: int) -> Tensor:
    """Sinusoid `[B, channels]` fp32 of times `[B]` in [0, 1]: cosine half, then sine half."""
    half = channels // 2
    frequency = torch.exp(
        -math.log(TIME_PERIOD) / half * torch.arange(half, dtype=torch.float32, device=t.device)
    )
    angles = TIME_SCALE * t.float()[:, None] * frequency
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def modulate(x: Tensor, m: Modulation) -> Tensor:
    """LN(x)(1 + scale) + shift."""
    return layer_norm(x) * (1 + m.scale) + m.shift


class DiTBlock(nn.Module):
    """One block of width D; its modulation is a function of time, patch and condition."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.attention = Attention(dim, head_dim)
        self.cross_attention = Attention(dim, head_dim)
        self.mlp = MLP(dim)
        self.modulation = nn.Linear(dim, 6 * dim)
        self.time_embed = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.cond_embed = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def modulations(
        self, x: Tensor, features: Tensor, cond: Tensor, tables: tuple[Tensor, Tensor]
    ) -> tuple[Modulation, Modulation]:
        """Modulations of the attention and of the MLP branch, each `[B, P, D]` three times."""
        keys, values = self.cross_attention.keys_values(layer_norm(self.cond_embed(cond)))
        s = self.cross_attention.attend(layer_norm(x), keys, values, tables)
        m = self.modulation(F.silu(self.time_embed(features)[:, None] + s)).chunk(6, dim=-1)
        return Modulation(*m[:3]), Modulation(*m[3:])

    def forward(
        self, x: Tensor, features: Tensor, cond: Tensor, tables: tuple[Tensor, Tensor]
    ) -> Tensor:
        attention, mlp = self.modulations(x, features, cond, tables)
        x = x + attention.gate * self.attention(modulate(x, attention), tables)
        return x + mlp.gate * self.mlp(modulate(x, mlp))


class PixelDiT(nn.Module):
    """Velocity of flow matching on pixels, `[B, 3, R, R]`, from one group of condition tokens."""

    def __init__(self, config: PixelDiTConfig, cond_dim: int, image_size: int) -> None:
        super().__init__()
        D, P = config.dim, config.patch_size
        self.patch_size, self.grid, self.repa_layer = P, image_size // P, config.repa_layer
        self.cond_mlp = nn.Linear(cond_dim, D)
        self.conv_in = nn.Linear(3 * P * P, D)
        self.conv_out = nn.Linear(D, 3 * P * P)
        self.blocks = nn.ModuleList(DiTBlock(D, config.head_dim) for _ in range(config.depth))
        self.rotary = Rotary(partial(grid_angles, self.grid, self.grid, config.head_dim, 0))
        if config.repa_layer is not None:
            self.repa_out = nn.Sequential(
                nn.Linear(D, REPA_HIDDEN), nn.SiLU(),
                nn.Linear(REPA_HIDDEN, REPA_HIDDEN), nn.SiLU(),
                nn.Linear(REPA_HIDDEN, REPA_DIM),
            )  # fmt: skip

    def patchify(self, x: Tensor) -> Tensor:
        """`[B, 3, R, R]` to `[B, patches, 3 P P]`, channels in the order (c, p1, p2)."""
        P, G = self.patch_size, self.grid
        x = x.reshape(len(x), 3, G, P, G, P).permute(0, 2, 4, 1, 3, 5)
        return x.reshape(len(x), G * G, 3 * P * P)

    def unpatchify(self, x: Tensor) -> Tensor:
        P, G = self.patch_size, self.grid
        x = x.reshape(len(x), G, G, 3, P, P).permute(0, 3, 1, 4, 2, 5)
        return x.reshape(len(x), 3, G * P, G * P)

    def align(self, x: Tensor) -> Tensor:
        """The REPA head: patches average-pooled to 16 x 16, then projected, `[B, 256, 768]`."""
        pooled = F.adaptive_avg_pool2d(
            x.transpose(1, 2).reshape(len(x), -1, self.grid, self.grid), REPA_GRID
        )
        return self.repa_out(pooled.flatten(2).transpose(1, 2))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor, *, align: bool = False) -> Velocity:
        """Velocity at noisy images `x` `[B, 3, R, R]`, times `t` `[B]`, conditions `[B, Q, D]`."""
        cond = layer_norm(self.cond_mlp(cond))
        features = time_features(t, cond.shape[-1]).to(cond.dtype)
        tables = self.rotary.tables(x.device)
        x = self.conv_in(self.patchify(x))
        alignment = None
        for i, block in enumerate(self.blocks):
            if align and i == self.repa_layer:
                alignment = self.align(x)
            x = block(x, features, cond, tables)
        return Velocity(self.unpatchify(self.conv_out(layer_norm(x))), alignment)
