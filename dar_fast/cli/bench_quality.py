"""`dar bench quality`: what the prior's weights in one byte change, beside bf16; no times."""

import json as encoder
from typing import Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, arg

from dar_fast.cli.options import MODEL, Json, ModelOptions, parse_guidance
from dar_fast.cli.report import say, table, working


def quality(
    *,
    model: OmitArgPrefixes[ModelOptions] = MODEL,
    quantised: Annotated[tuple[Literal["int8", "fp8"], ...], arg(metavar="int8|fp8 ...")] = (
        "int8",
        "fp8",
    ),
    samples: Annotated[int, arg(metavar="N")] = 16,
    seed: Annotated[int, arg(metavar="SEED")] = 0,
    guidance: Annotated[str, arg(metavar="SCALE|FIRST:LAST|S,S,…")] = "4",
    json: Json = False,
) -> None:
    """Compare the prior in one byte a weight with itself in bf16: next codes and pictures.

    Args:
        quantised: Kinds of prior weights.
        samples: Pictures that are drawn of each kind, greedily and at temperature 1.
        seed: Of their classes, and of the first picture's noise.
        guidance: Of the distributions and pictures.
        json: Print the JSON document alone, on one line.
    """
    if not quantised:
        raise ValueError("quantised: expected int8, fp8 or both, got none")
    for name, value, least in (("samples", samples, 1), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{name}: expected an integer >= {least}, got {value}")
    scale = parse_guidance(guidance)
    pipe = model.load()
    from dar_fast.quality import quality_report

    rows = []
    for kind in quantised:
        with working(f"comparing {kind} with bf16"):
            rows.append(quality_report(pipe, kind, samples, seed, scale))
    document: dict[str, Any] = {
        "bench": "quality",
        "model": model.model,
        "device": str(pipe.device),
        "arithmetic": str(pipe.dtype).removeprefix("torch."),
        "rows": rows,
    }
    if not json:
        columns = [_cells(row) for row in rows]
        table(("beside bf16", *quantised), list(zip(QUANTITIES, *columns, strict=True)))
    say(encoder.dumps(document))


QUANTITIES = (
    "MB of weights, of bf16's",
    "KL of the next code in nats: mean",
    "at most",
    "same likeliest code",
    "greedy: codes before one differs",
    "pictures of equal codes",
    "PSNR of the pictures in dB",
    "drawn: codes before one differs",
    "pictures of equal codes",
    "PSNR of the pictures in dB",
)


def _cells(row: dict[str, Any]) -> list[str]:
    """A row of the document as the values of QUANTITIES."""
    next_codes = row["next_codes"]
    cells = [
        f"{row['bytes'] / 1e6:.1f} of {row['reference_bytes'] / 1e6:.1f}",
        f"{next_codes['mean_kl']:.2e}",
        f"{next_codes['max_kl']:.2e}",
        f"{next_codes['agreement']:.1%}",
    ]
    for runs in (row["greedy"], row["sampled"]):
        psnr = runs["psnr_db"]
        cells += [
            f"{runs['equal_prefix']:.1f} of {row['num_tokens']}",
            f"{runs['equal_codes']:.0%}",
            "equal" if psnr is None else f"{psnr:.1f}",
        ]
    return cells


__all__ = ["quality"]
