"""Order and draws without state: sample position p of a run is the same sample whoever reads it.

A permutation of M indices an epoch, 8·M bytes; a position's draws cost one jump of a generator.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def derived_seed(seed: int, *key: int) -> int:
    """A 63-bit seed that depends on every part of the key: streams need no saved state."""
    state = np.random.SeedSequence([seed, *key]).generate_state(1, np.uint64)
    return int(state[0]) & (2**63 - 1)


def uniforms(seed: int, position: int, count: int, draws: int) -> NDArray[np.float64]:
    """Uniform in [0, 1), `[count, draws]`: those of the positions from `position` on.

    A position's numbers depend on (seed, draws, position) alone.
    """
    words = np.random.PCG64(seed).advance(position * draws).random_raw(count * draws)
    return ((words >> np.uint64(11)).astype(np.float64) * 2.0**-53).reshape(count, draws)


class Order:
    """A shuffled order without state: sample position p belongs to epoch p // count.

    Each epoch is a permutation that depends on (seed, epoch) alone, so a resumed run reads on
    exactly where it stopped, even with another batch size.
    """

    def __init__(self, indices: Tensor, seed: int) -> None:
        if not len(indices):
            raise ValueError("data: expected at least one sample to order, got none")
        self.indices = indices
        self.seed = seed
        self._epochs: dict[int, Tensor] = {}

    def _epoch(self, epoch: int) -> Tensor:
        if epoch not in self._epochs:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, 0, epoch))
            kept = {e: p for e, p in self._epochs.items() if e == epoch - 1}
            permutation = torch.randperm(len(self.indices), generator=generator)
            self._epochs = kept | {epoch: self.indices[permutation]}
        return self._epochs[epoch]

    def take(self, position: int, count: int) -> Tensor:
        """Indices of the `count` samples from global `position` on."""
        parts = []
        while count > 0:
            epoch, offset = divmod(position, len(self.indices))
            part = self._epoch(epoch)[offset : offset + count]
            parts.append(part)
            position += len(part)
            count -= len(part)
        return torch.cat(parts)
