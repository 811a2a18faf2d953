"""Random numbers of one optimizer step: each sample its own, whatever the ranks and micro-batches.

A number is a function of (seed, step, name, position in the batch), so one rank with a batch of 2 B
draws what two ranks with B each draw, and a resumed run what the uninterrupted one would have.
`uniform` costs the whole batch's numbers on every rank, which suits few a sample; `normal` its own.
"""

import zlib

import torch
from torch import Tensor

from dar_fast.sampling import image_noise
from dar_train.data import derived_seed

UNIFORM, NORMAL, MODULE = 7, 8, 1  # streams of a seed
KEYS = 2**62  # of the normal stream, below the largest int64 whatever is added


class Draws:
    """The numbers of the samples at `positions` `[b]` int64, on the host, of a batch of `total`."""

    def __init__(
        self, seed: int, step: int, total: int, positions: Tensor, device: torch.device
    ) -> None:
        self.seed = seed
        self.step = step
        self.total = total
        self.positions = positions
        self.device = device

    def take(self, rows: Tensor) -> "Draws":
        """Those of some samples, by their rows `[n]` int64 on the host."""
        return Draws(self.seed, self.step, self.total, self.positions[rows], self.device)

    def whole(self) -> "Draws":
        """Those of the whole batch, the other ranks' samples included."""
        return Draws(self.seed, self.step, self.total, torch.arange(self.total), self.device)

    def host_uniform(self, name: str, *shape: int) -> Tensor:
        """Uniform in [0, 1), `[b, *shape]` fp32, on the host; the same at each call of one name."""
        key = derived_seed(self.seed, UNIFORM, self.step, zlib.crc32(name.encode()))
        generator = torch.Generator().manual_seed(key)
        return torch.rand(self.total, *shape, generator=generator)[self.positions]

    def uniform(self, name: str, *shape: int) -> Tensor:
        """`host_uniform` on the device, copied without waiting for it."""
        drawn = self.host_uniform(name, *shape)
        if self.device.type == "cuda":
            drawn = drawn.pin_memory()
        return drawn.to(self.device, non_blocking=True)

    def normal(self, name: str, *shape: int) -> Tensor:
        """Standard normal, `[b, *shape]` fp32, drawn on the device."""
        key = derived_seed(self.seed, NORMAL, self.step, zlib.crc32(name.encode())) % KEYS
        keys = self.positions + key
        if self.device.type == "cuda":
            keys = keys.pin_memory()
        return image_noise(keys.to(self.device, non_blocking=True), shape)

    def seed_module(self, rank: int) -> None:
        """Seed what modules draw by themselves, dropout, for this step's piece on this rank."""
        first = int(self.positions[0]) if len(self.positions) else 0
        torch.manual_seed(derived_seed(self.seed, MODULE, self.step, rank, first))
