"""Keys and values of every layer of a prior: 2·layers·Hkv·Dh numbers a row and position.

Two ways to append: `KVCache` grows, and its slices have another length at every position;
`StaticCache` works on all N positions under a mask, so that a compiled step has one shape.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dar_fast.config import PriorConfig


class Seen(NamedTuple):
    """What the queries of a step look at."""

    keys: Tensor  # [R, Hkv, n, Dh]
    values: Tensor  # [R, Hkv, n, Dh]
    mask: Tensor | None  # [queries, n]; None: all, or those before a query where there are several


class KVCache:
    """Keys and values of every layer, `[R, Hkv, N, Dh]`, filled from the left up to `length`."""

    def __init__(self, config: PriorConfig, rows: int, device: torch.device, dtype: torch.dtype):
        shape = (rows, config.key_value_heads, config.num_tokens, config.head_dim)
        self.keys = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.depth)]
        self.values = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.depth)]
        self.length = 0

    def append(self, layer: int, keys: Tensor, values: Tensor) -> Seen:
        """Write `[R, Hkv, n, Dh]` behind `length`; all keys and values so far."""
        n, past = keys.shape[2], self.length
        self.keys[layer][:, :, past : past + n] = keys
        self.values[layer][:, :, past : past + n] = values
        mask = None
        if past and n > 1:
            mask = torch.ones(n, past + n, dtype=torch.bool, device=keys.device).tril(past)
        return Seen(self.keys[layer][:, :, : past + n], self.values[layer][:, :, : past + n], mask)


class StaticCache:
    """The same, one position at a time; that position is a tensor, which no graph specialises on.

    What lies behind it is zero and masked: a step costs the attention of the last one.
    """

    def __init__(self, config: PriorConfig, rows: int, device: torch.device, dtype: torch.dtype):
        shape = (rows, config.key_value_heads, config.num_tokens, config.head_dim)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.depth)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.depth)]
        self.position = torch.zeros(1, dtype=torch.int64, device=device)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> Seen:
        """Write `[R, Hkv, 1, Dh]` at `position`; all N positions and a mask of those so far."""
        self.keys[layer].index_copy_(2, self.position, keys)
        self.values[layer].index_copy_(2, self.position, values)
        places = torch.arange(self.keys[layer].shape[2], device=keys.device)
        return Seen(self.keys[layer], self.values[layer], (places <= self.position)[None])


__all__ = ["KVCache", "Seen", "StaticCache"]
