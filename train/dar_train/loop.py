"""The loop that both trainings share: schedule, step, average, budget, states, reports.

One step reads and writes every weight about 12 times beside the passes themselves; the order, the
draws and the augmentation are functions of (seed, step), so a resumed run is the uninterrupted one.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dar_train import checkpoints
from dar_train.data import Order, chunks, derived_seed
from dar_train.optim import Ema, build_optimizers, progress, rate_scale, set_learning_rate
from dar_train.recipes import Recipe
from dar_train.reporting import Report, logger

CHECK_EVERY = 16  # steps between looks at the loss on an accelerator, where each one waits for it


class TrainingError(RuntimeError):
    """Training cannot go on."""


class Loss(NamedTuple):
    """A scalar to minimise and detached scalars to report."""

    total: Tensor
    parts: dict[str, Tensor]


class Task(Protocol):
    """What a training adds to the loop."""

    title: str
    order: Order

    @property
    def model(self) -> nn.Module:
        """The module to train."""

    def loss(self, indices: Tensor, generator: torch.Generator) -> Loss:
        """The loss of the samples `indices`; every draw comes from `generator`."""

    def after_step(self, step: int, indices: Tensor, loop: "Loop") -> dict[str, float]:
        """Work between steps, 1-based; returns numbers to report at the next log line."""

    def notes(self) -> dict[str, float]:
        """Further numbers for a log line, counted since the last one."""

    def evaluate(self, averaged: nn.Module, step: int) -> dict[str, float]:
        """Held-out figures of the averaged model."""

    def extra_state(self) -> dict[str, object]:
        """Plain JSON to keep in the saved state."""

    def load_extra_state(self, state: dict[str, object]) -> None:
        """Restore `extra_state`."""


@dataclass
class Clock:
    """When something timed last happened, in training seconds."""

    minutes: float
    last: float = 0.0

    def due(self, now: float) -> bool:
        if now - self.last < 60 * self.minutes:
            return False
        self.last = now
        return True


@dataclass
class Stop:
    """Set by SIGINT and SIGTERM while a run lasts."""

    reason: str | None = None
    _old: dict[int, object] = field(default_factory=dict)

    @contextmanager
    def listening(self) -> Iterator[None]:
        def handler(number: int, frame: FrameType | None) -> None:
            self.reason = signal.Signals(number).name

        old = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                old[number] = signal.signal(number, handler)
        except ValueError:  # only the main thread may listen; elsewhere signals are not ours
            logger.debug("not in the main thread: no signal handlers")
        try:
            yield
        finally:
            for number, previous in old.items():
                signal.signal(number, previous)


def pick_device(name: str) -> torch.device:
    """The device a recipe asks for; auto is the first accelerator, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:<n>, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: expected an available device, got {name!r} without a GPU")
    return device


class Loop:
    """A training run of `task` under `recipe`; `run` returns True when the whole run is over."""

    def __init__(self, recipe: Recipe, task: Task, device: torch.device) -> None:
        self.recipe = recipe
        self.task = task
        self.device = device
        self.folder = recipe.out / "states"
        self.optimizers = build_optimizers(
            task.model, recipe.optimizer, lr=recipe.lr, muon_lr=recipe.muon_lr,
            betas=recipe.betas, weight_decay=recipe.weight_decay,
        )  # fmt: skip
        self.ema = Ema(task.model, recipe.ema)
        self.parameters = [p for p in task.model.parameters() if p.requires_grad]
        self.step = 0
        self.samples = 0
        self.seconds = 0.0  # of training, over all calls
        self.generator = torch.Generator(device)
        self.last_saved: Path | None = None
        self._resume()

    def _resume(self) -> None:
        if self.recipe.start == "fresh":
            return
        state = checkpoints.find_state(self.folder, self.recipe.start)
        if state is None:
            if self.recipe.start == "stable":
                raise ValueError(
                    f"start: expected a state named 'stable' in {self.folder}, got none"
                )
            return
        record = checkpoints.load_state(state, self.task.model, self.ema, self.optimizers)
        if record["seed"] != self.recipe.seed:
            raise ValueError(
                f"seed: expected {record['seed']} as in {state}, got {self.recipe.seed}"
            )
        self.step, self.samples = int(record["step"]), int(record["samples"])
        self.seconds = float(record["seconds"])
        self.task.load_extra_state(record["extra"])
        self.last_saved = state
        logger.info("resumed %s: step %d, %.1f min", state, self.step, self.seconds / 60)

    @property
    def done(self) -> float:
        """Fraction of the whole run that is over."""
        minutes = self.recipe.minutes
        budget = 60 * minutes if minutes is not None else None
        return progress(self.step, self.recipe.steps, self.seconds, budget)

    def save(self, *, stable: bool = False) -> None:
        """Write a state; a stable one is kept, to train on from before the decay."""
        for name, parameter in self.task.model.named_parameters():
            if not bool(parameter.detach().isfinite().all()):
                raise TrainingError(f"not saved: {name} is not finite; {self._last_good()}")
        self.last_saved = checkpoints.save_state(
            self.folder, self.task.model, self.ema, self.optimizers,
            {
                "step": self.step, "samples": self.samples, "seconds": self.seconds,
                "seed": self.recipe.seed, "recipe": self.recipe.to_dict(),
                "extra": self.task.extra_state(),
            },
            pointers=("latest", "stable") if stable else ("latest",),
        )  # fmt: skip

    def _last_good(self) -> str:
        return f"the last good state is {self.last_saved or 'none (nothing was saved yet)'}"

    def _train_step(self) -> Loss:
        recipe = self.recipe
        scale = rate_scale(
            self.step, self.done, schedule=recipe.schedule, warmup=recipe.warmup,
            decay_fraction=recipe.decay_fraction, final=recipe.final_lr,
        )  # fmt: skip
        set_learning_rate(self.optimizers, scale)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        indices = self.task.order.take(self.samples, recipe.batch)
        pieces = chunks(indices, recipe.micro_batch or recipe.batch)
        total = torch.zeros((), device=self.device)
        parts: dict[str, Tensor] = {}
        for i, piece in enumerate(pieces):
            seed = derived_seed(recipe.seed, 1, self.step, i)
            self.generator.manual_seed(seed)
            torch.manual_seed(seed)  # dropout inside the model
            part = self.task.loss(piece, self.generator)
            weight = len(piece) / len(indices)
            (part.total * weight).backward()  # type: ignore[no-untyped-call]
            total = total + part.total.detach() * weight
            for name, value in part.parts.items():
                scaled = value.detach() * weight
                parts[name] = parts[name] + scaled if name in parts else scaled
        norm = nn.utils.clip_grad_norm_(self.parameters, recipe.grad_clip)
        self.step += 1
        if self.device.type == "cpu" or self.step % CHECK_EVERY == 0:
            self._check_finite(total, norm)
        for optimizer in self.optimizers:
            optimizer.step()
        self.ema.update()
        self.samples += len(indices)
        self._indices = indices
        return Loss(total, {**parts, "grad_norm": norm, "rate": torch.tensor(scale)})

    def _check_finite(self, total: Tensor, norm: Tensor) -> None:
        if not bool(torch.isfinite(total + norm)):
            raise TrainingError(
                f"step {self.step}: the loss is {float(total):.4g} and the gradient norm "
                f"{float(norm):.4g}; {self._last_good()}"
            )

    def run(self) -> bool:
        """Train until the run is over, the call's time is up, or a signal comes; save in any case.

        Raises:
            TrainingError: where the loss or a weight stops being finite; nothing is saved then.
        """
        recipe, task, stop = self.recipe, self.task, Stop()
        call_seconds = 60 * recipe.call_minutes if recipe.call_minutes else float("inf")
        log, evaluate, save = (
            Clock(minutes, self.seconds)
            for minutes in (recipe.log_minutes, recipe.eval_minutes, recipe.save_minutes)
        )
        stable = self.done >= 1 - recipe.decay_fraction  # nothing to mark when resumed in the decay
        began, before = time.monotonic(), self.seconds
        sums: dict[str, Tensor] = {}
        notes: dict[str, float] = {}
        counted, logged_samples = 0, self.samples
        task.model.train()
        with Report(recipe.out, task.title) as report, stop.listening():
            while self.done < 1.0 and stop.reason is None and self.seconds - before < call_seconds:
                last_log = log.last
                loss = self._train_step()
                notes |= task.after_step(self.step, self._indices, self)
                self.seconds = before + time.monotonic() - began
                for name, value in (("loss", loss.total), *loss.parts.items()):
                    sums[name] = sums[name] + value if name in sums else value
                counted += 1
                report.progress(self.done, f"step {self.step} {task.title}")
                if log.due(self.seconds):
                    means = {name: float(value) / counted for name, value in sums.items()}
                    speed = (self.samples - logged_samples) / (self.seconds - last_log)
                    timing = {"images_per_s": speed, "minutes": self.seconds / 60}
                    report.write("train", self.step, means | notes | task.notes() | timing)
                    sums, notes, counted, logged_samples = {}, {}, 0, self.samples
                if not stable and self.done >= 1 - recipe.decay_fraction:
                    stable = True
                    if recipe.schedule in ("linear", "wsd"):
                        self.save(stable=True)
                elif save.due(self.seconds):
                    self.save()
                if evaluate.due(self.seconds):
                    self._evaluate(report)
                    self.seconds = before + time.monotonic() - began
            if stop.reason is not None:
                logger.info("stopped by %s", stop.reason)
            self._check_saved()
            if stop.reason is None:
                self._evaluate(report)
        return self.done >= 1.0

    def _check_saved(self) -> None:
        if self.last_saved is None or not self.last_saved.name.endswith(f"{self.step:08d}"):
            self.save()
        logger.info("saved %s at step %d", self.last_saved, self.step)

    def _evaluate(self, report: Report) -> None:
        figures = self.task.evaluate(self.ema.module, self.step)
        report.write("held_out", self.step, figures)
        self.task.model.train()
