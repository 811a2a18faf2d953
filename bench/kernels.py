"""The CPU kernels against plain eager PyTorch in the same run: are the ratios what they should be?

    python bench/kernels.py [--quick] [--json] [--out FILE]

vq_nearest beside the expression that makes [M, V]; a decode step of prior L, guided, batch 1, in
bf16 and int8 beside the eager module in bf16; one pixel DiT step of tokenizer v1 in bf16 beside
eager fp32. Weights are random. Ceilings: bytes read a second, fp32 and bf16 matrix products. Ours,
plain and ceiling take turns, the best of each counts. The last line is one JSON document; with
--json it is the only one.
"""

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dar_fast.bench.floors import prior_bytes, step_flops
from dar_fast.bench.measure import about, finish
from dar_fast.bench.models import DTYPES, randomise
from dar_fast.config import PRIORS, TOKENIZERS
from dar_fast.models import Prior
from dar_fast.models.decoding import NativeDecoding, PlainDecoding, decoder_weights
from dar_fast.models.layers import pack
from dar_fast.models.pixel_dit import PixelDiT
from dar_fast.sampling import Sampling
from dar_kernels import prefer
from dar_kernels.decode_step import NativeDecoder
from vq_nearest import measure as measure_vq_nearest

Row = dict[str, Any]
READ = 2**29  # bytes, in no cache
SIDE = 2048  # of a matrix product


def alternate(subjects: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Least seconds of each subject, after one run that does not count; they take turns."""
    for run in subjects.values():
        run()
    least = dict.fromkeys(subjects, float("inf"))
    for _ in range(rounds):
        for name, run in subjects.items():
            start = time.perf_counter()
            run()
            least[name] = min(least[name], time.perf_counter() - start)
    return least


def vq_nearest_rows(quick: bool) -> list[Row]:
    """Each implementation in a process of its own, so that its peak memory is its own."""
    M, V, C = 65_536, 16_384, 8
    rows = []
    for name in ("unfused", "native"):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            r = pool.apply(measure_vq_nearest, (name, M, V, C, 1 if quick else 3))
        rows.append(
            {
                "op": "vq_nearest", "subject": name, "shape": [M, V, C], "dtype": "fp32",
                "seconds": r["seconds"], "bytes": r["bytes"],
                "flops_a_second": 2 * M * V * C / r["seconds"], "of_roof": r["of_sgemm"],
            }
        )  # fmt: skip
    return rows


@torch.no_grad()
def decode_rows(codes: int, rounds: int) -> list[Row]:
    """Seconds a code of prior L with guidance, one request, from an empty cache.

    Many short turns: on a shared host the memory is half as fast from one second to the next.
    """
    prior = Prior(PRIORS["L"])
    randomise(prior)
    prior = prior.to(torch.bfloat16).eval()
    unread = torch.ones(READ // 4)
    classes = torch.tensor([0, prior.config.null_class])
    seeds, prefix = torch.tensor([0]), torch.empty(1, 0, dtype=torch.int64)
    settings = prior, classes, Sampling(guidance_scale=4.0), seeds, prefix
    weights = decoder_weights(prior)
    quantised = NativeDecoder(weights.quantize(torch.int8))
    plain = NativeDecoder(weights)
    with prefer("torch"):
        PlainDecoding(*settings).take(2)

    def eager() -> None:
        with prefer("torch"):
            PlainDecoding(*settings).take(codes)

    seconds = alternate(
        {
            "eager bf16": eager,
            "native bf16": lambda: NativeDecoding(*settings, plain).take(codes),
            "native int8": lambda: NativeDecoding(*settings, quantised).take(codes),
            "read": unread.sum,
        },
        rounds,
    )
    bandwidth = READ / seconds.pop("read")
    size = prior_bytes(prior)
    return [
        {
            "op": "decode_step", "subject": name, "shape": ["prior L", "batch 1", "guided"],
            "dtype": name.split()[1], "seconds": took / codes,
            "bytes_a_second": (size // 2 if "int8" in name else size) / (took / codes),
            "of_roof": (size // 2 if "int8" in name else size) / (took / codes) / bandwidth,
        }
        for name, took in seconds.items()
    ]  # fmt: skip


@torch.no_grad()
def pixel_dit_rows(rounds: int) -> list[Row]:
    """Seconds of one evaluation of tokenizer v1's pixel DiT, one picture."""
    config = TOKENIZERS["v1"]
    models = {}
    for name, dtype in (("eager fp32", torch.float32), ("eager bf16", torch.bfloat16),
                        ("native bf16", torch.bfloat16)):  # fmt: skip
        torch.manual_seed(0)
        model = PixelDiT(config.dit, config.decoder_dim, config.image_size)
        models[name] = model.to(dtype).eval()
    pack(models["native bf16"])
    R, Q = config.image_size, config.group_size
    x, cond = torch.randn(1, 3, R, R), torch.randn(1, Q, config.decoder_dim)
    t = torch.tensor([0.3])

    def step(name: str) -> None:
        dtype = models[name].conv_in.weight.dtype
        inputs = x.to(dtype), t, cond.to(dtype)
        if name.startswith("eager"):
            with prefer("torch"):
                models[name](*inputs)
        else:
            models[name](*inputs)

    a = {name: torch.randn(SIDE, SIDE).to(dtype) for name, dtype in DTYPES.items()}
    products = {name: lambda name=name: a[name] @ a[name] for name in DTYPES}
    steps = {name: lambda name=name: step(name) for name in models}
    seconds = alternate({**steps, **products}, rounds)
    rates = {name: 2 * SIDE**3 / seconds.pop(name) for name in DTYPES}
    flops = step_flops(config)
    return [
        {
            "op": "pixel_dit_step", "subject": name, "shape": ["tokenizer v1", "batch 1"],
            "dtype": name.split()[1], "seconds": took, "flops_a_second": flops / took,
            "of_roof": flops / took / rates[name.split()[1]],
        }
        for name, took in seconds.items()
    ]  # fmt: skip


def ratios(rows: list[Row]) -> dict[str, float]:
    """Plain eager's seconds over ours."""
    took = {(row["op"], row["subject"]): row["seconds"] for row in rows}
    return {
        "vq_nearest": took["vq_nearest", "unfused"] / took["vq_nearest", "native"],
        "decode_step_bf16": took["decode_step", "eager bf16"] / took["decode_step", "native bf16"],
        "decode_step_int8": took["decode_step", "eager bf16"] / took["decode_step", "native int8"],
        "pixel_dit_step": took["pixel_dit_step", "eager fp32"]
        / took["pixel_dit_step", "native bf16"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds and codes")
    parser.add_argument("--json", action="store_true", help="print the JSON document alone")
    parser.add_argument("--out", type=Path, help="write the JSON document there too")
    args = parser.parse_args()
    out = sys.stderr if args.json else sys.stdout
    rows: list[Row] = []
    for part in (
        lambda: vq_nearest_rows(args.quick),
        lambda: decode_rows(16, 15 if args.quick else 40),
        lambda: pixel_dit_rows(3 if args.quick else 6),
    ):
        for row in part():
            rows.append(row)
            size = f" | {row['bytes'] / 2**20:7.1f} MiB" if "bytes" in row else ""
            rate = row.get("bytes_a_second", row.get("flops_a_second", 0)) / 1e9
            unit = "GB/s" if "bytes_a_second" in row else "GFLOP/s"
            print(
                f"{row['op']:14} {row['subject']:11} | {1e3 * row['seconds']:9.2f} ms | "
                f"{rate:6.1f} {unit:7} | {100 * row['of_roof']:4.0f} % of the roof{size}",
                file=out,
                flush=True,
            )
    measured = ratios(rows)
    print(", ".join(f"{k} {v:.2f}x" for k, v in measured.items()), file=out)
    finish({"bench": "kernels", **about(), "ratios": measured, "rows": rows}, args.out)


if __name__ == "__main__":
    main()
