"""Scalars summed on the device, and read without making the device wait.

A log line copies a few numbers to pinned memory and goes on; they are read one or more steps later,
when the copy is over. On a CPU that is at once.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Reading(NamedTuple):
    """Numbers on their way to the host."""

    step: int
    names: tuple[str, ...]
    values: Tensor  # on the host
    copied: torch.cuda.Event | None
    notes: dict[str, float]  # numbers that are on the host already

    @property
    def ready(self) -> bool:
        """Whether reading would not wait."""
        return self.copied is None or self.copied.query()  # type: ignore[no-untyped-call]

    def numbers(self) -> dict[str, float]:
        """All numbers; waits for the copy."""
        if self.copied is not None:
            self.copied.synchronize()
        return {**dict(zip(self.names, self.values.tolist(), strict=True)), **self.notes}


def to_host(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy on the host, and when it is there: None where it is there at once."""
    if values.device.type != "cuda":
        return values.detach().clone(), None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values.detach(), non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record()
    return host, copied


class Meter:
    """Sums of the steps since the last log line."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self.counted = 0

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Count one step's numbers, each a detached scalar."""
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self.counted += 1

    def means(self) -> tuple[tuple[str, ...], Tensor]:
        """Names, and the means `[names]` fp32 on the device; counting starts anew.

        Raises:
            ValueError: where nothing was counted.
        """
        if not self.counted:
            raise ValueError("Meter: expected at least one step, got none")
        names = tuple(self._sums)
        device = max((v.device for v in self._sums.values()), key=lambda d: d.type == "cuda")
        means = torch.stack([v.to(device) for v in self._sums.values()]) / self.counted
        self._sums, self.counted = {}, 0
        return names, means
