"""The embedded model in one command: tokenizer, prior, export, classifier, report, card, in order.

Calls resume one another: each works for at most `call_minutes`, saves and returns; the call that
ends the last stage writes the file `finished`. On a GPU behind calls of ten minutes:

    until [ -e runs/demo/finished ]; do dar train demo --size gpu --call-minutes 8; done
"""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dar_fast.files import atomic_write
from dar_train.card import CardRecipe, write_card
from dar_train.classifier import train_classifier
from dar_train.data import open_pictures
from dar_train.evaluate import EvaluateRecipe, evaluate
from dar_train.export import ExportRecipe, export_pipeline
from dar_train.prior_loop import train_prior
from dar_train.recipes import (
    PRIOR_DEMO,
    TOKENIZER_DEMO,
    ClassifierRecipe,
    PriorRecipe,
    TokenizerRecipe,
)
from dar_train.reporting import logger
from dar_train.tokenizer_loop import train_tokenizer

FINISHED = "finished"

# 64 x 64, 256 patches in the pixel DiT: as many parameters as at 32 x 32, so it fits the package
TOKENIZER_GPU = dataclasses.replace(
    TOKENIZER_DEMO, override=("image_size=64", "patch_size=8"), minutes=16.0, batch=32,
    compile=True, save_minutes=2.0, eval_minutes=4.0, eval_pictures=256,
)  # fmt: skip
PRIOR_GPU = dataclasses.replace(
    PRIOR_DEMO, minutes=6.0, batch=256, views=8, save_minutes=2.0, eval_minutes=2.0
)
CLASSIFIER_GPU = ClassifierRecipe(size=64, batch=256)


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoRecipe:
    """One command's settings; the sizes of the stages are the presets'.

    Raises:
        ValueError: where a number is out of its range.
    """

    data: Path = Path("emoji-32.npz")  # packed data set; of 64 x 64 pictures for the size gpu
    out: Path = Path("runs/demo")  # folder of all stages; the pipeline lands in its `pipeline`
    size: Literal["cpu", "gpu"] = "cpu"  # 32 x 32 in two hours of two cores, or 64 x 64 on a GPU
    call_minutes: float | None = None  # stop this call cleanly after about so many minutes
    device: str = "auto"  # auto, cpu, cuda or cuda:<n>
    threads: int | None = None  # CPU threads; the machine's own choice by default
    samples: int = 768  # pictures to sample for the report

    def __post_init__(self) -> None:
        if self.call_minutes is not None and not self.call_minutes > 0:
            raise ValueError(f"call_minutes: expected a positive number, got {self.call_minutes!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """The recipes of the three trainings; their folders, data and device come from the command."""

    tokenizer: TokenizerRecipe
    prior: PriorRecipe
    classifier: ClassifierRecipe


STAGES = {
    "cpu": Stages(tokenizer=TOKENIZER_DEMO, prior=PRIOR_DEMO, classifier=ClassifierRecipe()),
    "gpu": Stages(tokenizer=TOKENIZER_GPU, prior=PRIOR_GPU, classifier=CLASSIFIER_GPU),
}


def train_demo(recipe: DemoRecipe, stages: Stages | None = None) -> bool:
    """Work through the stages until all are over or the call's time is; True when all are.

    Raises:
        ValueError: where the data do not fit.
        TrainingError: where a loss stops being finite.
    """
    began = time.monotonic()
    stages = stages or STAGES[recipe.size]
    out = recipe.out
    open_pictures(recipe.data, stages.tokenizer.config().image_size)  # fails early

    def left() -> float | None:
        if recipe.call_minutes is None:
            return None
        return max(1e-9, recipe.call_minutes - (time.monotonic() - began) / 60)

    def over(name: str) -> bool:
        return (out / name / FINISHED).is_file()

    common: dict[str, Any] = {
        "data": recipe.data,
        "device": recipe.device,
        "threads": recipe.threads,
    }
    for name in ("tokenizer", "prior", "classifier"):
        if over(name):
            continue
        settings = common | {"out": out / name, "call_minutes": left()}
        if name == "tokenizer":
            ended = train_tokenizer(dataclasses.replace(stages.tokenizer, **settings))
        elif name == "prior":
            tokenizer = out / "tokenizer" / "tokenizer"
            ended = train_prior(dataclasses.replace(stages.prior, tokenizer=tokenizer, **settings))
        else:
            ended = train_classifier(dataclasses.replace(stages.classifier, **settings))
        if not ended:
            logger.info("%s goes on at the next call", name)
            return False
        _mark(out / name)
    pipeline = out / "pipeline"
    export_pipeline(
        ExportRecipe(
            tokenizer=out / "tokenizer" / "tokenizer", prior=out / "prior" / "prior", out=pipeline
        )
    )
    evaluate(
        EvaluateRecipe(
            pipeline=str(pipeline), data=recipe.data, out=out / "report", device=recipe.device,
            classifier=out / "classifier" / "classifier", threads=recipe.threads,
            samples=recipe.samples,
            runs=(out / "tokenizer", out / "prior", out / "classifier"),
        )
    )  # fmt: skip
    write_card(CardRecipe(report=out / "report", out=pipeline))
    _mark(out)
    return True


def _mark(folder: Path) -> None:
    with atomic_write(folder / FINISHED) as temporary:
        temporary.write_text("finished\n")
