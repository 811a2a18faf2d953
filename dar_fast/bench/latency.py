"""One guided picture, from its submission to the finished picture, beside its floor.

The floor overlaps reading the prior's weights with the pixel DiT's products; see `floors`. Beside
the whole: the codes alone, and their first group in many short turns, against the bandwidth; the
DiT's steps alone against the matrix rate; the engine that does one after the other; the plain path.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from dar_fast.bench.floors import Floor, code_bytes, codes_bytes, picture_floor, step_flops
from dar_fast.bench.host import host_work
from dar_fast.bench.measure import Roofs, about, synchronize
from dar_fast.bench.models import Subject
from dar_fast.bench.ours import SCALE, Timing, draw, start_engine, warm_groups
from dar_fast.bench.plain import plain_draw
from dar_fast.bench.turns import Say, Turns, take_turns

Row = dict[str, Any]
# a group takes half a second: many short turns meet the memory at its fastest, as the probes do
GROUP_TURNS, GROUP_SECONDS = 12, 40.0


def dit_steps(subject: Subject) -> Callable[[], Timing]:
    """All solver steps of one picture under ready conditions, through the packed module."""
    tokenizer = subject.tokenizer
    N, S = tokenizer.config.num_tokens, tokenizer.config.num_steps

    @torch.no_grad()
    def run() -> Timing:
        codes = torch.zeros(1, N, dtype=torch.int64, device=subject.device)
        conditions, noise = tokenizer.conditions(codes), tokenizer.noise(0, 1)
        synchronize()
        start = time.perf_counter()
        solver = tokenizer.trajectory(noise, S)
        while not solver.done:
            tokenizer.advance(solver, conditions)
        synchronize()
        return Timing(time.perf_counter() - start, float("nan"))

    return run


def latency(
    subject: Subject, *, quantised: Sequence[str], turns: int, budget: float, say: Say
) -> dict[str, Any]:
    """The document of one run.

    Args:
        quantised: further kinds of prior weights: "int8", "fp8".
        turns: at most so many.
        budget: seconds that turns may take.
        say: told of every timing.
    """
    kinds = [subject.weights, *quantised]
    prior = subject.prior.config
    label = subject.labels(1)
    roofs = Roofs(
        subject.device,
        subject.tokenizer.dtype,
        {kind: code_bytes(prior, kind) for kind in kinds},
    )
    with contextlib.ExitStack() as stack:
        engines = {
            kind: stack.enter_context(start_engine(subject, kind, max_requests=1)) for kind in kinds
        }
        one_lane = stack.enter_context(
            start_engine(subject, subject.weights, max_requests=1, overlap=False)
        )
        subjects: dict[str, Callable[[], Timing]] = {}
        subjects["plain"] = partial(plain_draw, subject.plain, label)
        for kind, engine in engines.items():
            subjects[f"picture {kind}"] = partial(draw, engine, label)
            subjects[f"codes {kind}"] = partial(draw, engine, label, output="codes")
        subjects["not overlapped"] = partial(draw, one_lane, label)
        subjects["steps"] = dit_steps(subject)
        say("warming up")
        plain_draw(subject.plain, label, groups=1)
        for engine in (*engines.values(), one_lane):
            draw(engine, label, num_groups=warm_groups(subject))
        took = take_turns(subjects, roofs, turns=turns, budget=budget, say=say)
        groups = {
            f"group {kind}": partial(draw, engine, label, output="codes", num_groups=1)
            for kind, engine in engines.items()
        }
        took |= take_turns(groups, roofs, turns=GROUP_TURNS, budget=GROUP_SECONDS, say=say)
        stats = {kind: asdict(engine.stats()) for kind, engine in engines.items()}
        host = host_work(engines[subject.weights], label, prior.num_tokens, subject.device)
    return document(subject, kinds, took, roofs) | {"engine": stats, "host": host}


def document(
    subject: Subject, kinds: Sequence[str], took: dict[str, Turns], roofs: Roofs
) -> dict[str, Any]:
    """What the turns say, beside the floors."""
    floors = {
        kind: picture_floor(
            subject.prior.config, subject.tokenizer.config, kind,
            bandwidth=roofs.bandwidth[kind], rate=roofs.rate, itemsize=subject.kv_itemsize,
        )
        for kind in kinds
    }  # fmt: skip
    plain = took["plain"]
    seconds = {kind: took[f"picture {kind}"].seconds for kind in kinds}
    return {
        "bench": "latency", **about(subject.device), "model": subject.name, "guidance_scale": SCALE,
        "image_size": subject.tokenizer.config.image_size, "turns": len(plain.timings),
        "read_bandwidth": roofs.bandwidth, "matrix_rate": roofs.rate,
        "seconds": seconds,
        "plain_seconds": dict.fromkeys(kinds, plain.seconds),
        "floor_seconds": {kind: floors[kind].overlapped for kind in kinds},
        "ratio": {kind: plain.seconds / seconds[kind] for kind in kinds},
        "first_preview_seconds": {
            kind: took[f"picture {kind}"].first_preview for kind in kinds
        },
        "first_preview_floor_seconds": {kind: floors[kind].first_preview for kind in kinds},
        "plain_first_preview_seconds": plain.first_preview,
        "rows": rows(subject, kinds, took, floors, roofs),
    }  # fmt: skip


def rows(
    subject: Subject,
    kinds: Sequence[str],
    took: dict[str, Turns],
    floors: dict[str, Floor],
    roofs: Roofs,
) -> list[Row]:
    """Part by part: seconds, the floor, and the share of what the machine can."""
    native = subject.weights
    plain = took["plain"].seconds

    def row(part: str, kind: str, name: str, floor: float, **more: float) -> Row:
        least = took[name].seconds
        return {
            "part": part, "weights": kind, "seconds": least, "floor_seconds": floor,
            "of_floor": floor / least, **more, "all_seconds": took[name].all_seconds,
        }  # fmt: skip

    out = []
    for kind in kinds:
        name = f"picture {kind}"
        ratio = plain / took[name].seconds
        out.append(row("picture", kind, name, floors[kind].overlapped, ratio=ratio))
    name = "not overlapped"
    ratio = plain / took[name].seconds
    out.append(row("picture, not overlapped", native, name, floors[native].sequential, ratio=ratio))
    Q = subject.tokenizer.config.group_size
    for part, first, steps in (("codes alone", "codes", None), ("codes, first group", "group", Q)):
        for kind in kinds:
            name, bandwidth = f"{first} {kind}", roofs.bandwidth[kind]
            read = codes_bytes(
                subject.prior.config, kind, itemsize=subject.kv_itemsize, steps=steps
            )
            rate = read / took[name].seconds
            out.append(
                row(part, kind, name, floors[kind].group if steps else floors[kind].codes,
                    bytes_a_second=rate, of_bandwidth=rate / bandwidth)
            )  # fmt: skip
    c = subject.tokenizer.config
    rate = c.num_steps * step_flops(c) / took["steps"].seconds
    out.append(
        row("pixel DiT alone", native, "steps", floors[native].steps,
            flops_a_second=rate, of_rate=rate / roofs.rate)
    )  # fmt: skip
    out.append(row("picture, plain eager", native, "plain", floors[native].sequential, ratio=1.0))
    return out


__all__ = ["document", "latency", "rows"]
