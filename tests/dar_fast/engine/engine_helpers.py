"""What the tests of the engine share: the plain path of one request, checks, waiting, gates."""

import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from dar_fast.engine import Chosen, Finished, GenerationRequest, GroupDrawn, Preview
from dar_fast.sampling import Sampling

Q, K = 4, 4  # of the tiny pipeline
WARM = Sampling(guidance_scale=3.0, temperature=1.3)
LONG = 60.0  # seconds: a wait that takes longer has failed; the machine may be busy
PICTURE = 2e-5  # relative norm between the engine's picture and the plain path's


@dataclass(frozen=True)
class Plain:
    """What the plain path draws for one request."""

    codes: torch.Tensor  # [G Q]
    previews: list  # [3, R, R] a step
    reads: list  # codes that each step has
    image: torch.Tensor | None


@torch.no_grad()
def plain(parts, request, noise_seed=None, implementation="torch"):
    """Codes by `Prior.generation`, with torch's own ops, pictures by a trajectory of their own."""
    prior, tokenizer = parts.prior, parts.tokenizer
    c = tokenizer.config
    Q = c.group_size
    groups = c.num_groups if request.num_groups is None else request.num_groups
    prefix = torch.as_tensor(request.prefix_codes, dtype=torch.int64)[: groups * Q]
    steps = prior.generation(
        torch.tensor([request.label]), request.sampling, [request.seed], prefix[None], Q,
        implementation,
    )  # fmt: skip
    codes = torch.cat([next(steps) for _ in range(groups)], dim=1)
    if request.output == "codes":
        return Plain(codes[0], [], [], None)
    S = c.num_steps if request.num_steps is None else request.num_steps
    if noise_seed is None:
        noise_seed = request.seed if request.noise_seed is None else request.noise_seed
    run = tokenizer.trajectory(tokenizer.noise([noise_seed], 1), S, request.solver)
    conditions = tokenizer.conditions(codes)
    previews, reads = [], []
    while run.step < S:
        end = tokenizer.group_start(run.step, S) + Q
        if end > groups * Q:
            break
        tokenizer.advance(run, conditions)
        previews.append(run.preview()[0].clone())
        reads.append(codes[0, :end])
    early = groups < c.num_groups
    return Plain(codes[0], previews, reads, previews[-1] if early else run.image()[0])


def near(got, wanted, most=PICTURE):
    """Whether two pictures differ by no more than `most` in relative norm."""
    error = (got.double() - wanted.double()).norm() / wanted.double().norm()
    return bool(error <= most)


def check_result(result, wanted, most=PICTURE):
    """Equal codes, and the picture to tolerance."""
    assert result.codes.tolist() == wanted.codes.tolist()
    if wanted.image is None:
        assert result.image is None
    else:
        assert result.image.dtype == torch.float32
        assert near(result.image, wanted.image, most)


def check_events(events, wanted, request, group_size, most=PICTURE):
    """All events of a request that went well: which, in which order, with what in them."""
    end = events[-1]
    assert isinstance(end, Finished), end
    check_result(end.result, wanted, most)
    told = [e for e in events[:-1] if not isinstance(e, Chosen)]
    if not request.previews:
        assert told == []
    elif request.output == "codes":
        groups = wanted.codes.split(group_size)
        assert [e.group for e in told] == list(range(len(groups)))
        assert all(isinstance(e, GroupDrawn) for e in told)
        assert [e.codes.tolist() for e in told] == [g.tolist() for g in groups]
    else:
        assert all(isinstance(e, Preview) for e in told)
        steps = [e.step for e in told]
        if request.best_of is None:
            assert steps == list(range(1, len(wanted.previews) + 1))
        else:  # from the one that won on
            assert steps == list(range(steps[0], len(wanted.previews) + 1))
        for event in told:
            assert event.codes.tolist() == wanted.reads[event.step - 1].tolist()
            assert near(event.image, wanted.previews[event.step - 1], most)


def collect(handle):
    """All events; a handle that tells nothing more for long fails."""
    handle_done = threading.Event()
    events = []

    def read():
        events.extend(handle)
        handle_done.set()

    reader = threading.Thread(target=read, name="test reader", daemon=True)
    reader.start()
    assert handle_done.wait(LONG), f"request {handle.number} hangs after {events}"
    reader.join(LONG)
    return events


def until(condition, seconds=LONG):
    """Wait for something that other threads bring about."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.001)


def idle(engine):
    """Nothing is held: wait until the lanes have swept, then all pages and slots are free."""
    until(lambda: (lambda s: s.queued == s.running == 0)(engine.stats()))
    scheduler = engine._board.scheduler
    with engine._board.changed:
        assert scheduler.pool.free == scheduler.pool.available == scheduler.pool.num_pages
        assert scheduler.pool.promised == scheduler.pool.shared == 0
        assert sorted(scheduler.free_slots) == list(range(scheduler.slots))
        assert scheduler.queued == scheduler.deferred == scheduler.running == []
        assert not scheduler._keys
    stats = engine.stats()
    assert stats.pages_used == 0
    ends = stats.finished + stats.failed + stats.cancelled + stats.expired
    assert stats.submitted == ends, stats


class Gate:
    """Holds a runner's batches back until it is opened; counts those that came."""

    def __init__(self, owner, name):
        self.owner, self.name = owner, name
        self.run = getattr(owner, name)
        self.open = threading.Event()
        self.came = threading.Semaphore(0)
        setattr(owner, name, self)

    def __call__(self, *args, **options):
        self.came.release()
        assert self.open.wait(LONG), "a gate that nobody opened"
        return self.run(*args, **options)

    def wait(self):
        """Until a batch stands at the gate."""
        assert self.came.acquire(timeout=LONG)


@contextmanager
def held(engine, lane="tokens"):
    """The gate of one lane, open at the end whatever happens."""
    machine = engine._machine
    owner, name = {
        "tokens": (machine.lanes[0].runner, "run"),
        "diffusion": (diffusion(engine), "step"),
        "pictures": (machine.lanes[1], "work"),  # before it takes its cores
    }[lane]
    gate = Gate(owner, name)
    try:
        yield gate
    finally:
        gate.open.set()
        setattr(owner, name, gate.run)


def diffusion(engine):
    """The engine's `Diffusion`."""
    return engine._machine.lanes[1].diffusion


def conditions(engine):
    """The engine's `Conditions`."""
    return engine._machine.lanes[1].conditions


def codes_request(label=1, seed=0, **changes):
    return GenerationRequest(**{"label": label, "seed": seed, "output": "codes", **changes})


def image_request(label=1, seed=0, **changes):
    return GenerationRequest(**{"label": label, "seed": seed, **changes})


def as_prefixed(fork_request, parent_plain, group, group_size):
    """The request that a fork is the same as."""
    return replace(fork_request, prefix_codes=parent_plain.codes[: group * group_size].tolist())


UNGUIDED = Sampling(guidance_scale=1.0)


def scored_by(values, seen=None):
    """A scorer that gives what it was told, and keeps what it was shown."""

    def score(candidates):
        if seen is not None:
            seen.append(candidates)
        return values

    return score
