"""What encoder, token decoder and pixel DiT share: norms, rotary tables, attention, MLP.

LN(x) = (x - mean) / sqrt(var + 1e-6); attention is softmax(q k^T / sqrt(Dh)) v with a LayerNorm on
each head of q and k before the rotation. A block costs 24 N D^2 + 4 N^2 D FLOPs over N tokens.
Source: arXiv 2505.23660, §3.1; RoPE from Su et al. (2021), interleaved pairs.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dar_kernels import (
    Activation,
    Fp8Weight,
    PackedWeight,
    fp8_weight,
    layer_norm,
    linear,
    normed_attention,
    pack_weight,
    packs,
)

ProductDtype = Literal["as given", "fp8"]
NORM_EPS = 1e-6
ROPE_BASE = 10_000.0


class Linear(nn.Linear):
    """nn.Linear that can keep its weight in the order of a CPU's bf16 products, or in fp8."""

    packed: PackedWeight | Fp8Weight | None = None

    @property
    def operand(self) -> Tensor | PackedWeight | Fp8Weight:
        """The weight as the ops take it: packed where it is and no gradients are asked for.

        A compiler that traces takes the weight itself: oneDNN's order is opaque to it.
        """
        packed = None if torch.is_grad_enabled() else self.packed
        if isinstance(packed, PackedWeight) and torch.compiler.is_compiling():
            packed = None
        return self.weight if packed is None else packed

    def forward(self, x: Tensor, activation: Activation = "none") -> Tensor:
        return linear(x, self.operand, self.bias, activation)

    def pack(self, dtype: ProductDtype = "as given") -> None:
        """Keep a reordered copy, as large as the weight, where products read it faster; or in fp8.

        Training, loading and moving the module drop it; after any other change of the weight, pack
        again.

        Raises:
            ValueError: for another dtype; where fp8 does not take a size or a value of the weight.
            UnavailableError: where the device has no fp8 products.
        """
        if dtype not in get_args(ProductDtype):
            raise ValueError(f"pack: expected dtype 'as given' or 'fp8', got {dtype!r}")
        if dtype == "fp8":
            self.packed = fp8_weight(self.weight)
        else:
            self.packed = pack_weight(self.weight) if packs(self.weight) else None

    def train(self, mode: bool = True) -> "Linear":
        if mode:
            self.packed = None
        return super().train(mode)

    def _apply(self, *args: Any, **options: Any) -> "Linear":
        self.packed = None
        return super()._apply(*args, **options)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        self.packed = None
        super()._load_from_state_dict(*args, **options)


def pack(module: nn.Module, dtype: ProductDtype = "as given") -> None:
    """Pack every `Linear` within `module`: as given where it pays, bf16 on a CPU; or all in fp8.

    For sampling only.

    Raises:
        ValueError, UnavailableError: as `Linear.pack`.
    """
    for part in module.modules():
        if isinstance(part, Linear):
            part.pack(dtype)


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


def rows_at(x: Tensor, columns: Tensor) -> Tensor:
    """`[m B, Q, D]`: of `x` `[B, N, D]`, row i of `columns` `[m B, Q]` int64 in picture i mod B."""
    x = x.repeat(len(columns) // len(x), 1, 1)
    return x.gather(1, columns[..., None].expand(-1, -1, x.shape[-1]))


class Attention(nn.Module):
    """Multi-head attention with per-head LayerNorm on q and k before the rotation.

    Keys and values come from `context` where one is given (then only q is rotated), else from x.
    """

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q = Linear(dim, dim)
        self.k = Linear(dim, dim)
        self.v = Linear(dim, dim)
        self.proj = Linear(dim, dim)
        self.q_norm = nn.LayerNorm(head_dim, eps=NORM_EPS)
        self.k_norm = nn.LayerNorm(head_dim, eps=NORM_EPS)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_dim)  # [B, N, H, Dh]

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, H, N, Dh]` of `context` `[B, N, D]`, the keys normed, unrotated."""
        norm = self.k_norm
        keys = layer_norm(self._heads(self.k(context)), norm.weight, norm.bias, NORM_EPS)
        return keys.transpose(1, 2), self._heads(self.v(context)).transpose(1, 2)

    def attend(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention of `x` `[B, N, D]` over ready keys and values; `mask`: where a query looks."""
        norm = self.q_norm
        q = layer_norm(self._heads(self.q(x)), norm.weight, norm.bias, NORM_EPS).transpose(1, 2)
        y = F.scaled_dot_product_attention(
            q.to(values.dtype), keys.to(values.dtype), values, attn_mask=mask
        )
        return self.proj(y.transpose(1, 2).flatten(2))

    def forward(
        self,
        x: Tensor,
        tables: tuple[Tensor, Tensor] | None = None,
        prefix: int | None = None,
        wanted: int | Tensor | None = None,
    ) -> Tensor:
        queries = x[:, -wanted:] if isinstance(wanted, int) else x
        y = normed_attention(
            self.q(queries), self.k(x), self.v(x),
            self.q_norm.weight, self.q_norm.bias, self.k_norm.weight, self.k_norm.bias,
            *(tables or (None, None)), prefix=prefix,
        )  # fmt: skip
        return self.proj(rows_at(y, wanted) if isinstance(wanted, Tensor) else y)


class MLP(nn.Module):
    """fc2(silu(fc1 x)), four times the width inside."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, 4 * dim)
        self.fc2 = Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x, "silu"))


class GatedBlock(nn.Module):
    """x += gate1 · attention(LN1 x); x += gate2 · mlp(LN2 x): block of encoder and token decoder.

    `gate_init` is the start of both gate vectors: zero as published; 0.1 leaves the start faster.
    """

    dynamic = True  # how to compile it: a training pass has as many tokens as its draws need

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
        prefix: int | None = None,
        wanted: int | Tensor | None = None,
    ) -> Tensor:
        """The token at position i sees those before max(prefix, i + 1); None: all.

        `wanted`: what to return, for a last layer: the last so many tokens, or `rows_at` these
        columns. The others are then keys and values only.
        """
        y = self.attention(self._norm(self.norm1, x), tables, prefix, wanted)
        if wanted is not None:
            x = x[:, -wanted:] if isinstance(wanted, int) else rows_at(x, wanted)
        x = x + self.gate1 * y
        return x + self.gate2 * self.mlp(self._norm(self.norm2, x))

    @staticmethod
    def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
        return layer_norm(x, norm.weight, norm.bias, NORM_EPS)

    def extend(
        self, x: Tensor, keys: Tensor, values: Tensor, past: int, rows: Tensor | None = None
    ) -> Tensor:
        """Causal pass of the tokens `x` `[B, n, D]` at positions past … past + n - 1.

        Args:
            keys, values: `[R, H, N, Dh]`: read before `past`, written at those positions.
            past: a constant of a captured graph.
            rows: int64 `[B]`, the row of `keys` and `values` that each picture has; None: row b.
        """
        normed = self._norm(self.norm1, x)
        n, end = x.shape[1], past + x.shape[1]
        seen = []
        for cache, new in zip((keys, values), self.attention.keys_values(normed), strict=True):
            cache = cache[:, :, :end]
            if rows is None:
                cache[: len(x), :, past:] = new
                seen.append(cache[: len(x)])
            else:
                cache[:, :, past:].index_copy_(0, rows, new)
                seen.append(cache.index_select(0, rows))
        mask = torch.ones(n, end, dtype=torch.bool, device=x.device).tril(past)
        return self._attended(x, normed, seen[0], seen[1], mask)

    def extend_at(self, x: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        """The same at `positions` `[n]` int64, with no shape that depends on them: one graph.

        All N positions of `keys` and `values` `[B, H, N, Dh]` are read under a mask: finite ones.
        """
        normed = self._norm(self.norm1, x)
        for cache, new in zip((keys, values), self.attention.keys_values(normed), strict=True):
            cache.index_copy_(2, positions, new)
        mask = torch.arange(keys.shape[2], device=x.device) <= positions[:, None]
        return self._attended(x, normed, keys, values, mask)

    def _attended(
        self, x: Tensor, normed: Tensor, keys: Tensor, values: Tensor, mask: Tensor
    ) -> Tensor:
        x = x + self.gate1 * self.attention.attend(normed, keys, values, mask=mask)
        return x + self.gate2 * self.mlp(self._norm(self.norm2, x))
