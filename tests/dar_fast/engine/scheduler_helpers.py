"""Jobs of a scheduler without an engine, and turns of its lanes."""

import math
from dataclasses import replace

from dar_fast.engine import GenerationRequest
from dar_fast.engine.handle import Handle
from dar_fast.engine.pages import PagePool
from dar_fast.engine.request import Plan
from dar_fast.engine.scheduler import Scheduler
from dar_fast.engine.tasks import Job, Task

Q, K = 8, 6  # 48 codes: two pages a row, boundaries within them
PLAN = Plan(
    label=1, seed=0, noise_seed=0, guidance=(3.0,) * Q * K, temperatures=(1.0,) * Q * K, top_k=0,
    top_p=1.0, guided=True, prefix=(), groups=K, steps=0, num_steps=4, solver="adams2",
    early=False, reads=(),
)  # fmt: skip


def job(order, *, candidates=1, priority=0, hold=None, fork_group=0, **changes):
    """A submitted request of so many candidates, as the engine makes it."""
    request = GenerationRequest(label=1, priority=priority)
    made = Job(
        request=request, handle=Handle(order, lambda: None, None), order=order, expires=math.inf,
        fork_group=fork_group,
    )  # fmt: skip
    plan = replace(PLAN, **changes)
    made.tasks = [Task(plan=plan, job=made, index=i, hold=hold) for i in range(candidates)]
    return made


def scheduler(pages=16, slots=4, queue=8):
    return Scheduler(PagePool(pages), slots, queue, Q)


def submitted(host, *jobs):
    for one in jobs:
        host.check(one)
        host.submit(one)
    return jobs


def draw(host, groups=1):
    """Turns of the token lane; the tasks that drew in the last one."""
    batch = []
    for _ in range(groups):
        batch = host.to_draw()
        for task in batch:
            task.drawing = False
            host.drew(task)
    return batch


def orders(tasks):
    return [task.job.order for task in tasks]


def end(host, tasks):
    for task in tasks:
        task.ended = True
    host.vacate(host.sweep())


def fork_of(host, parent, order, group, **changes):
    """A fork whose parent's codes are known."""
    made = job(order, fork_group=group, prefix=tuple(range(group * Q)), **changes)
    for task in made.tasks:
        task.parent = parent.tasks[0]
    host.submit(made, parent)
    assert made in host.deferred
    assert made not in host.queued
    parent.forks.remove(made)
    host.ripe(made)
    return made
