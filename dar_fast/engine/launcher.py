"""The diffusion lane's work as graphs: one of each kind and batch size, over buffers of its own."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dar_fast.engine.graphs import Capture, GraphCache, GraphReport


class GraphLauncher:
    """Captures each kind of work once for a bucket of rows, then copies inputs in and replays.

    See `slots.Launcher`. Before it is captured, work runs once with every row the one that pads:
    solver steps change their slots, and a step more would be one too many.

    Args:
        capture: how.
        largest: rows of a batch at most.
        padding: the slot that pads; the first input of all work is the slots, int64 `[B]`.
    """

    def __init__(self, capture: Capture, largest: int, padding: int) -> None:
        self.cache, self.padding = GraphCache(capture, largest), padding
        self._buffers: dict[tuple[str | int, ...], list[Tensor]] = {}

    def size(self, rows: int) -> int:
        return self.cache.bucket_for(rows)

    def __call__(
        self, key: tuple[str | int, ...], work: Callable[..., None], inputs: Sequence[Tensor]
    ) -> None:
        name = " ".join(map(str, key[:-1]))
        bucket = int(key[-1])
        new = key not in self._buffers
        if new:
            self._buffers[key] = [torch.empty_like(x) for x in inputs]
        buffers = self._buffers[key]
        for buffer, x in zip(buffers, inputs, strict=True):
            buffer.copy_(x, non_blocking=True)
        if new:
            buffers[0].fill_(self.padding)
            try:
                self.cache.run(name, bucket, lambda: work(*buffers))
            except Exception:
                del self._buffers[key]  # the next call warms up again
                raise
            buffers[0].copy_(inputs[0], non_blocking=True)
        self.cache.run(name, bucket, lambda: work(*buffers))

    def report(self) -> list[GraphReport]:
        """The graphs captured so far."""
        return self.cache.report()


__all__ = ["GraphLauncher"]
