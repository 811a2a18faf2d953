"""The options that commands share, and the model that they load."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from dar_fast.cli.report import working

if TYPE_CHECKING:
    import torch

    from dar_fast.pipeline import DARPipeline
    from dar_fast.sampling import GuidanceScale, PerGroup, Temperature

Json = Annotated[bool, arg(help_behavior_hint="")]
Scale = Annotated[
    int | None, arg(metavar="FACTOR", help_behavior_hint="(default: tiles of 128 pixels or more)")
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    arg(metavar="DTYPE", help_behavior_hint="(default: float32, bfloat16 on a GPU)"),
]
SHOWN = 16  # pictures of `dar sample` without a label


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """The model, and where it runs."""

    model: Annotated[str, arg(metavar="demo|PATH")] = "demo"
    """The embedded model, or a folder that `save_pretrained` or `dar convert` wrote."""
    device: Annotated[
        str | None, arg(metavar="DEVICE", help_behavior_hint="(default: a GPU if there is one)")
    ] = None
    """cpu, cuda, cuda:1, …"""
    dtype: Dtype = None
    """Type of the weights: float32, bfloat16 or float16."""
    prior_weights: Annotated[
        Literal["int8", "fp8"] | None,
        arg(metavar="int8|fp8", help_behavior_hint="(default: as the folder stores them)"),
    ] = None
    """Keep the prior's products in one byte a weight; fp8 needs a GPU."""

    def load(self) -> "DARPipeline":
        """The pipeline.

        Raises:
            ValueError: for a device or a dtype that is not there.
            CheckpointError, OSError: where the model cannot be read.
        """
        with working(f"loading {self.model}"):
            from dar_fast.engine import EngineConfig
            from dar_fast.pipeline import DARPipeline

            return DARPipeline.from_pretrained(
                self.model,
                device=check_device(self.device),
                dtype=torch_dtype(self.dtype),
                engine=EngineConfig(prior_weights=self.prior_weights or "as stored"),
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawOptions:
    """How pictures are drawn."""

    seed: Annotated[int, arg(metavar="SEED")] = 0
    """Seed of a label's first picture; the next pictures take the next seeds."""
    guidance: Annotated[str, arg(metavar="SCALE|FIRST:LAST|S,S,…")] = "4"
    """Classifier-free guidance: one scale, a linear schedule over the codes such as 1.1:8.0, or one
    scale a group of codes."""
    temperature: Annotated[str, arg(metavar="T|T,T,…")] = "1"
    """0 is greedy; one number, or one a group of codes."""
    top_k: Annotated[int, arg(metavar="K")] = 0
    """Codes kept by rank; 0 keeps all."""
    top_p: Annotated[float, arg(metavar="P")] = 1.0
    """Probability mass kept, in (0, 1]."""
    steps: Annotated[int | None, arg(metavar="S", help_behavior_hint="(default: the model's)")] = (
        None
    )
    """Denoising steps."""
    solver: Annotated[Literal["adams2", "euler"], arg(metavar="adams2|euler")] = "adams2"
    """How the steps are taken."""
    batch_size: Annotated[int, arg(metavar="B")] = 16
    """Pictures drawn together; a picture does not depend on it."""

    def settings(self) -> dict[str, Any]:
        """The keyword arguments of the pipeline.

        Raises:
            ValueError: where guidance or temperature cannot be read, or the batch size is not
                positive.
        """
        if self.batch_size < 1:
            raise ValueError(f"batch-size: expected an integer >= 1, got {self.batch_size}")
        return {
            "guidance_scale": parse_guidance(self.guidance),
            "temperature": parse_temperature(self.temperature),
            "top_k": self.top_k,
            "top_p": self.top_p,
            "num_inference_steps": self.steps,
            "solver": self.solver,
        }


MODEL, DRAWING = ModelOptions(), DrawOptions()


def parse_guidance(text: str) -> "GuidanceScale":
    """`"4"` to 4.0, `"1.1:8.0"` to (1.1, 8.0) and `"1,2,4,8"` to these scales, one a group."""
    wanted = "a number or FIRST:LAST such as 1.1:8.0, or one number a group such as 1,2,4,8"
    if ":" in text and "," not in text:
        scales = _numbers(text, ":")
        if len(scales) != 2:
            raise ValueError(f"guidance: expected {wanted}, got {text!r}")
        return scales[0], scales[1]
    return _number_or_groups("guidance", text, wanted)


def parse_temperature(text: str) -> "Temperature":
    """`"0.9"` to 0.9 and `"1,0.9"` to these temperatures, one a group."""
    wanted = "a number, or one a group such as 1,0.9,0.8,0.7"
    return _number_or_groups("temperature", text, wanted)


def _number_or_groups(option: str, text: str, wanted: str) -> "float | PerGroup":
    numbers = _numbers(text, ",")
    if not numbers:
        raise ValueError(f"{option}: expected {wanted}, got {text!r}")
    if len(numbers) == 1:
        return numbers[0]
    from dar_fast.sampling import PerGroup

    return PerGroup(tuple(numbers))


def _numbers(text: str, separator: str) -> list[float]:
    """The numbers of `text`; none where a part is no number."""
    try:
        return [float(part) for part in text.split(separator)]
    except ValueError:
        return []


def torch_dtype(name: str | None) -> "torch.dtype | None":
    """The dtype of that name."""
    import torch

    return None if name is None else getattr(torch, name)


def check_device(name: str | None) -> str | None:
    """The device as named, if this machine has it."""
    if name is None:
        return None
    import torch

    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" holds no values
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device: expected one that torch has here, got {name!r} ({reason})"
        ) from None
    return name


def find_labels(pipe: "DARPipeline", wanted: Sequence[str]) -> tuple[list[int], list[str]]:
    """Class ids and proper names of labels as typed; a number is an id if no label is called so.

    Raises:
        ValueError: where there is no such label; the message holds the nearest ones.
    """
    known = pipe.labels
    ids = pipe.get_label_ids(
        [int(w) if w.isascii() and w.isdecimal() and w not in known else w for w in wanted]
    )
    names = list(known)
    return ids, [names[i] if names else str(i) for i in ids]


# subjects of the embedded model for a good first sheet; other models get an even spread
SHOWN_SUBJECTS = (
    "cat-face", "animal-bug", "food-fruit", "face-smiling", "plant-flower", "transport-ground",
    "heart", "face-hat", "animal-bird", "food-sweet", "sport", "animal-marine",
    "musical-instrument", "clothing", "sky & weather", "food-vegetable",
)  # fmt: skip


def spread(names: Sequence[str], count: int) -> list[str]:
    """`count` label names, evenly apart; where names are style/subject, styles take turns.

    A fixed choice: the same model and count give the same names.
    """
    styles: dict[str, list[str]] = {}
    for name in names:
        styles.setdefault(name.rpartition("/")[0], []).append(name)
    groups = list(styles.values())
    if count <= len(SHOWN_SUBJECTS):
        shown = [
            f"{style}/{subject}"
            for style, subject in zip(itertools.cycle(styles), SHOWN_SUBJECTS[:count], strict=False)
        ]
        if set(shown) <= set(names):
            return shown
    chosen = []
    for i in range(count):
        group = groups[i % len(groups)]
        chosen.append(group[(2 * i + 1) * len(group) // (2 * count)])
    return chosen
