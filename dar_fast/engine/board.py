"""All jobs of one engine, shared by its lanes, its delivery and its users, under one lock.

Lanes take batches of tasks from here and bring back what they computed; whatever tells the user
goes through the delivery, in the order in which it happened.
"""

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from dar_fast.engine.delivery import Delivery
from dar_fast.engine.errors import (
    DeadlineError,
    EngineClosedError,
    EngineError,
    RequestCancelledError,
    RequestFailedError,
)
from dar_fast.engine.events import GroupDrawn, Preview
from dar_fast.engine.request import BestOf, Candidates, Scorer
from dar_fast.engine.scheduler import Scheduler
from dar_fast.engine.stats import Counts, Stats
from dar_fast.engine.streams import Mark, Shipment
from dar_fast.engine.tasks import Job, Task


class Board:
    """See the module; lanes hold `changed` only while they pick or bring, never while they work."""

    def __init__(self, scheduler: Scheduler, scorers: dict[str, Scorer]) -> None:
        self.scheduler, self.scorers = scheduler, scorers
        self.changed = threading.Condition()
        self.counts = Counts()
        self.delivery = Delivery(self.fail)
        self.closing = False

    # -- users ---------------------------------------------------------------------------------

    def submit(self, job: Job, parent: Job | None = None) -> None:
        """Queue a job, behind the codes of `parent` where it is a fork.

        Raises:
            EngineClosedError: after `close`.
            AdmissionError, QueueFullError: see `Scheduler.check`.
        """
        with self.changed:
            try:
                if self.closing:
                    raise EngineClosedError("engine: expected an open one, got one that is closed")
                self.scheduler.check(job)
            except (EngineError, ValueError):
                self.counts.add(refused=1)
                raise
            self.counts.add(submitted=1)
            self.scheduler.submit(job, parent)
            if parent is not None:
                self._ripen(parent)
            self.changed.notify_all()

    def cancel(self, job: Job) -> None:
        """End a job that has not ended."""
        error = RequestCancelledError(f"request {job.handle.number}: cancelled")
        self._end(job, error, "cancelled")

    def fail(self, job: Job, cause: Exception) -> None:
        """End a job that has not ended, because of `cause`."""
        error = RequestFailedError(f"request {job.handle.number}: {type(cause).__name__}: {cause}")
        error.__cause__ = cause
        self._end(job, error, "failed")

    def _end(self, job: Job, error: Exception, count: str) -> None:
        with self.changed:
            if job.ended:
                return
            for task in job.tasks:
                task.ended = True
            self.scheduler.drop(job)
            self.counts.add(**{count: 1})
            self.delivery.put(job, partial(job.fail, error))
            for fork in list(job.forks):
                self._orphan(fork, error)
            self.changed.notify_all()

    def _orphan(self, fork: Job, error: Exception) -> None:
        if fork in self.scheduler.deferred:
            self.fail(fork, error)

    def close(self, drain: bool) -> None:
        """Take no more jobs; cancel those there are, or let them finish."""
        with self.changed:
            self.closing = True
            if not drain:
                for job in self._jobs():
                    self.cancel(job)
            self.changed.notify_all()

    def _jobs(self) -> list[Job]:
        waiting = [*self.scheduler.queued, *self.scheduler.deferred]
        return list(dict.fromkeys([*waiting, *(task.job for task in self.scheduler.running)]))

    def stats(self) -> Stats:
        with self.changed:
            scheduler = self.scheduler
            return replace(
                self.counts.values,
                queued=len(scheduler.queued) + len(scheduler.deferred),
                running=len(scheduler.running),
                pages=scheduler.pool.num_pages,
                pages_used=scheduler.pool.used,
            )

    # -- lanes ---------------------------------------------------------------------------------

    def take(self, pick: Callable[[], list[Task]]) -> list[Task]:
        """What `pick` finds, waiting until it finds something; empty where the engine is done."""
        with self.changed:
            while True:
                self._sweep()
                batch = pick()
                if batch:
                    return batch
                if self.closing and not self._jobs():
                    self.changed.notify_all()
                    return []
                self.changed.wait(self._patience())

    def _sweep(self) -> None:
        """End what is too late, free what has ended."""
        now = time.monotonic()
        for job in self._jobs():
            if job.expires <= now and not job.ended:
                error = DeadlineError(
                    f"request {job.handle.number}: not done {job.request.deadline} s after it came"
                )
                self._end(job, error, "expired")
        gone = self.scheduler.sweep()
        if gone:
            self.scheduler.vacate(gone)
            self.changed.notify_all()

    def _patience(self) -> float | None:
        """Seconds until the next deadline."""
        nearest = min((j.expires for j in self._jobs() if not j.ended), default=float("inf"))
        return None if nearest == float("inf") else max(0.0, nearest - time.monotonic()) + 1e-3

    def to_draw(self) -> list[Task]:
        """The token lane's pick: admits, then all that can draw."""
        for task in self.scheduler.admit():
            job = task.job
            job.started = job.started or time.monotonic()
            for group in range(task.drawn):  # of a fork, taken over with its parent's pages
                first = group * self.scheduler.group_size
                codes = torch.tensor(task.plan.prefix[first : first + self.scheduler.group_size])
                self._ship_group(task, group, Shipment([codes[None]], Mark()), 0)
        return self.scheduler.to_draw()

    @property
    def diffusion_waits(self) -> bool:
        """Whether the diffusion lane works, or could."""
        return any(t.stepping or t.can_step for t in self.scheduler.running)

    def retried(self, batches: int) -> None:
        """Count batches that were run again."""
        if batches:
            with self.changed:
                self.counts.add(retries=batches)

    def drew(self, tasks: list[Task], codes: Shipment) -> None:
        """Bring a group of codes `[B, Q]`, one row a task."""
        with self.changed:
            for i, task in enumerate(tasks):
                task.drawing = False
                if task.ended:
                    continue
                self._ship_group(task, task.drawn, codes, i)
                self.scheduler.drew(task)
                if task.complete and not task.plan.steps:
                    self._finish(task, None)
            self.counts.add(groups=len(tasks), group_batches=1)
            self.changed.notify_all()

    def stepped(self, tasks: list[Task], previews: Tensor, shipment: Shipment | None) -> None:
        """Bring the previews `[B, 3, R, R]` of a solver step, one row a task."""
        with self.changed:
            for i, task in enumerate(tasks):
                task.stepping = False
                if task.ended:
                    continue
                task.stepped += 1
                if task.plan.early and task.stepped == task.plan.steps:
                    task.estimate = previews[i]
                if shipment is not None and (task.job.undecided or task.job.request.previews):
                    decisive = task.job.undecided and not task.can_step_later
                    item = partial(self._deliver_preview, task, task.stepped, shipment, i, decisive)
                    self.delivery.put(task.job, item)
            self.counts.add(steps=len(tasks), step_batches=1)
            self.changed.notify_all()

    def finish(self, task: Task, picture: Shipment) -> None:
        """Bring a picture."""
        with self.changed:
            task.stepping = False
            if not task.ended:
                self._finish(task, picture)
            self.changed.notify_all()

    def failed(self, tasks: Iterable[tuple[Task, Exception]]) -> None:
        """Bring tasks that failed alone, each with its cause."""
        for task, error in tasks:
            with self.changed:
                task.drawing = task.stepping = False
            self.fail(task.job, error)

    def _finish(self, task: Task, picture: Shipment | None) -> None:
        task.ended = True
        self.counts.add(finished=1)
        self.delivery.put(task.job, partial(self._deliver_result, task, picture))

    # -- delivery ------------------------------------------------------------------------------

    def _ship_group(self, task: Task, group: int, codes: Shipment, row: int) -> None:
        self.delivery.put(task.job, partial(self._deliver_group, task, group, codes, row))

    def _deliver_group(self, task: Task, group: int, codes: Shipment, row: int) -> None:
        drawn = codes.unpack()[0][row].clone()
        job = task.job
        with self.changed:
            task.codes.append(drawn)
            self._ripen(job)
        if job.request.previews and job.request.output == "codes":
            job.tell(GroupDrawn(group=group, codes=drawn))

    def _ripen(self, job: Job) -> None:
        """Queue the forks whose codes are known."""
        if job.undecided:
            return
        task, Q = job.tasks[0], self.scheduler.group_size
        for fork in list(job.forks):
            if fork.fork_group > len(task.codes):
                continue
            job.forks.remove(fork)
            given = torch.cat(task.codes)[: fork.fork_group * Q].tolist()
            noise = fork.request.noise_seed
            for child in fork.tasks:
                child.parent = task
                child.plan = replace(
                    child.plan, prefix=tuple(given),
                    noise_seed=task.plan.noise_seed if noise is None else noise,
                )  # fmt: skip
            self.scheduler.ripe(fork)
        self.changed.notify_all()

    def _deliver_preview(
        self, task: Task, step: int, shipment: Shipment, row: int, decisive: bool
    ) -> None:
        image = shipment.unpack()[0][row].clone()
        codes = torch.cat(task.codes[: task.plan.reads[step - 1]])
        event = Preview(step=step, image=image, codes=codes)
        job = task.job
        if not job.undecided:
            if job.tasks[0] is task:
                job.tell(event)
            return
        if decisive:
            job.previews[task.index] = event
            if len(job.previews) == len(job.tasks):
                self._decide(job)

    def _decide(self, job: Job) -> None:
        """Score the candidates; all but the winner end."""
        best = job.request.best_of or BestOf(count=1, groups=1)
        scorer = self.scorers[best.scorer] if isinstance(best.scorer, str) else best.scorer
        n = len(job.tasks)
        codes = torch.stack([torch.cat(task.codes[: best.groups]) for task in job.tasks])
        pictures = torch.stack([job.previews[i].image for i in range(n)])
        given = scorer(Candidates(pictures, codes, job.request.label))
        scores = tuple(float(score) for score in given)
        if len(scores) != n or any(score != score for score in scores):
            raise ValueError(f"best_of.scorer: expected {n} numbers, got {scores}")
        with self.changed:
            if job.ended:
                return
            winner = job.choose(scores)
            self._ripen(job)
        job.announce(winner)

    def _deliver_result(self, task: Task, picture: Shipment | None) -> None:
        image = None if picture is None else picture.unpack()[0].clone()
        task.job.finish(task, image)


__all__ = ["Board"]
