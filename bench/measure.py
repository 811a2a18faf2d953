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
