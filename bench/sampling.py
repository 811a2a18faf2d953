"""Seconds a picture: the embedded model, and prior L with tokenizer v1 under random weights.

    python bench/sampling.py [--quick] [--out FILE]

Floors: the prior reads its weights once a code, at the measured read bandwidth; the tokenizer's
products run at the measured matrix rate of the same type. The last line is one JSON document.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from dar_fast import DARPipeline
from dar_fast.bench.floors import encode_flops, prior_bytes, step_flops
from dar_fast.bench.measure import (
    about,
    finish,
    matrix_rate,
    read_bandwidth,
    seconds,
    synchronize,
)
from dar_fast.bench.models import DTYPES, randomise
from dar_fast.config import PRIORS, TOKENIZERS, PriorConfig, TokenizerConfig
from dar_fast.models import Prior, Tokenizer
from dar_fast.sampling import Sampling


def demo_rows(repeats: int) -> list[dict[str, Any]]:
    pipe = DARPipeline.from_pretrained("demo")
    labels = list(pipe.labels.values())[:16]

    def first_preview() -> None:
        next(iter(pipe.stream(labels[:1], seeds=[0])))

    rows = []
    for batch in (1, 16):
        took = seconds(lambda b=batch: pipe(labels[:b], seeds=0), repeats)
        rows.append({"model": "demo", "batch": batch, "dtype": "fp32", "seconds": took / batch})
    rows[0]["first_preview_seconds"] = seconds(first_preview, repeats)
    return rows


def prior_row(config: PriorConfig, dtype: str, codes: int, bandwidth: float, device: str) -> Any:
    model = Prior(config)
    randomise(model)
    model = model.to(device, DTYPES[dtype]).eval()
    labels = torch.tensor([0], device=device)
    steps = model.generation(labels, Sampling(guidance_scale=4.0), seeds=[0])
    next(steps)
    synchronize()
    start = time.perf_counter()
    for _ in range(codes):
        next(steps)
    synchronize()
    took = (time.perf_counter() - start) / codes
    floor = prior_bytes(model) / bandwidth
    N = config.num_tokens
    return {
        "model": "prior L, guided", "batch": 1, "dtype": dtype, "seconds": N * took,
        "seconds_a_code": took, "floor_seconds": N * floor,
    }  # fmt: skip


def tokenizer_rows(config: TokenizerConfig, dtype: str, repeats: int, device: str) -> list[Any]:
    model = Tokenizer(config)
    randomise(model)
    model = model.to(device, DTYPES[dtype]).eval()
    rate = matrix_rate(DTYPES[dtype], device)
    images = torch.rand(1, 3, config.image_size, config.image_size, device=device) * 2 - 1
    codes = model.encode(images)
    encode = seconds(lambda: model.encode(images), repeats, warm=0)
    decode = seconds(lambda: model.decode(codes, seeds=0), repeats, warm=0)
    common = {"batch": 1, "dtype": dtype}
    floors = encode_flops(config) / rate, config.num_steps * step_flops(config) / rate
    return [
        {"model": f"tokenizer v1, {name}", **common, "seconds": took, "floor_seconds": floor}
        for name, took, floor in zip(("encode", "decode"), (encode, decode), floors, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer codes and repeats")
    parser.add_argument("--out", type=Path, help="write the JSON document there too")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    rows = demo_rows(2 if args.quick else 5)
    bandwidth = read_bandwidth(device)
    for dtype in DTYPES:
        codes = 16 if args.quick else PRIORS["L"].num_tokens - 1
        rows.append(prior_row(PRIORS["L"], dtype, codes, bandwidth, device))
        rows += tokenizer_rows(TOKENIZERS["v1"], dtype, 1 if args.quick else 3, device)
    for row in rows:
        floor = row.get("floor_seconds")
        ceiling = f"floor {floor:8.3f} s | {100 * floor / row['seconds']:3.0f} %" if floor else ""
        print(
            f"{row['model']:20} | batch {row['batch']:2} | {row['dtype']} | "
            f"{row['seconds']:8.3f} s a picture | {ceiling}"
        )
    finish({"bench": "sampling", **about(), "read_bandwidth": bandwidth, "rows": rows}, args.out)


if __name__ == "__main__":
    main()
