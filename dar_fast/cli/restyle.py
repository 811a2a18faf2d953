"""`dar restyle`: keep a picture's first groups of codes, the layout; redraw the rest."""

from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes, Positional, arg

from dar_fast.cli.draw import about_run, check_count, draw, steps_within
from dar_fast.cli.options import DRAWING, MODEL, DrawOptions, Json, ModelOptions, Scale, find_labels
from dar_fast.cli.report import notice, say, say_json

WIDEST = 8  # tiles a row, where there is one result a label


def restyle(
    image: Annotated[Positional[Path], arg(metavar="IMAGE")],
    *,
    labels: Annotated[tuple[str, ...], arg(metavar="LABEL …")],
    prefix_groups: Annotated[int, arg(metavar="G")] = 2,
    n: Annotated[int, arg(name="n", aliases=["-n"], metavar="N")] = 1,
    out: Annotated[Path, arg(metavar="X.png")] = Path("restyled.png"),
    scale: Scale = None,
    drawing: OmitArgPrefixes[DrawOptions] = DRAWING,
    model: OmitArgPrefixes[ModelOptions] = MODEL,
    json: Json = False,
) -> None:
    """Redraw a picture under other labels, keeping its layout: the first groups of its codes.

    The sheet shows the picture, what the kept groups alone say, and a result for every label.

    Args:
        image: A picture file; resized where it has another size.
        labels: Label names to redraw it as.
        prefix_groups: Groups of codes kept: 0 keeps nothing, all of them the whole picture.
        n: Results a label, with seeds that count up.
        out: The sheet.
        scale: Enlarge pictures by this whole factor.
        json: Print one JSON document.
    """
    from dar_fast.cli.save import check_output, save_png
    from dar_fast.cli.sheet import Tile, contact_sheet, label_tile
    from dar_fast.images import load_image, to_pil

    check_count("n", n)
    check_count("scale", scale)
    check_output("out", out, ".png")
    settings = drawing.settings()
    if not labels:
        raise ValueError("labels: expected at least one label, got none")
    pipe = model.load()
    config = pipe.tokenizer.config
    if not 0 <= prefix_groups <= config.num_groups:
        raise ValueError(
            f"prefix-groups: expected an integer in [0, {config.num_groups}], got {prefix_groups}"
        )
    ids, names = find_labels(pipe, labels)
    loaded = load_image(image, config.image_size)
    if loaded.notice:
        notice(loaded.notice)
    picture = loaded.image[None]
    codes = pipe.tokenizer.encode(picture)
    prefix = codes[:, : prefix_groups * config.group_size]
    places = [(k, i) for k in range(n) for i in range(len(ids))]  # a row a seed, a column a label
    seeds = [drawing.seed + k for k, _ in places]
    drawn = draw(
        pipe,
        [ids[i] for _, i in places],
        seeds,
        settings,
        batch_size=drawing.batch_size,
        prefix_codes=prefix.expand(len(places), -1),
        text="redrawing",
    )

    heading = [Tile(to_pil(picture)[0], "input", image.name)]
    within = steps_within(pipe, prefix_groups, settings["num_inference_steps"])
    if within:
        kept = pipe.tokenizer.decode(
            codes,
            seeds=drawing.seed,
            num_steps=settings["num_inference_steps"],
            solver=drawing.solver,
            stop_after=within,
        )
        note = f"{prefix_groups} of {config.num_groups} groups"
        heading.append(Tile(to_pil(kept)[0], "kept", note))
    tiles = []
    for row in range(n):
        tiles += heading if row == 0 else [Tile(None)] * len(heading)
        for i, name in enumerate(names):
            seed = seeds[row * len(ids) + i]
            image_ = drawn.images[row * len(ids) + i]
            tiles.append(label_tile(image_, name, f"seed {seed}" if n > 1 else ""))
    columns = len(heading) + len(ids)
    about = {
        **about_run("restyle", model.model, pipe, settings),
        "input": str(image),
        "prefix_groups": prefix_groups,
        "pictures": [
            {"label": names[i], "seed": seed} for (_, i), seed in zip(places, seeds, strict=True)
        ],
    }
    save_png(out, contact_sheet(tiles, columns if n > 1 else min(columns, WIDEST), scale), about)
    if json:
        say_json({**about, "files": [str(out)], "seconds": drawn.seconds})
        return
    say(f"{out}: the input beside {len(places)} results")
    say(drawn.speed(pipe))
