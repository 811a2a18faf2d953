"""All jobs of one engine, shared by its lanes, its delivery and its users, under one lock.

Lanes take batches of tasks from here and bring back what they computed; whatever tells the user
goes through the delivery, in the order in which it happened.
"""

import logging
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
from dar_fast.engine.outbox import Outbox
from dar_fast.engine.request import Scorer
from dar_fast.engine.scheduler import Scheduler
from dar_fast.engine.stats import Counts, Stats
from dar_fast.engine.streams import Mark, Shipment
from dar_fast.engine.tasks import Job, Task

log = logging.getLogger(__name__)


class Board:
    """See the module; lanes hold `changed` only while they pick or bring, never while they work.

    Args:
        scheduler: of the engine.
        scorers: built-in ones, by name.
        lanes: threads that take tasks, and leave when `take` gives none.
    """

    def __init__(self, scheduler: Scheduler, scorers: dict[str, Scorer], lanes: int = 2) -> None:
        self.scheduler = scheduler
        self.changed = threading.Condition()
        self.counts = Counts()
        self.delivery = Delivery(self.raised)
        self.outbox = Outbox(self.delivery, scheduler, scorers, self.changed, self.counts)
        self.closing = False
        self._lanes = lanes

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
                self.outbox.ripen(parent)
                if parent.error is not None:
                    self._orphan(job, parent.error)
            self.changed.notify_all()

    def cancel(self, job: Job) -> None:
        """End a job that has not ended."""
        error = RequestCancelledError(f"request {job.order}: cancelled")
        self._end(job, error, "cancelled")

    def fail(self, job: Job, cause: Exception) -> None:
        """End a job that has not ended, because of `cause`."""
        self._end(job, self._failure(job, cause), "failed")

    def raised(self, job: Job, cause: BaseException) -> None:
        """End a job whose user's code raised `cause`, though its result may be on the way."""
        with self.changed:
            if job.handle is None or job.error is not None:
                log.warning("request %d: raised after its end", job.order, exc_info=cause)
            else:
                self._end(job, self._failure(job, cause), "failed", finishing=True)

    def _failure(self, job: Job, cause: BaseException) -> RequestFailedError:
        error = RequestFailedError(f"request {job.order}: {type(cause).__name__}: {cause}")
        error.__cause__ = cause
        return error

    def _end(self, job: Job, error: Exception, count: str, finishing: bool = False) -> None:
        with self.changed:
            if job.error is not None or (job.ended and not finishing):
                return
            job.error = error
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

    def crash(self, error: BaseException) -> None:
        """Fail all jobs and take no more: a lane is gone."""
        with self.changed:
            self.closing = True
            cause = EngineError(f"engine: a lane stopped: {type(error).__name__}: {error}")
            cause.__cause__ = error
            for job in self._jobs():
                self.fail(job, cause)
                for task in job.tasks:
                    task.drawing = task.stepping = False
            self.changed.notify_all()

    def lane_left(self) -> None:
        """A lane's thread ends; after the last one nothing is left to deliver."""
        with self.changed:
            self._lanes -= 1
            if not self._lanes:
                self.delivery.close()

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

    def take(self, pick: Callable[[], list[Task]], rest: Callable[[], object]) -> list[Task]:
        """What `pick` finds, waiting until it finds something; empty where the engine is done.

        `rest` is called before each wait.
        """
        with self.changed:
            while True:
                self._sweep()
                batch = pick()
                if batch:
                    return batch
                if self.closing and not self._jobs():
                    self.changed.notify_all()
                    return []
                rest()
                self.changed.wait(self._patience())

    def _sweep(self) -> None:
        """End what is too late, free what has ended."""
        now = time.monotonic()
        for job in self._jobs():
            if job.expires <= now and not job.ended:
                error = DeadlineError(
                    f"request {job.order}: not done {job.request.deadline} s after it came"
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

    def to_draw(self, *, after_first_steps: bool = False) -> list[Task]:
        """The token lane's pick: admits, then all that can draw.

        `after_first_steps`: none before every running task with codes has its first preview.
        """
        for task in self.scheduler.admit():
            job = task.job
            job.started = job.started or time.monotonic()
            for group in range(task.drawn):  # of a fork, taken over with its parent's pages
                first = group * self.scheduler.group_size
                codes = torch.tensor(task.plan.prefix[first : first + self.scheduler.group_size])
                self.outbox.group(task, group, Shipment([codes[None]], Mark()), 0)
        if after_first_steps and any(
            task.stepped == 0 and (task.can_step or task.stepping)
            for task in self.scheduler.running
        ):
            return []
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
                self.outbox.group(task, task.drawn, codes, i)
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
                    self.outbox.preview(task, task.stepped, shipment, i, decisive)
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
                if not task.ended:
                    self.fail(task.job, error)

    def _finish(self, task: Task, picture: Shipment | None) -> None:
        task.ended, task.estimate = True, None
        self.outbox.result(task, picture)


__all__ = ["Board"]
