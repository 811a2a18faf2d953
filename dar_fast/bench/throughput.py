"""Pictures a second of n requests over batch sizes, and how long a request waits at a given load.

The floor of n pictures in batches of b: weights are read once a code and batch, keys and values
once a row; n pictures take n times the DiT's steps. The plain path draws them one by one and in one
batch. Arrivals are a seeded Poisson process; beside the engine stands a queue that the plain path
would serve one by one, computed from its measured seconds.
"""

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from dar_fast.bench.floors import code_bytes, picture_floor
from dar_fast.bench.measure import Roofs, about
from dar_fast.bench.models import Subject
from dar_fast.bench.ours import SCALE, Served, draw, serve, start_engine, warm_groups
from dar_fast.bench.plain import plain_draw
from dar_fast.bench.turns import Say, Turns, take_turns

Row = dict[str, Any]
PERCENTILES = (50, 90, 99)
LOAD = 0.7  # arrivals over the best throughput, where no rate is given


def poisson_arrivals(rate: float, count: int, seed: int = 0) -> list[float]:
    """Seconds from now at which `count` requests come, `rate` a second on average."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, count)
    return [float(at) for at in np.cumsum(gaps)]


def one_by_one(arrivals: Sequence[float], service: float) -> list[float]:
    """Latencies where each takes `service` seconds and waits for those before it."""
    latencies, free = [], 0.0
    for at in arrivals:
        free = max(free, at) + service
        latencies.append(free - at)
    return latencies


def percentiles(latencies: Sequence[float]) -> dict[str, float]:
    """p50, p90 and p99, each the latency of some request; none of none."""
    if not latencies:
        return {}
    values = np.percentile(np.asarray(latencies), PERCENTILES, method="inverted_cdf")
    return {f"p{p}": float(v) for p, v in zip(PERCENTILES, values, strict=True)}


def throughput(
    subject: Subject,
    *,
    quantised: Sequence[str],
    requests: int,
    batches: Sequence[int],
    rate: float | None,
    arrivals: int,
    turns: int,
    budget: float,
    say: Say,
) -> dict[str, Any]:
    """The document of one run.

    Args:
        quantised: further kinds of prior weights: "int8", "fp8".
        requests: n.
        batches: requests that the engine holds at once, smallest first.
        rate: of arrivals, pictures a second; None: LOAD of the best throughput.
        arrivals: requests of the queue.
        turns: at most so many.
        budget: seconds that turns may take.
        say: told of every timing.
    """
    kinds = [subject.weights, *quantised]
    prior = subject.prior.config
    labels = subject.labels(requests)
    sizes = {kind: code_bytes(prior, kind) for kind in kinds}
    roofs = Roofs(subject.device, subject.tokenizer.dtype, sizes)
    largest = max(batches)
    with contextlib.ExitStack() as stack:

        def start(kind: str, batch: int, overlap: bool = True) -> Any:
            return stack.enter_context(
                start_engine(subject, kind, max_requests=batch, overlap=overlap)
            )

        engines = {(kind, batch): start(kind, batch) for kind in kinds for batch in batches}
        one_lane = start(subject.weights, largest, overlap=False)
        subjects = {
            "plain one": partial(plain_draw, subject.plain, labels[:1]),
            "plain batch": partial(plain_draw, subject.plain, labels),
            "alone": partial(draw, engines[subject.weights, largest], labels[:1]),
            "not overlapped": partial(draw, one_lane, labels),
        }
        for (kind, batch), engine in engines.items():
            subjects[f"{kind} {batch}"] = partial(draw, engine, labels)
        say("warming up")
        plain_draw(subject.plain, labels[:1], groups=1)
        for engine in (*engines.values(), one_lane):
            draw(engine, labels, num_groups=warm_groups(subject))
        took = take_turns(subjects, roofs, turns=turns, budget=budget, say=say)
        rows = throughput_rows(subject, engines, requests, took, roofs)
        best = max(rows, key=lambda row: row["pictures_a_second"])
        load = LOAD * best["pictures_a_second"] if rate is None else rate
        say(f"queue: {arrivals} requests, {load:.3g} a second")
        at = poisson_arrivals(load, arrivals)
        served = serve(engines[best["weights"], best["batch"]], subject.labels(arrivals), at)
    alone, plain = took["alone"], took["plain one"]
    floor = picture_floor(
        prior, subject.tokenizer.config, subject.weights, itemsize=subject.kv_itemsize,
        bandwidth=roofs.bandwidth[subject.weights], rate=roofs.rate,
    )  # fmt: skip
    return {
        "bench": "throughput", **about(subject.device), "model": subject.name,
        "guidance_scale": SCALE, "requests": requests, "turns": len(plain.timings),
        "read_bandwidth": roofs.bandwidth, "matrix_rate": roofs.rate,
        "alone_seconds": alone.seconds, "alone_floor_seconds": floor.overlapped,
        "first_preview_seconds": alone.first_preview,
        "first_preview_floor_seconds": floor.first_preview,
        "plain_first_preview_seconds": plain.first_preview,
        "plain_one_by_one_seconds": requests * plain.seconds,
        "plain_batch_seconds": took["plain batch"].seconds,
        "not_overlapped_seconds": took["not overlapped"].seconds,
        "best": {key: best[key] for key in ("weights", "batch", "pictures_a_second")},
        "rows": rows,
        "queue": queue_row(best, load, at, served, plain.seconds),
    }  # fmt: skip


def throughput_rows(
    subject: Subject,
    engines: dict[tuple[str, int], Any],
    requests: int,
    took: dict[str, Turns],
    roofs: Roofs,
) -> list[Row]:
    """A row a kind of weights and batch size."""
    single, batched = requests * took["plain one"].seconds, took["plain batch"].seconds
    largest = max(batch for _, batch in engines)
    out = []
    for kind, batch in engines:
        least = took[f"{kind} {batch}"].seconds
        floor = picture_floor(
            subject.prior.config, subject.tokenizer.config, kind, pictures=requests, batch=batch,
            bandwidth=roofs.bandwidth[kind], rate=roofs.rate, itemsize=subject.kv_itemsize,
        ).overlapped  # fmt: skip
        row = {
            "weights": kind, "batch": batch, "seconds": least, "floor_seconds": floor,
            "of_floor": floor / least, "pictures_a_second": requests / least,
            "ratio_one_by_one": single / least, "ratio_batch": batched / least,
            "all_seconds": took[f"{kind} {batch}"].all_seconds,
        }  # fmt: skip
        if (kind, batch) == (subject.weights, largest):
            row["ratio_not_overlapped"] = took["not overlapped"].seconds / least
        out.append(row)
    return out


def queue_row(
    best: Row, rate: float, arrivals: Sequence[float], served: Served, plain: float
) -> Row:
    """Percentiles of the latency under load, and the plain path's, computed."""
    return {
        "weights": best["weights"], "batch": best["batch"], "rate": rate, "count": len(arrivals),
        "load": rate / best["pictures_a_second"], "refused": served.refused,
        "latency_seconds": percentiles(served.latencies), "plain_load": rate * plain,
        "plain_latency_seconds_computed": percentiles(one_by_one(arrivals, plain)),
    }  # fmt: skip


__all__ = [
    "one_by_one", "percentiles", "poisson_arrivals", "queue_row", "throughput",
    "throughput_rows",
]  # fmt: skip
