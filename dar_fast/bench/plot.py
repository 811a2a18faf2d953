"""The documents of the benches as pictures: what was measured beside its roof."""

import importlib.util
from pathlib import Path
from typing import Any

from dar_fast.files import atomic_write

OURS, PLAIN, ROOF = "#2c6fbb", "#b9bec7", "#c0392b"


def check_matplotlib() -> None:
    """Raise RuntimeError where matplotlib is missing; cheap, so done before the work."""
    if importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError(
            "plot: expected matplotlib, which is not installed: pip install matplotlib"
        )


def _figure(width: float, height: float) -> tuple[Any, Any]:
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def plot_latency(document: dict[str, Any]) -> Any:
    """A bar of seconds a part, its floor a line across it, the share of the floor beside it."""
    rows = document["rows"]
    figure, axes = _figure(8, 1 + 0.45 * len(rows))
    for i, row in enumerate(rows):
        plain = "plain" in row["part"]
        axes.barh(i, row["seconds"], color=PLAIN if plain else OURS, height=0.7)
        axes.plot([row["floor_seconds"]] * 2, [i - 0.42, i + 0.42], color=ROOF, linewidth=2.5)
        note = f" {row['seconds']:.3g} s, floor {100 * row['of_floor']:.0f} %"
        if "ratio" in row and not plain:
            note += f", {row['ratio']:.2f}x plain"
        axes.text(row["seconds"], i, note, va="center", fontsize=8)
    names = [f"{row['part']}, {row['weights']}" for row in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.45 * max(row["seconds"] for row in rows))
    axes.set(xlabel="seconds; red: the floor", title=_title(document))
    return figure


def plot_throughput(document: dict[str, Any]) -> Any:
    """Pictures a second over the batch size, a line a kind of weights, dashed its roof."""
    n = document["requests"]
    figure, axes = _figure(7, 4.2)
    for i, kind in enumerate(dict.fromkeys(row["weights"] for row in document["rows"])):
        rows = [row for row in document["rows"] if row["weights"] == kind]
        batches = [row["batch"] for row in rows]
        speeds = [row["pictures_a_second"] for row in rows]
        (line,) = axes.plot(batches, speeds, marker="so^"[i % 3], label=f"engine, {kind}")
        roofs = [n / row["floor_seconds"] for row in rows]
        axes.plot(batches, roofs, "--", color=line.get_color(), label=f"roof, {kind}")
    for name, key, style in (
        ("one by one", "plain_one_by_one_seconds", "-."),
        ("one batch", "plain_batch_seconds", ":"),
    ):
        axes.axhline(n / document[key], color="grey", linestyle=style, label=f"plain, {name}")
    batches = sorted({row["batch"] for row in document["rows"]})
    _powers(axes, batches)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="requests at once", ylabel="pictures a second", title=_title(document))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def plot_memory(document: dict[str, Any]) -> Any:
    """Planned GB over the batch size, dashed, measured ones as dots, and the budget."""
    figure, axes = _figure(7, 4.2)
    for kind in document["largest_batch"]:
        rows = [row for row in document["rows"] if row["weights"] == kind]
        planned = [row["planned_bytes"] / 1e9 for row in rows]
        (line,) = axes.plot([row["batch"] for row in rows], planned, "--", label=f"plan, {kind}")
        ran = [row for row in rows if row["measured_bytes"] is not None]
        measured = [row["measured_bytes"] / 1e9 for row in ran]
        axes.plot(
            [row["batch"] for row in ran], measured, "o", color=line.get_color(),
            label=f"measured, {kind}",
        )  # fmt: skip
    axes.axhline(document["budget_bytes"] / 1e9, color=ROOF, label="budget")
    _powers(axes, sorted({row["batch"] for row in document["rows"]}))
    axes.set_ylim(bottom=0)
    axes.set(xlabel="requests at once", ylabel="GB", title=_title(document))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def _powers(axes: Any, batches: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])


def _title(document: dict[str, Any]) -> str:
    return f"{document['model']}\n{document['device']}, {document['threads']} threads"


PLOTS = {"latency": plot_latency, "throughput": plot_throughput, "memory": plot_memory}


def save_plot(document: dict[str, Any], path: Path) -> None:
    """Write a document's picture as PNG.

    Raises:
        RuntimeError: where matplotlib is missing.
        OSError: where the file cannot be written.
    """
    figure = PLOTS[document["bench"]](document)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


__all__ = ["check_matplotlib", "plot_latency", "plot_memory", "plot_throughput", "save_plot"]
