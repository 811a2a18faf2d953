"""What a GPU asks of its host: launches a code and CPU seconds a code, of codes alone."""

import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from dar_fast.bench.ours import draw

if TYPE_CHECKING:
    from dar_fast.engine import Engine

# calls of the CUDA runtime and driver that start work; a graph is one of them
LAUNCHES = (
    "cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx",
    "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync",
)  # fmt: skip


def count_launches(events: Iterable[Any]) -> int:
    """Launches among a profile's averages, each with a `key` and a `count`."""
    return sum(event.count for event in events if event.key in LAUNCHES)


def host_work(
    engine: "Engine", labels: Sequence[int], codes: int, device: torch.device
) -> dict[str, float] | None:
    """Launches and CPU seconds a code of all threads; None where there is no GPU."""
    if device.type != "cuda":
        return None
    start = time.process_time()
    draw(engine, labels, output="codes")
    took = time.process_time() - start
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as record:
        draw(engine, labels, output="codes")
    return {
        "launches_a_code": count_launches(record.key_averages()) / codes,
        "cpu_seconds_a_code": took / codes,
    }


__all__ = ["count_launches", "host_work"]
