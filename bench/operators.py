"""Where the time of sampling goes: the operators of one guided picture, by their own time.

    python bench/operators.py [--codes N] [--out FILE]

Prior L decodes N codes, then tokenizer v1 its eight steps, under random weights. The last line is
one JSON document.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from dar_fast.bench.measure import about, finish
from dar_fast.bench.models import randomise
from dar_fast.config import PRIORS, TOKENIZERS
from dar_fast.models import Prior, Tokenizer
from dar_fast.sampling import Sampling

ROWS = 15


def operators(run: Any, device: str) -> list[dict[str, Any]]:
    """The ROWS operators that take the most time of their own, in seconds."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=activities) as record:
        run()
    rows = [
        {
            "name": event.key,
            "calls": event.count,
            "host_seconds": event.self_cpu_time_total / 1e6,
            "device_seconds": event.self_device_time_total / 1e6,
        }
        for event in record.key_averages()
    ]
    key = "device_seconds" if device == "cuda" else "host_seconds"
    return sorted(rows, key=lambda row: -row[key])[:ROWS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--codes", type=int, default=16, help="codes of prior L to decode")
    parser.add_argument("--out", type=Path, help="write the JSON document there too")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    prior, tokenizer = Prior(PRIORS["L"]), Tokenizer(TOKENIZERS["v1"])
    for model in (prior, tokenizer):
        randomise(model)
        model.to(device, torch.bfloat16).eval()
    labels = torch.tensor([0], device=device)
    codes = torch.zeros(1, TOKENIZERS["v1"].num_tokens, dtype=torch.int64, device=device)

    def decode_codes() -> None:
        steps = prior.generation(labels, Sampling(guidance_scale=4.0), seeds=[0])
        for _ in range(args.codes):
            next(steps)

    parts = {"prior L": decode_codes, "tokenizer v1": lambda: tokenizer.decode(codes, seeds=0)}
    results = {name: operators(run, device) for name, run in parts.items()}
    for name, rows in results.items():
        print(f"{name}, bf16, {device}")
        for row in rows:
            print(
                f"  {row['name'][:60]:60} | {row['calls']:6} calls | "
                f"{1e3 * row['host_seconds']:9.2f} ms host | "
                f"{1e3 * row['device_seconds']:9.2f} ms device"
            )
    finish({"bench": "operators", **about(), "operators": results}, args.out)


if __name__ == "__main__":
    main()
