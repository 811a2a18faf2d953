"""Drawing in batches through the pipeline's stream; every picture has its own label and seed."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from dar_fast.cli.report import progress

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from dar_fast.pipeline import DARPipeline


@dataclass(slots=True, kw_only=True)
class Drawn:
    """Pictures in the order asked for."""

    images: list["Image.Image"] = field(default_factory=list)
    previews: list[list["Image.Image"]] = field(default_factory=list)  # a picture's, coarse to fine
    seconds: float = 0.0

    def speed(self, pipe: "DARPipeline") -> str:
        """How fast it was, in words."""
        count = len(self.images)
        some = "1 picture" if count == 1 else f"{count} pictures"
        each = "" if count == 1 else f", {self.seconds / count:.3f} s a picture"
        return f"{some} in {self.seconds:.2f} s{each} ({' '.join(where(pipe).values())})"

    def frames(self) -> list[list["Image.Image"]]:
        """All pictures after every step, then the finished ones."""
        return [*(list(frame) for frame in zip(*self.previews, strict=True)), self.images]


def draw(
    pipe: "DARPipeline",
    labels: Sequence[int],
    seeds: Sequence[int],
    settings: dict[str, Any],
    *,
    batch_size: int,
    prefix_codes: "Tensor | None" = None,
    text: str = "drawing",
) -> Drawn:
    """Draw picture i with `labels[i]`, `seeds[i]` and, where given, `prefix_codes[i]`."""
    steps = settings["num_inference_steps"] or pipe.tokenizer.config.num_steps
    images: dict[int, Image.Image] = {}
    previews: list[list[Image.Image]] = [[] for _ in labels]
    start = time.perf_counter()
    with progress(text, len(labels) * max(1, steps)) as advance:
        for first in range(0, len(labels), batch_size):
            part = slice(first, first + batch_size)
            for event in pipe.stream(
                list(labels[part]),
                seeds=list(seeds[part]),
                prefix_codes=None if prefix_codes is None else prefix_codes[part],
                **settings,
            ):
                image = cast("Image.Image", event.image)  # output_type "pil"
                if event.kind == "preview":
                    previews[first + event.index].append(image)
                    advance()
                else:
                    images[first + event.index] = image
    return Drawn(
        images=[images[i] for i in range(len(labels))],
        previews=previews,
        seconds=time.perf_counter() - start,
    )


def where(pipe: "DARPipeline") -> dict[str, str]:
    """Device and dtype of a pipeline."""
    return {"device": str(pipe.device), "dtype": str(pipe.dtype).removeprefix("torch.")}


def about_run(
    command: str, model: str, pipe: "DARPipeline", settings: dict[str, Any]
) -> dict[str, Any]:
    """What JSON and the metadata of a picture say first."""
    steps = settings["num_inference_steps"] or pipe.tokenizer.config.num_steps
    settings = {**settings, "num_inference_steps": steps}
    for name in ("guidance_scale", "temperature"):
        values = getattr(settings[name], "values", None)
        if values is not None:
            settings[name] = {"per_group": list(values)}
    return {"command": command, "model": model, **where(pipe), "settings": settings}


def steps_within(pipe: "DARPipeline", groups: int, num_steps: int | None) -> int:
    """Denoising steps that read the first `groups` groups only."""
    steps = pipe.tokenizer.config.num_steps if num_steps is None else num_steps
    read = groups * pipe.tokenizer.config.group_size
    return sum(pipe.tokenizer.group_start(i, steps) < read for i in range(steps))


def check_count(option: str, value: int | None) -> None:
    """Raise ValueError unless `value` is None or positive."""
    if value is not None and value < 1:
        raise ValueError(f"{option}: expected an integer >= 1, got {value}")
