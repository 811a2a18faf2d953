"""Who draws, who steps, who waits: host bookkeeping alone, no tensors and no threads.

Jobs wait in one bounded queue. The one with the highest priority + waiting goes first, where
`AGING` admissions of others count as one level: nobody is passed over for ever. The first job is
never skipped for a smaller one behind it. A job is admitted when a slot a task is free and the pool
can promise the pages that it may need at most, so a running task never runs out of pages.
"""

from collections.abc import Iterable

from dar_fast.engine.errors import AdmissionError, QueueFullError
from dar_fast.engine.pages import PagePool, PageRow, request_pages
from dar_fast.engine.streams import Mark
from dar_fast.engine.tasks import Job, Task

AGING = 8  # admissions a level of priority


class Scheduler:
    """State of all jobs of one engine, guarded by its lock.

    Args:
        pool: pages of the prior's keys and values.
        slots: tasks that run at once.
        max_queue: jobs that wait at most.
        group_size: codes a group.
    """

    def __init__(self, pool: PagePool, slots: int, max_queue: int, group_size: int) -> None:
        self.pool, self.slots, self.max_queue = pool, slots, max_queue
        self.group_size = group_size
        self.queued: list[Job] = []
        self.deferred: list[Job] = []  # forks that wait for their parent
        self.running: list[Task] = []
        self.free_slots = list(range(slots))[::-1]
        self.admissions = 0
        self._marks = [Mark()] * slots
        self._keys: dict[Job, tuple[float, int]] = {}
        self._turn = 0

    def _limit(self, task: Task) -> int:
        """Inputs that a row of the task holds in the end."""
        return task.plan.groups * self.group_size

    def _pages(self, task: Task) -> int:
        """Pages that a task may need at most: what it is promised."""
        own = task.plan.row_count
        shared = self._shared(task)
        forked = task.job.fork_group * self.group_size
        return request_pages(self._limit(task), own - len(shared)) + request_pages(
            self._limit(task), len(shared), forked
        )

    def _shared(self, task: Task) -> list[PageRow]:
        """Rows of the parent that a fork can go on from: all that it needs, or none."""
        parent = task.parent
        if parent is None or parent.ended or parent.plan.label != task.plan.label:
            return []  # keys and values know the label
        if len(parent.rows) < task.plan.row_count:
            return []
        return parent.rows[: task.plan.row_count]

    def check(self, job: Job) -> None:
        """Raise where the job can never run, or cannot wait now.

        Raises:
            AdmissionError: where it needs more slots or pages than there are at all.
            QueueFullError: where `max_queue` jobs wait.
        """
        pages = sum(request_pages(self._limit(t), t.plan.row_count) for t in job.tasks)
        if pages > self.pool.num_pages:
            raise AdmissionError(
                f"request: expected at most {self.pool.num_pages} pages, all there are, "
                f"got {pages} for {len(job.tasks)} of {job.tasks[0].plan.groups} groups"
            )
        if len(job.tasks) > self.slots:
            raise AdmissionError(
                f"best_of: expected at most {self.slots} candidates, the engine's max_requests, "
                f"got {len(job.tasks)}"
            )
        waiting = len(self.queued) + len(self.deferred)
        if waiting >= self.max_queue:
            raise QueueFullError(f"queue: {waiting} requests wait, the engine's max_queue")

    def submit(self, job: Job, parent: Job | None = None) -> None:
        """Queue a checked job; a fork whose parent is given waits until it is `ripe`."""
        if parent is None:
            self.queued.append(job)
            self._keys[job] = (self.admissions / AGING - job.request.priority, job.order)
        else:
            self.deferred.append(job)
            parent.forks.append(job)

    def ripe(self, job: Job) -> None:
        """Queue a fork whose parent's codes are known."""
        self.deferred.remove(job)
        self.submit(job)

    def admit(self) -> list[Task]:
        """Start the first jobs of the queue, as many as slots and pages allow; their tasks."""
        started: list[Task] = []
        while self.queued:
            job = min(self.queued, key=self._keys.__getitem__)
            needed = sum(map(self._pages, job.tasks))
            if len(job.tasks) > len(self.free_slots) or needed > self.pool.available:
                break
            self._forget(job)
            self.admissions += 1
            for task in job.tasks:
                self._start(task)
                started.append(task)
        return started

    def _start(self, task: Task) -> None:
        limit, shared = self._limit(task), self._shared(task)
        if shared:
            task.drawn, task.inherited = task.job.fork_group, True
            task.rows = [row.fork(task.drawn * self.group_size, limit) for row in shared]
        else:
            task.rows = [self.pool.row(limit) for _ in range(task.plan.row_count)]
        task.parent, task.slot = None, self.free_slots.pop()
        task.free = self._marks[task.slot]
        self.running.append(task)

    def _forget(self, job: Job) -> None:
        self.queued.remove(job)
        del self._keys[job]

    def drop(self, job: Job) -> None:
        """Take an ended job out of the queue, where it is there."""
        if job in self._keys:
            self._forget(job)
        elif job in self.deferred:
            self.deferred.remove(job)

    def to_draw(self) -> list[Task]:
        """Tasks for the next batch of the token lane, marked as drawing."""
        batch = [task for task in self.running if task.can_draw]
        for task in batch:
            task.drawing = True
            end = (task.drawn + 1) * self.group_size
            task.copies += [pair for row in task.rows for pair in row.reserve(end)]
        return batch

    def drew(self, task: Task) -> None:
        """A task's group is drawn; after the last one its pages are free."""
        task.drawn, task.inherited = task.drawn + 1, False
        task.copies.clear()
        for row in task.rows:
            row.advance(task.drawn * self.group_size)
        if task.drawn == task.plan.groups:
            self.release_pages(task)

    def to_finish(self) -> list[Task]:
        """Tasks whose picture is done, marked as stepping."""
        batch = [t for t in self.running if t.complete and not (t.stepping or t.ended)]
        for task in batch:
            task.stepping = True
        return batch

    def to_step(self, limit: int) -> list[Task]:
        """Tasks for the next batch of the diffusion lane, the longest idle first; now stepping."""
        ready = sorted((t for t in self.running if t.can_step), key=lambda task: task.turn)
        self._turn += 1
        for task in ready[:limit]:
            task.stepping, task.turn = True, self._turn
        return ready[:limit]

    def sweep(self) -> list[Task]:
        """Tasks that ended and that no lane works on; their pages are free now, their slots are
        not: `vacate` those when the device is done with them."""
        gone = [t for t in self.running if t.ended and not (t.drawing or t.stepping)]
        for task in gone:
            self.running.remove(task)
            self.release_pages(task)
        return gone

    def release_pages(self, task: Task) -> None:
        for row in task.rows:
            row.release()
        task.rows = []

    def vacate(self, tasks: Iterable[Task]) -> None:
        """Give slots back."""
        for task in tasks:
            self._marks[task.slot] = task.stepped_mark
            self.free_slots.append(task.slot)


__all__ = ["AGING", "Scheduler"]
