"""What the delivery thread does with what the lanes bring: events, winners, forks, results."""

import threading
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch

from dar_fast.engine.delivery import Delivery
from dar_fast.engine.events import GroupDrawn, Preview
from dar_fast.engine.request import BestOf, Candidates, Scorer
from dar_fast.engine.scheduler import Scheduler
from dar_fast.engine.stats import Counts
from dar_fast.engine.streams import Shipment, own
from dar_fast.engine.tasks import Job, Task
from dar_kernels.openmp import release_threads


class Outbox:
    """Of one board, whose lock `changed` is; each call queues one item of the delivery."""

    def __init__(
        self,
        delivery: Delivery,
        scheduler: Scheduler,
        scorers: Mapping[str, Scorer],
        changed: threading.Condition,
        counts: Counts,
    ) -> None:
        self.delivery, self.scheduler, self.scorers = delivery, scheduler, scorers
        self.changed, self.counts = changed, counts

    def group(self, task: Task, group: int, codes: Shipment, row: int) -> None:
        """A group of codes, row `row` of `[B, Q]`."""
        self.delivery.put(task.job, partial(self._group, task, group, codes, row))

    def preview(self, task: Task, step: int, shipment: Shipment, row: int, decisive: bool) -> None:
        """A preview, row `row` of `[B, 3, R, R]`; `decisive`: candidates are scored by it."""
        item = partial(self._preview, task, step, shipment, row, decisive)
        self.delivery.put(task.job, item)

    def result(self, task: Task, picture: Shipment | None) -> None:
        """The end of a job, with a picture or with codes alone."""
        self.delivery.put(task.job, partial(self._result, task, picture))

    def _group(self, task: Task, group: int, codes: Shipment, row: int) -> None:
        drawn = own(codes.unpack()[0][row])
        job = task.job
        with self.changed:
            task.codes.append(drawn)
            self.ripen(job)
        if job.request.previews and job.request.output == "codes":
            job.tell(GroupDrawn(group=group, codes=own(drawn)))

    def ripen(self, job: Job) -> None:
        """Queue the forks whose codes are known."""
        if job.undecided:
            return
        task, Q = job.tasks[0], self.scheduler.group_size
        for fork in list(job.forks):
            if fork.fork_group > len(task.codes):
                continue
            job.forks.remove(fork)
            if fork.ended:
                continue
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

    def _preview(self, task: Task, step: int, shipment: Shipment, row: int, decisive: bool) -> None:
        image = own(shipment.unpack()[0][row])
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
        release_threads()
        if len(scores) != n or any(score != score for score in scores):
            raise ValueError(f"best_of.scorer: expected {n} numbers, got {scores}")
        with self.changed:
            if job.ended:
                return
            winner = job.choose(scores)
            self.ripen(job)
        job.announce(winner)

    def _result(self, task: Task, picture: Shipment | None) -> None:
        image = None if picture is None else own(picture.unpack()[0])
        with self.changed:
            if task.job.error is not None:  # a listener has raised since
                return
            self.counts.add(finished=1)
        task.job.finish(task, image)


__all__ = ["Outbox"]
