"""2,000 mixed requests on the embedded model: nothing is lost, leaked or starved."""

import gc
import random
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from engine_helpers import as_prefixed, check_result, idle, plain, until
from request_mixes import by_seed, winner

from dar_fast import DARPipeline
from dar_fast.engine import (
    BestOf,
    DeadlineError,
    Engine,
    EngineConfig,
    Failed,
    Finished,
    GenerationRequest,
    RequestCancelledError,
    RequestFailedError,
)
from dar_fast.engine.scheduler import AGING
from dar_fast.sampling import Sampling

REQUESTS, WARM = 2000, 300
CANCELLED = 0.25
WINDOW = 24  # in flight and waiting
SLOTS, LEVELS = 8, 2
SAMPLED = 50
GROWTH = 30 * 2**20  # bytes


def resident():
    """Bytes of memory that the process holds."""
    gc.collect()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmRSS")


def drawn_request(chance, seed, classes, codes):
    """Most draw a few groups of codes, a fifth a picture of few steps."""
    groups = chance.choice([1, 1, 1, 2, 2, 3, 8])
    image = chance.random() < 0.2
    best = None
    if image and groups > 1 and chance.random() < 0.4:
        best = BestOf(count=2, groups=1, scorer=by_seed(chance.randrange(2)))
    return GenerationRequest(
        label=chance.randrange(classes), seed=seed, num_groups=groups,
        sampling=Sampling(
            guidance_scale=chance.choice([1.0, 2.5, (1.0, 5.0)]), top_k=chance.choice([0, 50])
        ),
        output="image" if image else "codes", num_steps=chance.choice([1, 2, 3]),
        prefix_codes=[chance.randrange(codes) for _ in range(chance.choice([0, 0, 3, 8]))],
        previews=chance.random() < 0.3, priority=chance.randrange(LEVELS),
        deadline=chance.choice([None] * 9 + [0.05]), best_of=best,
    )  # fmt: skip


class Soak:
    """Keeps a window of requests in the engine, and what became of each."""

    def __init__(self, engine, chance):
        self.engine, self.chance = engine, chance
        self.room = threading.Semaphore(WINDOW)
        self.lock = threading.Lock()
        self.ends = {}  # number: Finished or Failed
        self.wanted = {}  # number: request, parent's number, group
        self.ended = []  # numbers in order

    def listener(self, number):
        def listen(event):
            if isinstance(event, Finished | Failed):
                with self.lock:
                    self.ends[number] = event
                    self.ended.append(number)
                self.room.release()

        return listen

    def submit(self, number, request, parent=None, group=0):
        assert self.room.acquire(timeout=60), "the engine stands still"
        self.wanted[number] = request, parent, group
        listen = self.listener(number)
        if parent is None:
            return self.engine.submit(request, listen)
        handle, parent_number = parent
        self.wanted[number] = request, parent_number, group
        changes = {"seed": request.seed, "label": request.label, "listener": listen}
        return self.engine.fork(handle, group, **changes)

    def run(self, first, last, classes, codes):
        timers, handles = [], []
        for number in range(first, last):
            chance = self.chance
            known = [(n, h) for n, h in handles[-8:] if (self.wanted[n][0].num_groups or 8) > 1]
            if known and chance.random() < 0.15:
                parent, handle = chance.choice(known)
                origin = self.wanted[parent][0]
                group = chance.randrange(1, origin.num_groups)
                request = replace(
                    origin, seed=number, label=chance.randrange(classes), best_of=None,
                    prefix_codes=(),
                )  # fmt: skip
                mine = self.submit(number, request, (handle, parent), group)
            else:
                request = drawn_request(chance, number, classes, codes)
                mine = self.submit(number, request)
            handles.append((number, mine))
            del handles[:-8]
            if chance.random() < CANCELLED:
                timers.append(threading.Timer(chance.random() * 0.05, mine.cancel))
                timers[-1].start()
        for timer in timers:
            timer.join(60)
        until(lambda: len(self.ends) == last)

    def plain_of(self, parts, number):
        """What the plain path draws for a request, or for a fork; and its noise seed."""
        request, parent, group = self.wanted[number]
        request = winner(request)
        noise = request.seed
        if parent is not None:
            before, noise = self.plain_of(parts, parent)
            request = as_prefixed(request, before, group, parts.tokenizer.config.group_size)
        return plain(parts, request, noise), noise


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_thousand_mixed_requests():
    parts = DARPipeline.from_pretrained("demo", device="cpu")
    classes = parts.prior.config.num_classes
    codes = parts.tokenizer.config.codebook_size
    pages = 4 * SLOTS  # of 2 rows of 2 pages each: whole pictures do not always fit
    config = EngineConfig(max_requests=SLOTS, num_pages=pages * 3 // 4, diffusion_batch=4)
    with Engine(parts.prior, parts.tokenizer, config) as engine:
        soak = Soak(engine, random.Random(0))
        soak.run(0, WARM, classes, codes)
        idle(engine)
        soak.ends = dict.fromkeys(soak.ends)  # what is kept here is not the engine's
        before = resident()
        survivors = {}
        for first in range(WARM, REQUESTS, 100):
            soak.run(first, first + 100, classes, codes)
            for number in range(first, first + 100):
                end = soak.ends[number]
                if isinstance(end, Finished):
                    survivors[number] = end.result
                else:
                    causes = (RequestCancelledError, DeadlineError)
                    error = end.error
                    while isinstance(error, RequestFailedError):  # a fork of one that was dropped
                        error = error.__cause__
                    assert isinstance(error, causes), error
                soak.ends[number] = None
        idle(engine)
        grown = resident() - before
        stats = engine.stats()
        assert stats.submitted == REQUESTS == len(soak.ended) == len(set(soak.ended))
        assert stats.cancelled > REQUESTS * CANCELLED / 3
        assert stats.finished > REQUESTS / 2
        assert abs(grown) < GROWTH, f"{grown / 2**20:.1f} MB more"
        check_fairness(soak)
        chance = random.Random(1)
        for number in chance.sample(sorted(survivors), SAMPLED):
            check_result(survivors[number], soak.plain_of(parts, number)[0])


def check_fairness(soak):
    """A window bounds all: who waits is passed by those that come while it is in the window.

    At most AGING admissions a level of priority go before it once it came, besides who was there;
    a request in flight shares every batch. The longest takes 8 groups and 3 steps, in which a slot
    can serve at most that many requests of one group.
    """
    most = WINDOW + AGING * LEVELS + SLOTS * 8 * 4
    place = {number: i for i, number in enumerate(soak.ended)}
    for number, at in place.items():
        passed = sum(1 for later in soak.ended[:at] if later > number)
        assert passed <= most, (number, passed)
