"""What every training run has: a frozen recipe, whose values are checked together when it is made.

What needs a look at the machine, such as files and ranks, is `validate`'s.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from dar_fast.problems import ProblemsError
from dar_train.optim import Schedule
from dar_train.recipes.checks import (
    BELOW_ONE,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    Clash,
    Rule,
    expected_type,
    fits,
    hints,
)

Precision = Literal["bf16", "fp32"]
Start = Literal["latest", "stable", "fresh"]
_MINUTES = Rule("a positive number of minutes", POSITIVE.holds)
_STEPS = Rule("a positive number of steps", POSITIVE.holds)


def _is_device(name: str) -> bool:
    kind, colon, index = name.partition(":")
    return name in ("auto", "cpu", "cuda") or (
        kind == "cuda" and bool(colon) and index.isascii() and index.isdecimal()
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What every training run has.

    Raises:
        ProblemsError: a line for each value of another type, out of its range, or at odds with
            others.
    """

    RULES: ClassVar[dict[str, Rule]] = {
        "steps": POSITIVE,
        "minutes": _MINUTES,
        "call_minutes": _MINUTES,
        "batch": POSITIVE,
        "micro_batch": POSITIVE,
        "lr": POSITIVE,
        "muon_lr": POSITIVE,
        "betas": Rule("two numbers in [0, 1)", lambda pair: all(0 <= b < 1 for b in pair)),
        "weight_decay": NOT_NEGATIVE,
        "warmup": NOT_NEGATIVE,
        "decay_fraction": FRACTION,
        "final_lr": FRACTION,
        "ema": BELOW_ONE,
        "grad_clip": POSITIVE,
        "seed": Rule("a number >= 0", lambda x: 0 <= x < 2**63),
        "device": Rule("auto, cpu, cuda or cuda:<n>", _is_device),
        "threads": POSITIVE,
        "log_minutes": _MINUTES,
        "eval_minutes": _MINUTES,
        "save_minutes": _MINUTES,
        "log_steps": _STEPS,
        "eval_steps": _STEPS,
        "save_steps": _STEPS,
        "eval_pictures": POSITIVE,
        "keep": POSITIVE,
        "workers": NOT_NEGATIVE,
    }

    CLASHES: ClassVar[tuple[Clash, ...]] = (
        Clash(
            ("steps", "minutes"),
            lambda r: r.steps is None and r.minutes is None,
            lambda r: "steps, minutes: expected at least one of them, got neither",
        ),
        Clash(
            ("micro_batch", "batch"),
            lambda r: r.micro_batch is not None and r.micro_batch > r.batch,
            lambda r: f"micro_batch: expected 1 to the batch, got {r.micro_batch} of {r.batch}",
        ),
    )

    data: Path = Path("emoji-32.npz")  # packed .npz, image folder, tars, MDS shards, or hf:PATH
    out: Path = Path("runs/run")  # folder for states, metrics, pictures and the final weights
    start: Start = "latest"  # resume the newest state, the one before the decay, or start afresh
    steps: int | None = None  # optimizer steps of the whole run, over all calls
    minutes: float | None = None  # training minutes of the whole run, over all calls
    call_minutes: float | None = None  # stop this call cleanly after so many minutes; resume later
    batch: int = 64  # pictures an optimizer step
    micro_batch: int | None = None  # pictures a backward pass; the whole batch by default
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: hidden matrices only, AdamW for the rest
    lr: float = 2e-4  # peak rate of AdamW
    muon_lr: float = 0.02  # peak rate of Muon
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW
    weight_decay: float = 0.0  # on tensors of two or more dimensions
    warmup: int = 500  # steps of linear warm-up
    schedule: Schedule = "constant"  # shape of the learning rate after the warm-up
    decay_fraction: float = 0.2  # last part of the run over which linear and wsd fall
    final_lr: float = 0.0  # rate at the end, as a fraction of the peak
    ema: float = 0.999  # decay of the weight average; 0: none is kept
    grad_clip: float = 1.0  # largest gradient norm
    precision: Precision = "bf16"  # of the forward and backward pass; the weights stay in fp32
    seed: int = 0  # of the weights, the order and every draw
    device: str = "auto"  # auto, cpu, cuda or cuda:<n>
    compile: bool = False  # torch.compile on the training pass
    threads: int | None = None  # CPU threads; the machine's own choice by default
    log_minutes: float = 1.0  # between log lines
    eval_minutes: float = 10.0  # between evaluations of the averaged model on held-out pictures
    save_minutes: float = 5.0  # between saved states
    log_steps: int | None = None  # steps between log lines, in place of log_minutes
    eval_steps: int | None = None  # steps between evaluations, in place of eval_minutes
    save_steps: int | None = None  # steps between saved states, in place of save_minutes
    eval_pictures: int = 128  # held-out pictures an evaluation
    init: Path | None = None  # component folder or official .pt whose weights to start from
    keep: int = 2  # saved states kept
    async_save: bool = False  # write states while training goes on
    nonfinite: Literal["stop", "skip"] = "stop"  # at a loss that is not finite; skip: leave it out
    workers: int = 4  # processes that read pictures, a rank; 0: none
    attention: str | None = None  # back end of attention by name (dar doctor); None: by rule
    recompute: Literal["none", "selective", "full"] = "none"  # activations recomputed, not kept
    parallel: Literal["ddp", "fsdp"] = "ddp"  # many ranks: whole models, or shards of one
    float8: bool = False  # large products in float8, by torchao

    def __post_init__(self) -> None:
        types = hints(type(self))
        problems: dict[str, str] = {}
        for field in dataclasses.fields(self):
            value, rule = getattr(self, field.name), self.RULES.get(field.name)
            if not fits(value, types[field.name]):
                expected = expected_type(types[field.name])
            elif rule is not None and value is not None and not rule.holds(value):
                expected = rule.expected
            else:
                continue
            problems[field.name] = f"{field.name}: expected {expected}, got {shown(value)}"
        clashes = [
            clash.message(self)
            for clash in self.CLASHES
            if problems.keys().isdisjoint(clash.fields) and clash.clashes(self)
        ]
        if problems or clashes:
            raise ProblemsError([*problems.values(), *clashes])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))


def shown(value: object) -> str:
    """A value as a person wrote it: paths and texts in quotes, and not too much of it."""
    text = repr(str(value) if isinstance(value, Path) else value)
    return text if len(text) <= 80 else text[:77] + "..."
