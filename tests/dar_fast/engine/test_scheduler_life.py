"""The scheduler through any life: hypothesis submits, forks, draws, drops and sweeps."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from scheduler_helpers import K, Q, end, fork_of, job, scheduler

from dar_fast.engine import AdmissionError, QueueFullError


class Life(RuleBasedStateMachine):
    """Any order of submissions, draws, ends and forks: promises hold and all comes back."""

    def __init__(self):
        super().__init__()
        self.host = scheduler(pages=10, slots=3, queue=6)
        self.number = 0
        self.drawing = []
        self.parents = {}

    def new(self, **changes):
        self.number += 1
        return job(self.number, **changes)

    @rule(
        guided=st.booleans(), groups=st.integers(1, K), candidates=st.integers(1, 3),
        priority=st.integers(-1, 1),
    )  # fmt: skip
    def submit(self, guided, groups, candidates, priority):
        made = self.new(guided=guided, groups=groups, candidates=candidates, priority=priority)
        try:
            self.host.check(made)
        except (AdmissionError, QueueFullError):
            return
        self.host.submit(made)

    @rule(data=st.data())
    def fork(self, data):
        running = [t for t in self.host.running if t.drawn and not t.ended and t.plan.groups > 1]
        if not running or len(self.host.queued) >= 6:
            return
        task = data.draw(st.sampled_from(running))
        if task.job.undecided:
            return
        guided, label = data.draw(st.booleans()), data.draw(st.sampled_from([1, 1, 2]))
        group = data.draw(st.integers(1, min(task.drawn, K - 1)))
        fork_of(self.host, task.job, 10_000 + self.number, group, guided=guided, label=label)
        self.number += 1

    @rule()
    def admit(self):
        head = min(self.host.queued, key=self.host._keys.__getitem__, default=None)
        started = self.host.admit()
        if started:
            assert started[0].job is head

    @precondition(lambda self: not self.drawing)
    @rule()
    def pick(self):
        self.drawing = self.host.to_draw()

    @precondition(lambda self: self.drawing)
    @rule()
    def bring(self):
        for task in self.drawing:
            task.drawing = False
            if not task.ended:
                self.host.drew(task)
        self.drawing = []

    @rule(data=st.data())
    def drop(self, data):
        if self.host.running:
            data.draw(st.sampled_from(self.host.running)).ended = True

    @rule()
    def sweep(self):
        self.host.vacate(self.host.sweep())

    @invariant()
    def nothing_is_shared_that_is_written(self):
        host, writable = self.host, {}
        assert 0 <= host.pool.promised <= host.pool.free
        slots = [task.slot for task in host.running]
        assert sorted(slots + host.free_slots) == list(range(host.slots))
        for task in self.drawing:
            for row in task.rows:
                last = row.pages[(task.drawn * Q + Q - 1) // 32]
                assert writable.setdefault(last, row) is row

    def teardown(self):
        host = self.host
        self.bring()
        for one in [*host.queued]:
            host.drop(one)
        end(host, host.running[:])
        assert host.pool.available == host.pool.num_pages
        assert len(host.free_slots) == host.slots
        assert host.running == host.queued == []


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
