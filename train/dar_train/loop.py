"""The loop of every training: batch, passes, clipping, optimizers, average; states and reports.

A step reads and writes every weight about 12 times beside the passes themselves. The order, the
draws and the augmentation are functions of (seed, step), so a resumed run is the uninterrupted one,
and on an accelerator nothing is read back within a step.
"""

import time
from collections.abc import Mapping
from typing import Generic

import torch
from torch import Tensor
from torch.profiler import record_function

from dar_train.checkpoints import Checkpoints, TrainState
from dar_train.data import chunks
from dar_train.draws import Draws
from dar_train.meter import Meter, Reading, to_host
from dar_train.optim import Ema, build_optimizers, progress, rate_scale, set_learning_rate
from dar_train.pace import Every, Now, Stop
from dar_train.parallel import Parallel
from dar_train.recipes import Recipe
from dar_train.reporting import Report, logger
from dar_train.shards import local
from dar_train.task import BatchT, Loss, Task, rows_of

AGREE_EVERY = 16  # steps between two looks at the first rank's clock, where there are several ranks


class TrainingError(RuntimeError):
    """Training cannot go on."""


class Loop(Generic[BatchT]):
    """A training run of `task` under `recipe`; `run` returns True when the whole run is over."""

    def __init__(self, recipe: Recipe, task: Task[BatchT], parallel: Parallel) -> None:
        self.recipe = recipe
        self.task = task
        self.parallel = parallel
        self.device = parallel.ranks.device
        self.optimizers = build_optimizers(
            task.model, recipe.optimizer, lr=recipe.lr, muon_lr=recipe.muon_lr,
            betas=recipe.betas, weight_decay=recipe.weight_decay,
        )  # fmt: skip
        self.ema = Ema(task.model, recipe.ema)
        self.now = Now(0, 0.0)
        self.samples = 0
        self.checkpoints = Checkpoints(
            recipe.out / "states", parallel.ranks, recipe.keep, recipe.async_save
        )
        self._unsaved = True
        self._flags: list[Reading] = []  # whether the steps so far were finite
        self._resume()

    # states

    def _resume(self) -> None:
        if self.recipe.start == "fresh":
            return
        state = self.checkpoints.find(self.recipe.start)
        if state is None:
            if self.recipe.start == "stable":
                raise ValueError(
                    f"start: expected a state named 'stable' in {self.recipe.out / 'states'}, "
                    "got none"
                )
            return
        extra: dict[str, Tensor] = {}
        weights = TrainState(self.task.model, self.ema.saved, self.optimizers, extra)
        record = self.checkpoints.load(state, weights)
        if record["seed"] != self.recipe.seed:
            raise ValueError(
                f"seed: expected {record['seed']} as in {state}, got {self.recipe.seed}"
            )
        self._unsaved = False
        self.now = Now(int(record["step"]), float(record["seconds"]))
        self.samples = int(record["samples"])
        self.ema.updates = int(record["ema_updates"])
        self.task.batches.load_state_dict(record["batches"])
        self.task.load_state_dict({**record["task"], **extra})
        logger.info("resumed %s: step %d, %.1f min", state, self.now.step, self.now.seconds / 60)

    def save(self, *, stable: bool = False) -> None:
        """Write a state; a stable one is kept, to train on from before the decay.

        Raises:
            TrainingError: where a weight is not finite; nothing is written then.
        """
        self._settle_flags(wait=True)
        self._check_weights()
        task = self.task.state_dict()
        extra = {name: value for name, value in task.items() if isinstance(value, Tensor)}
        record = {
            "step": self.now.step, "samples": self.samples, "seconds": self.now.seconds,
            "seed": self.recipe.seed, "recipe": self.recipe.to_dict(),
            "ema_updates": self.ema.updates, "batches": self.task.batches.state_dict(),
            "task": {name: value for name, value in task.items() if name not in extra},
        }  # fmt: skip
        weights = TrainState(self.task.model, self.ema.saved, self.optimizers, extra)
        pointers = ("latest", "stable") if stable else ("latest",)
        self.checkpoints.save(self.now.step, weights, record, pointers=pointers)

    def _check_weights(self) -> None:
        names, weights = zip(*self.task.model.named_parameters(), strict=True)
        bad = torch.stack([~local(weight).isfinite().all() for weight in weights])
        for name, shards in zip(names, self.parallel.sum(bad.float()).tolist(), strict=True):
            if shards:
                raise TrainingError(f"not saved: {name} is not finite; {self._last_good()}")

    def _last_good(self) -> str:
        return f"the last good state is {self.checkpoints.last or 'none (nothing was saved yet)'}"

    # one step

    @property
    def steps_done(self) -> int:
        """Optimizer steps so far."""
        return self.now.step

    @property
    def done(self) -> float:
        """Fraction of the whole run that is over."""
        budget = None if self.recipe.minutes is None else 60 * self.recipe.minutes
        return progress(self.now.step, self.recipe.steps, self.now.seconds, budget)

    def step(self) -> Mapping[str, Tensor]:
        """One optimizer step; returns detached scalars to report."""
        recipe = self.recipe
        scale = rate_scale(
            self.now.step, self.done, schedule=recipe.schedule, warmup=recipe.warmup,
            decay_fraction=recipe.decay_fraction, final=recipe.final_lr,
        )  # fmt: skip
        set_learning_rate(self.optimizers, scale)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        parts = self._passes()
        with record_function("clip"):
            norm = self.parallel.clip(recipe.grad_clip)
        self.now = self.now._replace(step=self.now.step + 1)
        self.samples += recipe.batch
        if self._finite(norm):
            with record_function("optimizer"):
                for optimizer in self.optimizers:
                    optimizer.step()
            with record_function("average"):
                self.ema.update()
        return {**parts, "grad_norm": norm, "rate": torch.tensor(scale)}

    def _passes(self) -> dict[str, Tensor]:
        """Gradients of the next batch, micro-batch by micro-batch; mean scalars of this rank."""
        recipe, task, ranks = self.recipe, self.task, self.parallel.ranks
        with record_function("data"):
            batch = task.batches.next()
        count = len(batch[0])
        positions = torch.arange(count) + ranks.rank * count
        draws = Draws(recipe.seed, self.now.step, recipe.batch, positions, self.device)
        rows = task.arrange(batch, draws)
        whole = rows is None and (recipe.micro_batch or count) >= count
        pieces = chunks(torch.arange(count) if rows is None else rows, recipe.micro_batch or count)
        sums: dict[str, Tensor] = {}
        for i, piece in enumerate(pieces):
            part_batch = batch if whole else rows_of(batch, piece)
            part_draws = draws if whole else draws.take(piece)
            part_draws.seed_module(ranks.rank)
            weight = len(piece) / count
            with self.parallel.accumulating(i + 1 < len(pieces)):
                with record_function("forward"):
                    loss: Loss = task.loss(part_batch, part_draws)
                with record_function("backward"):
                    (loss.total * weight).backward()  # type: ignore[no-untyped-call]
            for name, value in (("loss", loss.total), *loss.parts.items()):
                scaled = value.detach() * weight
                sums[name] = sums[name] + scaled if name in sums else scaled
        self._last = part_batch, part_draws
        return sums

    def _finite(self, norm: Tensor) -> bool:
        """Whether to apply this step; the norm is that of all ranks' gradients, so all agree.

        On an accelerator the answer comes a few steps late, but for `skip`, which waits for it.

        Raises:
            TrainingError: where a step was not finite and the recipe says to stop.
        """
        host, copied = to_host(torch.isfinite(norm).reshape(1))
        self._flags.append(Reading(self.now.step, ("finite",), host, copied, {}))
        skip = self.recipe.nonfinite == "skip"
        return self._settle_flags(wait=skip or self.device.type != "cuda")

    def _settle_flags(self, *, wait: bool) -> bool:
        finite = True
        while self._flags and (wait or self._flags[0].ready):
            flag = self._flags.pop(0)
            if flag.numbers()["finite"]:
                continue
            message = f"step {flag.step}: the gradients are not finite"
            if self.recipe.nonfinite == "stop":
                raise TrainingError(f"{message}; {self._last_good()}")
            logger.warning("%s: skipped", message)
            finite = False
        return finite

    # the run

    def run(self) -> bool:
        """Train until the run is over, the call's time is up, or a signal comes; save in any case.

        Raises:
            TrainingError: where gradients or a weight stop being finite; nothing is saved then.
        """
        recipe, stop = self.recipe, Stop()
        self.task.model.train()
        report = Report(recipe.out, self.task.title, self.now.step, self.parallel.ranks.first)
        try:
            with report, stop.listening():
                self._train(report, stop)
                if self.now.stop is not None:
                    logger.info("stopped by %s", self.now.stop)
                if self._unsaved:
                    self.save()
                self.checkpoints.wait()
                logger.info("saved %s", self.checkpoints.last)
                if self.now.stop is None:
                    self._evaluate(report)
        finally:
            self.task.batches.close()
        return self.done >= 1.0

    def _train(self, report: Report, stop: Stop) -> None:
        recipe = self.recipe
        start = self.now
        end = start.seconds + (60 * recipe.call_minutes if recipe.call_minutes else float("inf"))
        log = Every(recipe.log_minutes, recipe.log_steps, start)
        evaluate = Every(recipe.eval_minutes, recipe.eval_steps, start)
        save = Every(recipe.save_minutes, recipe.save_steps, start)
        stable = self.done >= 1 - recipe.decay_fraction  # nothing to mark when resumed in the decay
        began = time.monotonic()
        meter, readings, notes = Meter(), list[Reading](), dict[str, float]()
        logged, logged_samples = began, self.samples
        while self.done < 1.0 and self.now.stop is None and self.now.seconds < end:
            meter.add(self.step())
            notes |= self.task.after_step(*self._last, self)
            self._unsaved = True
            self._agree(start.seconds + time.monotonic() - began, stop.reason)
            report.progress(self.done, f"step {self.now.step} {self.task.title}")
            self._write(report, readings)
            if log.due(self.now):
                passed = time.monotonic() - logged  # the ranks' common clock moves in leaps
                rate = (self.samples - logged_samples) / passed
                timing = {"images_per_s": rate, "minutes": self.now.seconds / 60}
                readings.append(self._reading(meter, notes | self.task.notes() | timing))
                self._write(report, readings)
                logged, logged_samples, notes = time.monotonic(), self.samples, {}
            if not stable and self.done >= 1 - recipe.decay_fraction:
                stable = True
                if recipe.schedule in ("linear", "wsd"):
                    self.save(stable=True)
                    self._unsaved = False
            elif save.due(self.now):
                self.save()
                self._unsaved = False
            if evaluate.due(self.now):
                self._evaluate(report)
        self._write(report, readings, wait=True)

    def _agree(self, seconds: float, reason: str | None) -> None:
        """Move this rank's clock; several ranks follow the first one's."""
        if self.parallel.ranks.world > 1:
            if self.now.step % AGREE_EVERY and self.done < 1.0:
                return
            seconds, reason = self.parallel.share((seconds, reason))
        self.now = Now(self.now.step, seconds, reason)

    def _reading(self, meter: Meter, notes: dict[str, float]) -> Reading:
        names, means = meter.means()
        host, copied = to_host(self.parallel.mean(means))
        for message in self.task.batches.skipped():
            logger.warning("skipped %s", message)
        return Reading(self.now.step, names, host, copied, notes)

    def _write(self, report: Report, readings: list[Reading], *, wait: bool = False) -> None:
        while readings and (wait or readings[0].ready):
            reading = readings.pop(0)
            report.write("train", reading.step, reading.numbers())

    def _evaluate(self, report: Report) -> None:
        averaged = self.parallel.gathered(self.ema.module)
        if averaged is not None and self.parallel.ranks.first:
            averaged.eval()
            with torch.no_grad():
                report.write("held_out", self.now.step, self.task.evaluate(averaged, self.now.step))
        self.task.model.train()
