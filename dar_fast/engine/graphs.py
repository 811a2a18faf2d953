"""Work captured once and replayed: CUDA graphs, their recorded stand-in, and no capture at all.

What is captured is a function without arguments. It reads static buffers, which the caller fills
before a run, and returns tensors, the same ones at every run; doing it twice does what doing it
once does, for it runs once more before it is captured. It reads nothing back to the host and draws
nothing from torch's generators.
A replay costs one launch on the host in place of one an operation, about 4 us each.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch

from dar_fast.engine.tape import record
from dar_kernels.dispatch import UnavailableError

T = TypeVar("T")
DOUBLED, STRIDE = 8, 8  # requests: buckets double up to the first, then grow by the second
_CAPTURING = (
    threading.Lock()
)  # CUDA has one capture in a process: starting one waits for the device


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay(Generic[T]):
    """What was captured.

    Args:
        run: does it, and returns the outputs, which the next run overwrites.
        launches: kernels in it, where they were counted.
        pool_bytes: by which the reserved memory of the device grew, where that is known.
    """

    run: Callable[[], T]
    launches: int | None = None
    pool_bytes: int | None = None


class Capture(Protocol):
    """A way to run the same work many times."""

    def warm_up(self, fn: Callable[[], object]) -> None:
        """Run it once as it is, so that kernels are compiled and libraries set up."""

    def capture(self, fn: Callable[[], T]) -> Replay[T]:
        """Take down what it does; whether it is done now is open."""


class NoCapture:
    """Runs the function itself, each time."""

    def warm_up(self, fn: Callable[[], object]) -> None:
        """Nothing needs it."""

    def capture(self, fn: Callable[[], T]) -> Replay[T]:
        return Replay(run=fn)


class TapeCapture:
    """Stands in for CUDA graphs on any device: operations are recorded, and replayed on the very
    same tensors. Python does not run again, so what was not a static buffer shows; what a CUDA
    graph could not hold raises (see `dar_fast.engine.tape`). Launches are counted."""

    def warm_up(self, fn: Callable[[], object]) -> None:
        fn()

    def capture(self, fn: Callable[[], T]) -> Replay[T]:
        tape, outputs = record(fn)

        def run() -> T:
            tape.replay()
            return outputs

        return Replay(run=run, launches=tape.launches)


class CudaCapture:
    """CUDA graphs of one host thread, which share a memory pool.

    Captured on a stream of its own and replayed on the current one. Graphs of one pool take their
    intermediate tensors from the same memory: they must not run at the same time, so each lane has
    its own capture. While one thread captures, others go on launching, but must not wait for the
    whole device (`torch.cuda.synchronize`).

    Args:
        device: a CUDA device.

    Raises:
        UnavailableError: where there is none.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda" or not torch.cuda.is_available():
            raise UnavailableError(f"CUDA graphs: expected a CUDA device, got {device}")
        self.device = device
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, fn: Callable[[], object]) -> None:
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            fn()
        current.wait_stream(self._stream)

    def capture(self, fn: Callable[[], T]) -> Replay[T]:
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self.device)
        # A capture that breaks off leaves its stream current: the outer context sets it back.
        with _CAPTURING, torch.cuda.device(self.device), torch.cuda.stream(current):
            before = torch.cuda.memory_reserved(self.device)
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                outputs = fn()
            grown = torch.cuda.memory_reserved(self.device) - before

        def run() -> T:
            graph.replay()
            return outputs

        return Replay(run=run, pool_bytes=max(grown, 0))


def capture_for(device: torch.device) -> Capture:
    """CUDA graphs on a CUDA device; elsewhere no capture."""
    return CudaCapture(device) if device.type == "cuda" else NoCapture()


def buckets(largest: int) -> tuple[int, ...]:
    """Batch sizes that graphs are captured for: 1, 2, 4, 8, 16, 24, … and `largest`.

    A guided request has two rows, and a product reads its weights once for up to 16 of them: up to
    8 requests a larger bucket costs idle rows in attention and draws only, so few sizes will do;
    beyond, each step of 8 requests is one more reading of the weights.

    Raises:
        ValueError: where `largest` is below 1.
    """
    if largest < 1:
        raise ValueError(f"buckets: expected at least 1 request, got {largest}")
    sizes = [1]
    while sizes[-1] < largest:
        sizes.append(min(2 * sizes[-1] if sizes[-1] < DOUBLED else sizes[-1] + STRIDE, largest))
    return tuple(sizes)


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphReport:
    """One captured graph."""

    name: str
    bucket: int
    launches: int | None  # of one replay, where they were counted
    pool_bytes: int | None  # by which capturing it grew the reserved memory, where that is known
    replays: int


class GraphCache:
    """Graphs by name and bucket, captured when first used. Of one lane: not for two threads.

    Args:
        capture: how.
        largest: batch size.
    """

    def __init__(self, capture: Capture, largest: int) -> None:
        self.capture = capture
        self.buckets = buckets(largest)
        self._graphs: dict[tuple[str, int], Replay[Any]] = {}
        self._replays: dict[tuple[str, int], int] = {}

    def bucket_for(self, count: int) -> int:
        """The smallest bucket that holds `count` requests.

        Raises:
            ValueError: where none does.
        """
        for bucket in self.buckets:
            if 1 <= count <= bucket:
                return bucket
        raise ValueError(f"batch: expected 1 to {self.buckets[-1]} requests, got {count}")

    def run(self, name: str, bucket: int, fn: Callable[[], T]) -> T:
        """Replay the graph of that name and bucket, after capturing `fn` where there is none yet.

        The outputs are overwritten by the next run. What `fn` raises comes through, and the next
        run tries again.
        """
        key = name, bucket
        graph: Replay[T] | None = self._graphs.get(key)
        if graph is None:
            self.capture.warm_up(fn)
            graph = self.capture.capture(fn)
            self._graphs[key] = graph
            self._replays[key] = 0
        outputs = graph.run()
        self._replays[key] += 1
        return outputs

    def report(self) -> list[GraphReport]:
        """All graphs, in the order of their capture."""
        return [
            GraphReport(
                name=name, bucket=bucket, launches=graph.launches, pool_bytes=graph.pool_bytes,
                replays=self._replays[name, bucket],
            )
            for (name, bucket), graph in self._graphs.items()
        ]  # fmt: skip


__all__ = [
    "Capture", "CudaCapture", "GraphCache", "GraphReport", "NoCapture", "Replay", "TapeCapture",
    "buckets", "capture_for",
]  # fmt: skip
