"""Training curves and the error by number of groups, as PNGs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dar_fast.files import atomic_write

SHOWN = {"train": ("loss",), "held_out": ("loss", "cross_entropy", "psnr", "subgroup", "style")}


def _new(rows: int = 1) -> tuple[Any, list[Any]]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("curves: matplotlib is missing: pip install matplotlib") from error
    figure = Figure(figsize=(6, 2.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(rows, 1, i + 1) for i in range(rows)]


def _save(figure: Any, file: Path) -> None:
    with atomic_write(file) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def draw_previews(previews: Sequence[dict[str, float]], file: Path) -> None:
    """PSNR of the jump estimate against the number of groups read."""
    figure, (axes,) = _new()
    axes.plot([p["groups"] for p in previews], [p["psnr"] for p in previews], marker="o")
    axes.set(xlabel="groups read", ylabel="PSNR, dB", title="Held-out reconstruction by groups")
    axes.grid(alpha=0.3)
    _save(figure, file)


def read_metrics(file: Path) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """(kind, name) to its points (step, value).

    Raises:
        ValueError: where the file is missing or is not JSON lines.
    """
    curves: dict[tuple[str, str], list[tuple[int, float]]] = {}
    try:
        records = [json.loads(line) for line in file.read_text().splitlines()]
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"curves: expected JSON lines in {file}, got {error}") from error
    for record in records:
        for name in SHOWN.get(record.get("kind"), ()):
            if name in record:
                point = (int(record["step"]), float(record[name]))
                curves.setdefault((record["kind"], name), []).append(point)
    return curves


def draw_metrics(file: Path, out: Path) -> None:
    """The losses of a run in one panel, and every other held-out figure in one of its own."""
    curves = read_metrics(file)
    losses = {key: points for key, points in curves.items() if key[1] in ("loss", "cross_entropy")}
    others = {key: points for key, points in curves.items() if key not in losses}
    figure, panels = _new(1 + len(others))
    for (kind, name), points in losses.items():
        panels[0].plot(*zip(*points, strict=True), label=f"{kind} {name}")
    panels[0].set(xlabel="step", ylabel="loss")
    if losses:
        panels[0].legend()
    for axes, ((_, name), points) in zip(panels[1:], others.items(), strict=True):
        axes.plot(*zip(*points, strict=True), marker=".")
        axes.set(xlabel="step", ylabel=f"held-out {name}")
    for axes in panels:
        axes.grid(alpha=0.3)
    _save(figure, out)
