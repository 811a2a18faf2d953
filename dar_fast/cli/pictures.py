"""`dar reconstruct`, `dar encode`, `dar decode`: pictures to codes and back."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

from dar_fast.cli.draw import check_count, where
from dar_fast.cli.options import MODEL, Json, ModelOptions, Scale
from dar_fast.cli.report import notice, progress, say, say_json, table

if TYPE_CHECKING:
    from torch import Tensor

    from dar_fast.pipeline import DARPipeline

BATCH = 16
PAIRS = 3  # pairs a row of `dar reconstruct`, above four pictures
Pictures = Annotated[
    Positional[tuple[Path, ...]], arg(metavar="IMAGE …", help_behavior_hint="(required)")
]
Seed = Annotated[int, arg(metavar="SEED")]
Steps = Annotated[int | None, arg(metavar="S", help_behavior_hint="(default: the model's)")]
Solver = Annotated[Literal["adams2", "euler"], arg(metavar="adams2|euler")]


def reconstruct(
    images: Pictures = (),
    *,
    out: Annotated[Path, arg(metavar="X.png")] = Path("reconstructed.png"),
    seed: Seed = 0,
    steps: Steps = None,
    solver: Solver = "adams2",
    scale: Scale = None,
    model: OmitArgPrefixes[ModelOptions] = MODEL,
    json: Json = False,
) -> None:
    """Encode pictures, decode their codes, and lay both side by side, with PSNR.

    Args:
        images: Picture files; resized where they have another size.
        out: The sheet.
        seed: Seed of the noise that decoding starts from, the same for every picture.
        steps: Denoising steps.
        solver: How the steps are taken.
        scale: Enlarge pictures by this whole factor.
        json: Print one JSON document.
    """
    from dar_fast.cli.save import check_output, save_png
    from dar_fast.cli.sheet import Tile, contact_sheet
    from dar_fast.images import psnr, to_pil

    check_count("scale", scale)
    check_count("steps", steps)
    check_some(images)
    check_output("out", out, ".png")
    pipe = model.load()
    pictures = read_pictures(pipe, images)
    codes = encode_all(pipe, pictures)
    decoded = decode_all(pipe, codes, seed=seed, num_steps=steps, solver=solver).cpu()
    decibels = psnr(decoded, pictures)
    mean = sum(decibels) / len(decibels)

    tiles = []
    for path, before, after, value in zip(
        images, to_pil(pictures), to_pil(decoded), decibels, strict=True
    ):
        tiles += [
            Tile(before, path.name, "input"),
            Tile(after, f"{value:.1f} dB", "from its codes"),
        ]
    columns = 2 * (1 if len(images) <= 4 else PAIRS)
    about = {
        "command": "reconstruct",
        "model": model.model,
        **where(pipe),
        "seed": seed,
        "num_steps": steps or pipe.tokenizer.config.num_steps,
        "solver": solver,
        "pictures": [
            {"input": str(path), "psnr": finite(value)}
            for path, value in zip(images, decibels, strict=True)
        ],
        "mean_psnr": finite(mean),
    }
    save_png(out, contact_sheet(tiles, columns, scale), about)
    if json:
        say_json({**about, "files": [str(out)]})
        return
    rows = [(str(path), f"{value:.2f}") for path, value in zip(images, decibels, strict=True)]
    table(("picture", "PSNR, dB"), rows if len(rows) == 1 else [*rows, ("mean", f"{mean:.2f}")])
    say(f"{out}: inputs beside what their codes decode to")


def check_some(images: Sequence[Path]) -> None:
    """Raise ValueError where there is no picture to read."""
    if not images:
        raise ValueError("expected at least one IMAGE, got none")


def finite(value: float) -> float | None:
    """`value` rounded, or None where it is infinite, which JSON cannot say."""
    return round(value, 3) if abs(value) != float("inf") else None


def read_pictures(pipe: "DARPipeline", paths: Sequence[Path]) -> "Tensor":
    """Picture files as `[B, 3, R, R]` in [-1, 1]; what was resized is told on stderr."""
    import torch

    from dar_fast.images import load_image

    loaded = [load_image(path, pipe.tokenizer.config.image_size) for path in paths]
    for each in loaded:
        if each.notice:
            notice(each.notice)
    return torch.stack([each.image for each in loaded])


def encode_all(pipe: "DARPipeline", pictures: "Tensor") -> "Tensor":
    """Codes `[B, N]` of pictures `[B, 3, R, R]`, in batches."""
    import torch

    codes = []
    with progress("encoding", len(pictures)) as advance:
        for batch in torch.split(pictures, BATCH):
            codes.append(pipe.tokenizer.encode(batch))
            for _ in batch:
                advance()
    return torch.cat(codes)


def decode_all(pipe: "DARPipeline", codes: "Tensor", *, seed: int, **settings: Any) -> "Tensor":
    """Pictures `[B, 3, R, R]` of codes `[B, N]`, in batches, all from the noise of one seed."""
    import torch

    pictures = []
    with progress("decoding", len(codes)) as advance:
        for batch in torch.split(codes, BATCH):
            pictures.append(pipe.tokenizer.decode(batch, seeds=[seed] * len(batch), **settings))
            for _ in batch:
                advance()
    return torch.cat(pictures)
