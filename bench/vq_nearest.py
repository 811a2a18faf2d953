"""vq_nearest on a CPU: time and memory beside the plain PyTorch expression, which makes [M, V].

    python bench/vq_nearest.py [--rows M] [--codes V] [--channels C] [--repeats R] [--out FILE]

The ceiling is an fp32 matrix product through torch, timed by the same clock. CPU seconds leave out
the waiting on a machine that others use: there, take one thread (OMP_NUM_THREADS=1). Each subject
has a process of its own, so that its peak memory is its own. The last line is one JSON document.
"""

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dar_fast.bench.measure import about, finish, seconds
from dar_kernels import vq_nearest

SIZE = 2048  # of the matrix product


def unfused(z: Tensor, codebook: Tensor) -> Tensor:
    """The expression of the official quantizer."""
    z, codebook = normalize(z, dim=-1), normalize(codebook, dim=-1)
    square = z.square().sum(1, keepdim=True) + codebook.square().sum(1)
    return (square - 2 * z @ codebook.T).argmin(1)


SUBJECTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "native": lambda z, codebook: vq_nearest(z, codebook, implementation="native"),
    "torch": lambda z, codebook: vq_nearest(z, codebook, implementation="torch"),
    "unfused": unfused,
}


def clocked(run: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median wall seconds, and mean CPU seconds over all threads."""
    run()
    start = time.process_time()
    wall = seconds(run, repeats, warm=0)
    return wall, (time.process_time() - start) / repeats


def measure(name: str, M: int, V: int, C: int, repeats: int) -> dict[str, float]:
    """Seconds, their share of the ceiling by CPU seconds, and bytes of memory above the start."""
    generator = torch.Generator().manual_seed(0)
    z, codebook = (torch.randn(n, C, generator=generator) for n in (M, V))
    SUBJECTS[name](z[:64], codebook[:64])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = clocked(lambda: SUBJECTS[name](z, codebook), repeats)
    memory = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    a = torch.randn(SIZE, SIZE)
    product = clocked(lambda: a @ a, repeats)[1]
    share = (2 * M * V * C / cpu) / (2 * SIZE**3 / product)
    return {"seconds": wall, "cpu_seconds": cpu, "of_sgemm": share, "bytes": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("rows", 65_536), ("codes", 16_384), ("channels", 8), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, help="write the JSON document here too")
    args = parser.parse_args()
    M, V, C = args.rows, args.codes, args.channels
    head = {"op": "vq_nearest", "shape": [M, V, C], "dtype": "float32", **about()}
    results = {}
    for name in SUBJECTS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            r = results[name] = pool.apply(measure, (name, M, V, C, args.repeats))
        print(
            f"vq_nearest {name} [{M}, {C}] over {V} fp32 | {1e3 * r['seconds']:.0f} ms | "
            f"{1e3 * r['cpu_seconds']:.0f} ms CPU | "
            f"{2e-9 * M * V * C / r['cpu_seconds']:.1f} GFLOP/s of CPU time | "
            f"{100 * r['of_sgemm']:.0f} % of sgemm | {r['bytes'] / 2**20:.1f} MiB"
        )
    finish({**head, "results": results}, args.out)


if __name__ == "__main__":
    main()
