"""What the benches share: median times, this machine's ceilings, results with their origin."""

import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dar_fast.doctor import doctor
from dar_fast.files import atomic_write


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
    stream = torch.cuda.Stream()
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
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        cache.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


def about() -> dict[str, Any]:
    """Device, versions and commit, for the head of a result."""
    facts = doctor()
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else facts["cpu"]
    return {
        "device": device, "threads": torch.get_num_threads(), "versions": facts["versions"],
        "commit": commit.stdout.strip() or None,
    }  # fmt: skip


def finish(document: dict[str, Any], out: Path | None) -> None:
    """Print `document` as the last line, one JSON document, and write it to `out` where given."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(out) as temporary:
            temporary.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))
