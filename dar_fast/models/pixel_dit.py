"""The pixel DiT: velocity v(x_t, t, c_g) of one group's conditions, over P x P pixel patches.

    s = cross_attention(LN x, cond_embed(c))
    shift, scale, gate (twice) = W silu(time + s), each patch its own
    x += gate_a self_attention(LN(x)(1 + scale_a) + shift_a)
    x += gate_m mlp(LN(x)(1 + scale_m) + shift_m)

An engine keeps two constants, `times` and `conditions`, the first for every solver step there is,
the second for the steps that read one group; `forward` leaves both to the blocks.
Compute bound: 40 D^2 FLOPs a patch and block beside attention. Source: arXiv 2505.23660, §3.2.
"""

import math
from collections.abc import Iterable, Iterator
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dar_fast.config import PixelDiTConfig
from dar_fast.models.layers import (
    MLP,
    NORM_EPS,
    Attention,
    Linear,
    ProductDtype,
    Rotary,
    grid_angles,
    pack,
)
from dar_kernels import (
    absorb_output,
    adaln_cross_attention,
    adaln_modulate,
    gate_residual_modulate,
    layer_norm,
)

TIME_PERIOD = 10_000.0
TIME_SCALE = 1000.0
REPA_GRID, REPA_HIDDEN, REPA_DIM = 16, 2048, 768


class BlockCondition(NamedTuple):
    """What a block reads of a group's condition tokens."""

    keys: Tensor  # [B, H, Q, Dh], normed
    values_out: Tensor  # [B, H, Q, D], the output projection absorbed


class Velocity(NamedTuple):
    tokens: Tensor  # [B, patches, 3 P P], as the network writes it and `flow_step` reads it
    alignment: Tensor | None  # [B, 256, 768], the REPA head's output where it was asked for

    @property
    def velocity(self) -> Tensor:
        """The same as pictures, `[B, 3, R, R]`: a copy."""
        return unpatchify(self.tokens)


def unpatchify(x: Tensor) -> Tensor:
    """`[B, patches, 3 P P]`, channels in the order (c, p1, p2), to `[B, 3, R, R]`."""
    B, patches, channels = x.shape
    G, P = math.isqrt(patches), math.isqrt(channels // 3)
    return x.reshape(B, G, G, 3, P, P).permute(0, 3, 1, 4, 2, 5).reshape(B, 3, G * P, G * P)


def time_features(t: Tensor, channels: int) -> Tensor:
    """Sinusoid `[B, channels]` fp32 of times `[B]` in [0, 1]: cosine half, then sine half."""
    half = channels // 2
    frequency = torch.exp(
        -math.log(TIME_PERIOD) / half * torch.arange(half, dtype=torch.float32, device=t.device)
    )
    angles = TIME_SCALE * t.float()[:, None] * frequency
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class DiTBlock(nn.Module):
    """One block of width D; its modulation is a function of time, patch and condition."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.attention = Attention(dim, head_dim)
        self.cross_attention = Attention(dim, head_dim)
        self.mlp = MLP(dim)
        self.modulation = Linear(dim, 6 * dim)
        self.time_embed = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.cond_embed = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def condition(self, cond: Tensor) -> BlockCondition:
        """What this block reads of a group's normed tokens `[B, Q, D]`."""
        cross = self.cross_attention
        keys, values = cross.keys_values(layer_norm(self.cond_embed(cond), eps=NORM_EPS))
        return BlockCondition(keys, absorb_output(values, cross.proj.weight))

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        condition: BlockCondition | Tensor,
        tables: tuple[Tensor, Tensor],
    ) -> Tensor:
        """The block at `x` `[B, patches, D]`.

        `time` and `condition` are what an engine keeps; or what they are made of, the sinusoid of
        the times and the group's normed tokens: all the block's parameters are then used here.
        """
        if isinstance(condition, Tensor):
            time, condition = self.time_embed(time), self.condition(condition)
        cross = self.cross_attention
        features = adaln_cross_attention(
            x, cross.q.operand, cross.q.bias, cross.q_norm.weight, cross.q_norm.bias,
            condition.keys, condition.values_out, cross.proj.bias, time, *tables,
        )  # fmt: skip
        m = adaln_modulate(x, features, self.modulation.operand, self.modulation.bias)
        y = self.attention(m.modulated, tables)
        x, normed = gate_residual_modulate(x, y, m.gate_a, m.shift_m, m.scale_m)
        return torch.addcmul(x, m.gate_m, self.mlp(normed).to(x.dtype))


class PixelDiT(nn.Module):
    """Velocity of flow matching on pixels, `[B, 3, R, R]`, from one group of condition tokens."""

    def __init__(self, config: PixelDiTConfig, cond_dim: int, image_size: int) -> None:
        super().__init__()
        D, P = config.dim, config.patch_size
        self.patch_size, self.grid, self.repa_layer = P, image_size // P, config.repa_layer
        self.cond_mlp = nn.Linear(cond_dim, D)
        self.conv_in = Linear(3 * P * P, D)
        self.conv_out = Linear(D, 3 * P * P)
        self.blocks = nn.ModuleList(DiTBlock(D, config.head_dim) for _ in range(config.depth))
        self.rotary = Rotary(partial(grid_angles, self.grid, self.grid, config.head_dim, 0))
        if config.repa_layer is not None:
            self.repa_out = nn.Sequential(
                nn.Linear(D, REPA_HIDDEN), nn.SiLU(),
                nn.Linear(REPA_HIDDEN, REPA_HIDDEN), nn.SiLU(),
                nn.Linear(REPA_HIDDEN, REPA_DIM),
            )  # fmt: skip

    def pack(self, dtype: ProductDtype = "as given") -> None:
        """`layers.pack` of all products; "fp8": of the large ones, 18/19 of a block's 38 D^2 FLOPs.

        These read every patch: self attention, MLP and modulation. The others, first and last layer
        and cross attention, are packed as given.

        Raises:
            ValueError, UnavailableError: as `Linear.pack`.
        """
        pack(self)
        if dtype == "as given":
            return
        for module in self.blocks:
            block = cast(DiTBlock, module)
            for part in (block.attention, block.mlp, block.modulation):
                pack(part, dtype)

    def patchify(self, x: Tensor) -> Tensor:
        """`[B, 3, R, R]` to `[B, patches, 3 P P]`, channels in the order (c, p1, p2)."""
        P, G = self.patch_size, self.grid
        x = x.reshape(len(x), 3, G, P, G, P).permute(0, 2, 4, 1, 3, 5)
        return x.reshape(len(x), G * G, 3 * P * P)

    def align(self, x: Tensor) -> Tensor:
        """The REPA head: patches average-pooled to 16 x 16, then projected, `[B, 256, 768]`."""
        pooled = F.adaptive_avg_pool2d(
            x.transpose(1, 2).reshape(len(x), -1, self.grid, self.grid), REPA_GRID
        )
        return self.repa_out(pooled.flatten(2).transpose(1, 2))

    def _features(self, t: Tensor) -> Tensor:
        weight = self.cond_mlp.weight
        return time_features(t, len(weight)).to(weight.dtype)

    def _normed(self, cond: Tensor) -> Tensor:
        return layer_norm(self.cond_mlp(cond), eps=NORM_EPS)

    def times(self, t: Tensor) -> Iterator[Tensor]:
        """Every block's embedding `[B, D]` of times `t` `[B]` in [0, 1], one after the other."""
        features = self._features(t)
        return (cast(DiTBlock, block).time_embed(features) for block in self.blocks)

    def conditions(self, cond: Tensor) -> Iterator[BlockCondition]:
        """What every block reads of one group's tokens `[B, Q, D]`, one after the other.

        Who keeps none holds one block's at a time, H Q (D + Dh) numbers a picture.
        """
        cond = self._normed(cond)
        return (cast(DiTBlock, block).condition(cond) for block in self.blocks)

    def velocity(
        self,
        x: Tensor,
        times: Iterable[Tensor],
        conditions: Iterable[BlockCondition | Tensor],
        *,
        align: bool = False,
    ) -> Velocity:
        """Velocity at `x` `[B, 3, R, R]`, of one entry a block of `times` and `conditions`."""
        tables = self.rotary.tables(x.device)
        x = self.conv_in(self.patchify(x))
        alignment = None
        for i, (block, time, condition) in enumerate(
            zip(self.blocks, times, conditions, strict=True)
        ):
            if align and i == self.repa_layer:
                alignment = self.align(x)
            x = block(x, time, condition, tables)
        return Velocity(self.conv_out(layer_norm(x, eps=NORM_EPS)), alignment)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor, *, align: bool = False) -> Velocity:
        """Velocity at noisy images `x` `[B, 3, R, R]`, times `t` `[B]`, conditions `[B, Q, D]`."""
        times, conditions = [self._features(t)], [self._normed(cond)]
        depth = len(self.blocks)
        return self.velocity(x, times * depth, conditions * depth, align=align)
