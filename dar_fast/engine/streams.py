"""Order of work on the device: a stream a lane, one more for what leaves; nothing on a CPU.

On a CPU work is done when a call returns, so every mark is passed at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Mark:
    """A point in a stream's work."""

    def __init__(self, event: "torch.cuda.Event | None" = None) -> None:
        self._event = event

    def wait(self) -> None:
        """Hold this thread until the device has passed it."""
        if self._event is not None:
            self._event.synchronize()

    def hold(self, stream: "torch.cuda.Stream | None") -> None:
        """Hold a stream until then, not this thread."""
        if self._event is not None and stream is not None:
            stream.wait_event(self._event)


class Shipment:
    """Tensors on their way to the CPU."""

    def __init__(self, tensors: list[Tensor], mark: Mark) -> None:
        self._tensors, self._mark = tensors, mark

    def unpack(self) -> list[Tensor]:
        """They, on the CPU, once they have come."""
        self._mark.wait()
        return self._tensors


def own(tensor: Tensor) -> Tensor:
    """A copy on the CPU, made by the calling thread alone: a clone would wake a team of threads,
    and slow those of the lanes."""
    return torch.from_numpy(tensor.numpy().copy())


class Streams:
    """The streams of one engine: `tokens`, `diffusion` and `copies`; None each on a CPU."""

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self.device = device
        self.tokens, self.diffusion, self.copies = (
            torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]
            for _ in range(3)
        )

    @contextmanager
    def on(self, stream: "torch.cuda.Stream | None") -> Iterator[None]:
        """Work within goes to `stream`."""
        if stream is None:
            yield
            return
        with torch.cuda.stream(stream):
            yield

    def mark(self, stream: "torch.cuda.Stream | None") -> Mark:
        """The end of what a stream was given so far."""
        if stream is None:
            return Mark()
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(stream)
        return Mark(event)

    def ship(self, tensors: list[Tensor], stream: "torch.cuda.Stream | None") -> Shipment:
        """Copy what `stream` computed to pinned memory, on the stream of copies.

        On a CPU the tensors themselves: the caller does not write to them again.
        """
        if self.copies is None:
            return Shipment(tensors, Mark())
        self.mark(stream).hold(self.copies)
        arrived = []
        with torch.cuda.stream(self.copies):
            for tensor in tensors:
                there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                there.copy_(tensor, non_blocking=True)
                tensor.record_stream(self.copies)
                arrived.append(there)
        return Shipment(arrived, self.mark(self.copies))


__all__ = ["Mark", "Shipment", "Streams", "own"]
