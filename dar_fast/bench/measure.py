"""What the benches share: times, this machine's ceilings, results with their origin.

Bandwidth is bytes over the seconds of a sum; the matrix rate 2 n^3 over those of a product [n, n].
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dar_fast.doctor import doctor
from dar_fast.files import atomic_write

LEAST_READ = 2**20  # bytes: less is over before it can be timed
SIDES = {"cpu": 2048, "cuda": 8192}  # of a matrix product that a launch does not show in


def synchronize() -> None:
    """Wait for the accelerator, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(run: Callable[[], object], repeats: int, warm: int = 1, best: bool = False) -> float:
    """Median (or best) over `repeats`, after `warm` runs that do not count."""
    for _ in range(warm):
        run()
    times = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - start)
    return min(times) if best else statistics.median(times)


def matrix_rate(dtype: torch.dtype, device: str = "cpu", size: int = 2048) -> float:
    """FLOP/s of a [size, size] matrix product, the best of twelve: a ceiling is no average."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, 12, best=True)


def read_bandwidth(device: str = "cpu", size: int = 2**29) -> float:
    """Bytes/s of reading `size` bytes that are in no cache, the best of eight."""
    x = torch.ones(size // 4, device=device)
    return size / seconds(lambda: x.sum(), 8, best=True)


def copy_bandwidth(size: int = 2**30) -> float:
    """Bytes/s read and written of a copy on the GPU, by CUDA events, the median of 20."""
    x = torch.randn(size // 4, device="cuda")
    y = torch.empty_like(x)
    return 2 * size / device_seconds(lambda: y.copy_(x))


def graphed(run: Callable[[], object]) -> Callable[[], object]:
    """`run` as a CUDA graph, so that no launch is waited for; raises where it reads back."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, tunes, allocates
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def device_seconds(run: Callable[[], object], repeats: int = 20) -> float:
    """Median seconds on the GPU by CUDA events; the second-level cache holds none of it before."""
    cache = torch.empty(2**28, dtype=torch.int8, device="cuda")  # over four times the largest L2
    run()
    new = partial(torch.cuda.Event, enable_timing=True)
    events = [(new(), new()) for _ in range(repeats)]
    for start, end in events:
        cache.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


class Roofs:
    """This machine's ceilings, the best of all probes: `probe` between what they are ceilings of.

    Args:
        device: where.
        dtype: of the matrix products.
        sizes: bytes by name; a bandwidth each, of reading so many again and again, since weights
            that fit a cache are read faster than memory.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, sizes: Mapping[str, int]) -> None:
        self.device = device
        self._sizes = {name: max(size, LEAST_READ) // 4 for name, size in sizes.items()}
        self._unread = torch.ones(max(self._sizes.values()), device=device)
        side = SIDES.get(device.type, SIDES["cuda"])
        self._a = torch.randn(side, side, device=device).to(dtype)
        self.bandwidth = dict.fromkeys(sizes, 0.0)  # bytes/s
        self.rate = 0.0  # FLOP/s

    def probe(self, repeats: int = 3) -> None:
        """Measure again and keep the best."""
        for name, count in self._sizes.items():
            part = self._unread[:count]
            took = self._least(part.sum, repeats)
            self.bandwidth[name] = max(self.bandwidth[name], 4 * count / took)
        took = self._least(lambda: self._a @ self._a, repeats)
        self.rate = max(self.rate, 2 * len(self._a) ** 3 / took)

    def _least(self, run: Callable[[], object], repeats: int) -> float:
        if self.device.type == "cuda":
            return device_seconds(run, repeats)
        return seconds(run, repeats, best=True)


def about(device: torch.device | None = None) -> dict[str, Any]:
    """Device, versions and commit, for the head of a result; by default the GPU if there is one."""
    facts = doctor()
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    on_gpu = torch.cuda.is_available() if device is None else device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else facts["cpu"]["model"],
        "isa": facts["cpu"]["isa"], "threads": torch.get_num_threads(),
        "versions": facts["versions"], "commit": commit.stdout.strip() or None,
    }  # fmt: skip


def finish(document: dict[str, Any], out: Path | None) -> None:
    """Print `document` as the last line, one JSON document, and write it to `out` where given."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(out) as temporary:
            temporary.write_text(json.dumps(document, indent=1) + "\n")
    sys.stdout.write(json.dumps(document) + "\n")
