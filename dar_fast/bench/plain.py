"""The plain path: eager PyTorch through the modules, no weight packed or quantised, no engine."""

import time
from collections.abc import Iterator, Sequence

from dar_fast.bench.measure import synchronize
from dar_fast.bench.models import Plain
from dar_fast.bench.ours import SCALE, Timing
from dar_fast.frames import Frame, draw_frames
from dar_fast.request import make_request
from dar_kernels import prefer


def plain_frames(plain: Plain, labels: Sequence[int], groups: int | None = None) -> Iterator[Frame]:
    """Guided pictures of a batch, step by step; to be consumed under `prefer("torch")`."""
    request = make_request(
        list(labels), label_names={}, num_classes=plain.prior.config.num_classes,
        config=plain.tokenizer.config, seeds=0, guidance_scale=SCALE, temperature=1.0, top_k=0,
        top_p=1.0, num_inference_steps=None, solver="adams2", prefix_codes=None,
        num_groups=groups, output_type="pt", callback_on_step_end=None,
    )  # fmt: skip
    return draw_frames(plain, request)


def plain_draw(plain: Plain, labels: Sequence[int], groups: int | None = None) -> Timing:
    """Seconds of a batch by the plain path, whole or its first groups only."""
    with prefer("torch"):
        start = time.perf_counter()
        frames = plain_frames(plain, labels, groups)
        next(frames)
        synchronize()
        first = time.perf_counter() - start
        for _ in frames:
            pass
        synchronize()
        return Timing(time.perf_counter() - start, first)


__all__ = ["plain_draw", "plain_frames"]
