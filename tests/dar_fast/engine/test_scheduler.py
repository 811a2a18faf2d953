"""Who is admitted, in which order, with which pages: the scheduler alone, no thread, no tensor."""

import pytest
from scheduler_helpers import K, Q, draw, end, fork_of, job, orders, scheduler, submitted

from dar_fast.engine import AdmissionError, QueueFullError
from dar_fast.engine.scheduler import AGING


def test_equals_are_admitted_in_order():
    host = scheduler(slots=2)
    submitted(host, *(job(i) for i in range(5)))
    first = host.admit()
    assert orders(first) == [0, 1]
    assert host.admit() == []
    end(host, first[:1])
    assert orders(host.admit()) == [2]


def test_priorities_go_first():
    host = scheduler(slots=4)
    submitted(host, *(job(i, priority=p) for i, p in enumerate([0, 2, -1, 2])))
    assert orders(host.admit()) == [1, 3, 0, 2]


@pytest.mark.parametrize("levels", [1, 3])
def test_who_waits_rises(levels):
    """`AGING` admissions of others are worth a level."""
    host = scheduler(slots=1)
    submitted(host, job(0))
    passed = 0
    for order in range(1, 1000):
        submitted(host, job(order, priority=levels))
        task = host.admit()[0]
        if task.job.order == 0:
            break
        passed += 1
        end(host, [task])
    assert passed == levels * AGING


def test_a_request_gets_exactly_its_pages():
    for guided, groups, pages in [(True, K, 4), (False, K, 2), (True, 4, 2), (False, 5, 2)]:
        host = scheduler(pages=pages)
        submitted(host, job(0, guided=guided, groups=groups))
        assert len(host.admit()) == 1
        assert host.pool.available == 0
        assert host.pool.used == 0  # promised, not taken
        (task,) = draw(host)
        assert host.pool.used == len(task.rows) == (2 if guided else 1)
        draw(host, groups - 1)
        assert host.pool.free == pages  # drawn to the end: given back before the picture is done
        short = scheduler(pages=pages - 1)
        with pytest.raises(AdmissionError, match=f"at most {pages - 1} pages, all there are, got"):
            short.check(job(0, guided=guided, groups=groups))


def test_the_first_in_the_queue_is_not_skipped():
    host = scheduler(pages=8, slots=4)
    submitted(host, job(0), job(1, candidates=2), job(2, guided=False, groups=1))
    assert orders(host.admit()) == [0]  # job 1 needs 8 pages; job 2 would fit
    assert [one.order for one in host.queued] == [1, 2]
    end(host, host.running[:])
    assert orders(host.admit()) == [1, 1]
    assert host.admit() == []
    end(host, host.running[:1])
    assert orders(host.admit()) == [2]


def test_candidates_start_together_or_not_at_all():
    host = scheduler(pages=100, slots=3)
    submitted(host, job(0), job(1, candidates=3, hold=2), job(2))
    assert orders(host.admit()) == [0]
    with pytest.raises(
        AdmissionError, match="at most 3 candidates, the engine's max_requests, got 4"
    ):
        host.check(job(3, candidates=4))
    end(host, host.running[:])
    started = host.admit()
    assert orders(started) == [1, 1, 1]
    draw(host, 2)
    assert host.to_draw() == []  # they hold until one has won
    winner = started[0].job.choose((0.0, 2.0, 1.0))
    assert (winner.index, winner.hold) == (1, None)
    host.vacate(host.sweep())
    assert len(host.free_slots) == 2
    assert host.to_draw() == [winner]


def test_a_full_queue():
    host = scheduler(queue=2, slots=1)
    submitted(host, job(0))
    host.admit()
    parent = host.running[0].job
    submitted(host, job(1))
    host.submit(job(2, fork_group=1), parent)
    with pytest.raises(QueueFullError, match="2 requests wait, the engine's max_queue"):
        host.check(job(3))
    host.drop(host.deferred[0])
    host.check(job(3))


@pytest.mark.parametrize("group", [1, 2, 4, 5])
def test_a_fork_goes_on_from_its_parents_pages(group):
    host = scheduler(pages=20)
    (parent,) = submitted(host, job(0))
    host.admit()
    draw(host, 5)
    used = host.pool.used
    fork_of(host, parent, 1, group)
    (task,) = host.admit()
    assert (task.drawn, task.inherited, task.parent) == (group, True, None)
    assert host.pool.used == used  # shared
    assert not task.can_step
    pages = parent.tasks[0].rows[0].pages
    batch = host.to_draw()
    assert orders(batch) == [0, 1]
    within = group * Q % 32 != 0
    copied = [source for one in batch for source, _ in one.copies]
    assert len(copied) == (2 if within else 0)  # by whoever writes first, in both rows
    if group == 5:
        assert batch[0].copies and not batch[1].copies and copied[0] in pages
    for one in batch:
        one.drawing = False
        host.drew(one)
    assert not task.inherited
    end(host, host.running[:])
    assert host.pool.available == host.pool.num_pages


@pytest.mark.parametrize(
    ("changes", "shares"),
    [({}, 2), ({"guided": False}, 1), ({"label": 2}, 0), ({"top_k": 5}, 2)],
    ids=["same", "unguided", "another label", "another filter"],
)
def test_what_a_fork_shares(changes, shares):
    host = scheduler(pages=20)
    (parent,) = submitted(host, job(0))
    host.admit()
    draw(host, 4)
    used = host.pool.used
    fork_of(host, parent, 1, 2, **changes)
    (task,) = host.admit()
    assert task.drawn == (2 if shares else 0)
    assert host.pool.shared == shares
    assert host.pool.used == used


def test_a_fork_of_one_that_is_done_draws_its_prefix_again():
    host = scheduler(pages=4)
    (parent,) = submitted(host, job(0))
    host.admit()
    draw(host, K)
    end(host, host.running[:])
    fork_of(host, parent, 1, 3)
    (task,) = host.admit()
    assert (task.drawn, task.inherited) == (0, False)
    assert task.token_row(Q).forced == tuple(range(Q))


def test_tasks_that_end_at_work_are_swept_when_it_is_done():
    host = scheduler()
    submitted(host, job(0), job(1))
    host.admit()
    batch = host.to_draw()
    batch[0].ended = True
    assert host.sweep() == []
    assert len(host.free_slots) == 2
    for task in batch:
        task.drawing = False
    assert orders(host.sweep()) == [0]
    assert host.pool.used == 2  # of the other
    assert len(host.free_slots) == 2  # until the device is done with it
    host.vacate(batch[:1])
    assert len(host.free_slots) == 3


def test_steps_go_to_the_longest_idle():
    host = scheduler(pages=40, slots=5)
    submitted(host, *(job(i, steps=20, reads=(1,) * 20) for i in range(5)))
    host.admit()
    draw(host)
    rounds = []
    for _ in range(21):
        batch = host.to_step(2)
        rounds.append(set(orders(batch)))
        for task in batch:
            task.stepping, task.stepped = False, task.stepped + 1
    for i in range(len(rounds) - 2):  # nobody waits for more than two batches of others
        assert set.union(*rounds[i : i + 3]) == set(range(5))
    busy = host.to_step(3)
    assert set(orders(busy)).isdisjoint(orders(host.to_step(5)))
