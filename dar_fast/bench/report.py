"""The documents of the benches as lines that a person reads: the floor beside every figure."""

from typing import Any

Document = dict[str, Any]


def head(document: Document) -> list[str]:
    """What was timed, where, and the ceilings measured there."""
    reads = ", ".join(f"{k} {v / 1e9:.1f} GB/s" for k, v in document["read_bandwidth"].items())
    return [
        f"{document['bench']}: {document['model']}, guided, {document['device']}, "
        f"{document['threads']} threads, commit {document['commit']}",
        f"best of {document['turns']} turns; reading {reads}; "
        f"products {document['matrix_rate'] / 1e9:.0f} GFLOP/s",
    ]


def latency_lines(document: Document) -> list[str]:
    """part | weights | seconds | floor | share of it | beside plain or the ceiling."""
    lines = head(document)
    for row in document["rows"]:
        notes = []
        if "ratio" in row:
            notes.append(f"{row['ratio']:.2f}x plain")
        if "bytes_a_second" in row:
            share = 100 * row["of_bandwidth"]
            notes.append(f"{row['bytes_a_second'] / 1e9:.1f} GB/s, {share:.0f} % of the bandwidth")
        if "flops_a_second" in row:
            share = 100 * row["of_rate"]
            notes.append(f"{row['flops_a_second'] / 1e9:.0f} GFLOP/s, {share:.0f} % of the rate")
        lines.append(_row(f"{row['part']} | {row['weights']}", row, notes))
    first, least = document["first_preview_seconds"], document["first_preview_floor_seconds"]
    for kind in first:
        lines.append(
            f"{'first preview | ' + kind:32} | {first[kind]:9.4f} s | floor {least[kind]:9.4f} s | "
            f"plain {document['plain_first_preview_seconds']:.4f} s"
        )
    if document.get("host"):
        host = document["host"]
        lines.append(
            f"a code: {host['launches_a_code']:.2f} launches, "
            f"{1e6 * host['cpu_seconds_a_code']:.1f} us of the host"
        )
    return lines


def _row(name: str, row: Document, notes: list[str]) -> str:
    return (
        f"{name:32} | {row['seconds']:9.4f} s | floor {row['floor_seconds']:9.4f} s | "
        f"{100 * row['of_floor']:3.0f} % | {', '.join(notes)}"
    )


def throughput_lines(document: Document) -> list[str]:
    """A line a batch size, then the queue."""
    lines = head(document)
    for row in document["rows"]:
        notes = [
            f"{row['pictures_a_second']:.2f} pictures/s",
            f"{row['ratio_one_by_one']:.2f}x plain one by one",
            f"{row['ratio_batch']:.2f}x plain in a batch",
        ]
        if "ratio_not_overlapped" in row:
            notes.append(f"{row['ratio_not_overlapped']:.2f}x not overlapped")
        name = f"{document['requests']} pictures, batch {row['batch']} | {row['weights']}"
        lines.append(_row(name, row, notes))
    lines.append(
        f"plain: one by one {document['plain_one_by_one_seconds']:.3f} s, in one batch "
        f"{document['plain_batch_seconds']:.3f} s"
    )
    lines.append(
        f"first preview {document['first_preview_seconds']:.4f} s, floor "
        f"{document['first_preview_floor_seconds']:.4f} s, plain "
        f"{document['plain_first_preview_seconds']:.4f} s; a picture alone "
        f"{document['alone_seconds']:.4f} s, floor {document['alone_floor_seconds']:.4f} s"
    )
    queue = document["queue"]
    lines.append(
        f"queue: {queue['count']} requests, {queue['rate']:.3g} a second, load "
        f"{queue['load']:.2f}, {queue['refused']} refused: {_spread(queue['latency_seconds'])}; "
        f"floor {document['alone_floor_seconds']:.3f} s; plain one by one at load "
        f"{queue['plain_load']:.2f}, computed: {_spread(queue['plain_latency_seconds_computed'])}"
    )
    return lines


def _spread(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f} s" for name, value in values.items()) or "none"


def memory_lines(document: Document) -> list[str]:
    """The largest batches, then planned and measured bytes a batch size."""
    lines = [
        f"memory: {document['model']}, guided, planned for {document['planned_for']}, "
        f"{document['device']}, commit {document['commit']}"
    ]
    budget = document["budget_bytes"] / 1e9
    for kind, batch in document["largest_batch"].items():
        lines.append(f"largest batch in {budget:.1f} GB | {kind} | {batch} requests at once")
    for row in document["rows"]:
        found = row.get("why_not", "not run")
        if row["measured_bytes"] is not None:
            loaded, planned = (row[f"{k}_loaded_bytes"] / 1e9 for k in ("measured", "planned"))
            found = (
                f"measured {row['measured_bytes'] / 1e9:7.3f} GB, "
                f"{100 * row['measured_bytes'] / row['planned_bytes']:.0f} % of the plan; "
                f"the model alone {loaded:.3f} of {planned:.3f} GB"
            )
        plan = f"plan {row['planned_bytes'] / 1e9:7.3f} GB"
        lines.append(f"batch {row['batch']:3} | {row['weights']} | {plan} | {found}")
    return lines


__all__ = ["Document", "latency_lines", "memory_lines", "throughput_lines"]
