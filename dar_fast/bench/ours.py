"""The engine as a bench drives it: requests at once or as they arrive, and what they took."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

from dar_fast.bench.models import Subject
from dar_fast.sampling import Sampling

if TYPE_CHECKING:
    from dar_fast.engine import Engine
    from dar_fast.quantization import WeightForm

SCALE = 4.0  # of guidance: two rows a request
AS_GIVEN = "as given"


class Timing(NamedTuple):
    """Seconds from the first submission."""

    seconds: float  # to the last result
    first_preview: float  # to the first request's first preview; NaN where there is none


class Served(NamedTuple):
    """Requests that came at given times."""

    latencies: list[float]  # of those served, from arrival to result, in order of arrival
    refused: int  # that came while the queue was full


def start_engine(
    subject: Subject, weights: str, *, max_requests: int, overlap: bool = True
) -> "Engine":
    """An engine over a subject's parts, with the prior's weights in `weights`."""
    from dar_fast.engine import Engine, EngineConfig

    kept = AS_GIVEN if weights == subject.weights else weights
    config = EngineConfig(
        max_requests=max_requests, prior_weights=cast("WeightForm", kept), overlap=overlap
    )
    return Engine(subject.prior, subject.tokenizer, config)


def warm_groups(subject: Subject) -> int | None:
    """Groups that warm an engine up: on a GPU all, since each is captured at its first use."""
    return 1 if subject.device.type == "cpu" else None


def draw(
    engine: "Engine",
    labels: Sequence[int],
    *,
    output: Literal["image", "codes"] = "image",
    num_groups: int | None = None,
) -> Timing:
    """Submit one guided request a label at once, and wait for all."""
    from dar_fast.engine import GenerationRequest, Preview

    first = float("nan")
    start = time.perf_counter()
    handles = [
        engine.submit(
            GenerationRequest(
                label=label, seed=seed, sampling=Sampling(guidance_scale=SCALE),
                output=output, num_groups=num_groups, previews=output == "image",
            )
        )
        for seed, label in enumerate(labels)
    ]  # fmt: skip
    if output == "image":
        for event in handles[0]:
            if isinstance(event, Preview):
                first = time.perf_counter() - start
                break
    for handle in handles:
        handle.result()
    return Timing(time.perf_counter() - start, first)


def serve(engine: "Engine", labels: Sequence[int], arrivals: Sequence[float]) -> Served:
    """Submit request i `arrivals[i]` seconds from now, whatever the others do."""
    from dar_fast.engine import GenerationRequest, QueueFullError

    refused = 0
    waiting = []
    start = time.perf_counter()
    for seed, (label, at) in enumerate(zip(labels, arrivals, strict=True)):
        time.sleep(max(0.0, start + at - time.perf_counter()))
        request = GenerationRequest(label=label, seed=seed, sampling=Sampling(guidance_scale=SCALE))
        late = time.perf_counter() - start - at
        try:
            waiting.append((engine.submit(request), late))
        except QueueFullError:
            refused += 1
    return Served([handle.result().seconds + late for handle, late in waiting], refused)


__all__ = ["SCALE", "Served", "Timing", "draw", "serve", "start_engine", "warm_groups"]
