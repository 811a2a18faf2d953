"""`dar sample` and `dar preview`: labels to pictures."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import OmitArgPrefixes, Positional, arg

from dar_fast.cli.draw import Drawn, about_run, check_count, draw
from dar_fast.cli.options import (
    DRAWING,
    MODEL,
    SHOWN,
    DrawOptions,
    Json,
    ModelOptions,
    Scale,
    find_labels,
    spread,
)
from dar_fast.cli.report import say, say_json

if TYPE_CHECKING:
    from PIL import Image

    from dar_fast.cli.sheet import Tile
    from dar_fast.pipeline import DARPipeline

ROW = 8  # pictures of a label that get a row of their own


def sample(
    labels: Annotated[
        Positional[tuple[str, ...]], arg(metavar="[LABEL …]", help_behavior_hint="")
    ] = (),
    *,
    n: Annotated[
        int | None,
        arg(name="n", aliases=["-n"], metavar="N", help_behavior_hint="(default: 1, or 16 in all)"),
    ] = None,
    out: Annotated[str, arg(metavar="PATH")] = "samples.png",
    animate: Annotated[Path | None, arg(metavar="X.webp", help_behavior_hint="")] = None,
    scale: Scale = None,
    compile: Annotated[bool, arg(help_behavior_hint="")] = False,
    drawing: OmitArgPrefixes[DrawOptions] = DRAWING,
    model: OmitArgPrefixes[ModelOptions] = MODEL,
    json: Json = False,
) -> None:
    """Draw pictures of labels; without a label, of a fixed spread over all of them.

    Args:
        labels: Label names, as `dar labels` lists them.
        n: Pictures a label; without a label, pictures in all.
        out: One contact sheet (.png), or a folder (it exists, or ends in /) for a file a picture.
        animate: Also write an animated WebP of the sheet sharpening.
        scale: Enlarge pictures by this whole factor; in a folder they stay as they are.
        compile: Draw by torch.compile; the first pictures wait for the compiler.
        json: Print one JSON document.
    """
    from dar_fast.cli.save import check_output, is_folder, save_animation, save_png
    from dar_fast.cli.sheet import columns_for, contact_sheet, label_tile

    check_count("n", n)
    check_count("scale", scale)
    target, folder = Path(out), is_folder(Path(out), out)
    if not folder:
        check_output("out", target, ".png")
    if animate is not None:
        check_output("animate", animate, ".webp")
    settings = drawing.settings()
    pipe = model.load()
    if compile:
        pipe.compile()
    ids, names, seeds = plan(pipe, labels, n, drawing.seed)
    drawn = draw(pipe, ids, seeds, settings, batch_size=drawing.batch_size)

    pictures = [{"label": a, "seed": b} for a, b in zip(names, seeds, strict=True)]
    about = about_run("sample", model.model, pipe, settings)
    several = len(set(names)) < len(names)
    each = n or 1
    rows = bool(labels) and len(labels) > 1 and 1 < each <= ROW
    columns = each if rows else columns_for(len(names))

    def tiles(images: Sequence["Image.Image"]) -> list["Tile"]:
        return [
            label_tile(image, name, f"seed {seed}" if several else "")
            for image, name, seed in zip(images, names, seeds, strict=True)
        ]

    if folder:
        files = save_each(target, drawn, pictures, about, scale or 1)
    else:
        sheet = contact_sheet(tiles(drawn.images), columns, scale)
        save_png(target, sheet, {**about, "pictures": pictures})
        files = [target]
    if animate is not None:
        save_animation(
            animate, [contact_sheet(tiles(frame), columns, scale) for frame in drawn.frames()]
        )
    if json:
        say_json(
            {
                **about,
                "pictures": pictures,
                "files": [str(path) for path in files],
                "animation": None if animate is None else str(animate),
                "seconds": drawn.seconds,
                "seconds_per_picture": drawn.seconds / len(names),
            }
        )
        return
    say(f"{target}: {len(files)} files" if folder else f"{target}: the pictures")
    if animate is not None:
        say(f"{animate}: their previews, coarse to fine")
    say(drawn.speed(pipe))


def preview(
    label: Annotated[Positional[str], arg(metavar="LABEL")],
    *,
    out: Annotated[Path, arg(metavar="X.png")] = Path("preview.png"),
    animate: Annotated[
        Path | None, arg(metavar="X.webp", help_behavior_hint="(default: beside --out)")
    ] = None,
    scale: Scale = None,
    drawing: OmitArgPrefixes[DrawOptions] = DRAWING,
    model: OmitArgPrefixes[ModelOptions] = MODEL,
    json: Json = False,
) -> None:
    """Draw one picture and keep the preview after every step: a strip, and an animated WebP.

    Args:
        label: A label name, as `dar labels` lists them.
        out: The strip.
        animate: The animation.
        scale: Enlarge pictures by this whole factor.
        json: Print one JSON document.
    """
    from dar_fast.cli.save import check_output, save_animation, save_png
    from dar_fast.cli.sheet import Tile, contact_sheet, default_scale, enlarge

    check_count("scale", scale)
    animation = out.with_suffix(".webp") if animate is None else animate
    check_output("out", out, ".png")
    check_output("animate", animation, ".webp")
    settings = drawing.settings()
    pipe = model.load()
    ids, names = find_labels(pipe, [label])
    drawn = draw(pipe, ids, [drawing.seed], settings, batch_size=1)

    frames = drawn.previews[0]
    config = pipe.tokenizer.config
    tiles = [
        Tile(frame, f"step {i + 1} of {len(frames)}", f"{codes_used(pipe, i, len(frames))} codes")
        for i, frame in enumerate(frames)
    ]
    about = {
        **about_run("preview", model.model, pipe, settings),
        "pictures": [{"label": names[0], "seed": drawing.seed}],
    }
    save_png(out, contact_sheet(tiles, len(tiles), scale), about)
    factor = scale or default_scale(config.image_size)
    save_animation(animation, [enlarge(frame, factor) for frame in [*frames, *drawn.images]])
    if json:
        files = {"strip": str(out), "animation": str(animation)}
        say_json({**about, "previews": len(frames), **files, "seconds": drawn.seconds})
        return
    say(f"{out}: {len(frames)} previews, coarse to fine")
    say(f"{animation}: the same, animated")
    say(drawn.speed(pipe))


def codes_used(pipe: "DARPipeline", step: int, steps: int) -> int:
    """Codes that the picture after a step has seen."""
    return pipe.tokenizer.group_start(step, steps) + pipe.tokenizer.config.group_size


def plan(
    pipe: "DARPipeline", labels: Sequence[str], n: int | None, seed: int
) -> tuple[list[int], list[str], list[int]]:
    """Class id, label and seed of every picture; picture k of a label always has `seed + k`."""
    if labels:
        ids, names = find_labels(pipe, labels)
        each = range(n or 1)
        return (
            [i for i in ids for _ in each],
            [a for a in names for _ in each],
            [seed + k for _ in ids for k in each],
        )
    known = list(pipe.labels) or [str(i) for i in range(pipe.prior.config.num_classes)]
    ids, names = find_labels(pipe, spread(known, n or SHOWN))
    return ids, names, [seed + names[:i].count(name) for i, name in enumerate(names)]


def save_each(
    folder: Path,
    drawn: Drawn,
    pictures: Sequence[dict[str, Any]],
    about: dict[str, Any],
    scale: int,
) -> list[Path]:
    """One PNG a picture, named by place, label and seed."""
    from dar_fast.cli.save import save_png
    from dar_fast.cli.sheet import enlarge

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for i, (image, picture) in enumerate(zip(drawn.images, pictures, strict=True)):
        name = re.sub(r"[^a-z0-9]+", "-", str(picture["label"]).lower()).strip("-")[:60]
        path = folder / f"{i:03d}-{name}-seed{picture['seed']}.png"
        save_png(path, enlarge(image, scale), {**about, "pictures": [picture]})
        files.append(path)
    return files
