"""Drawn mixes of requests to an engine, when they come and what becomes of them."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from engine_helpers import as_prefixed, check_events, collect, plain
from hypothesis import strategies as st

from dar_fast.engine import BestOf, Failed, Finished, GenerationRequest, RequestCancelledError
from dar_fast.sampling import PerGroup, Sampling

V, CLASSES, K, Q = 64, 6, 4, 4


@dataclass(frozen=True)
class Fork:
    """A branch of a request, asked for `delay` ms after it; it may have branches of its own."""

    group: int
    seed: int
    changes: dict
    delay: float = 0.0


@dataclass(frozen=True)
class Ask:
    """A request, when it comes, and what is done to it."""

    request: GenerationRequest
    delay: float = 0.0  # ms after the one before
    cancel: float | None = None  # ms after it came
    forks: Sequence[Fork] = field(default=())


@dataclass(frozen=True)
class Setting:
    """An engine's configuration, without the pages that the mix decides on."""

    max_requests: int
    spare_pages: int
    diffusion_batch: int
    overlap: bool
    deterministic: bool
    threads: int


scales = st.floats(0.5, 8)
samplings = st.builds(
    Sampling,
    guidance_scale=st.one_of(
        st.just(1.0), scales, st.tuples(scales, scales),
        st.builds(lambda v: PerGroup(tuple(v)), st.lists(scales, min_size=K, max_size=K)),
    ),
    temperature=st.one_of(
        st.sampled_from([0.0, 1.0]), st.floats(0.3, 2), st.just(PerGroup((0, 0.5, 1, 2)))
    ),
    top_k=st.sampled_from([0, 1, 5, V, 10**12]),
    top_p=st.one_of(st.just(1.0), st.floats(0.05, 1)),
)  # fmt: skip
labels = st.integers(0, CLASSES - 1)
seeds = st.one_of(st.integers(0, 2**63 - 3), st.integers(0, 3))
outputs = st.sampled_from(["image", "image", "codes"])
counts = st.one_of(st.none(), st.integers(1, 12))
delays = st.sampled_from([0.0, 0.0, 0.5, 3.0, 15.0])


def by_seed(chosen):
    """A scorer that chooses candidate `chosen`."""
    return lambda candidates: [float(i == chosen) for i in range(len(candidates.codes))]


@st.composite
def requests(draw, slots):
    groups = draw(st.one_of(st.none(), st.integers(1, K)))
    best, output = None, draw(outputs)
    if output == "image" and (groups or K) > 1 and slots > 1 and draw(st.integers(0, 3)) == 0:
        count = draw(st.integers(2, min(3, slots)))
        best = BestOf(
            count=count, groups=draw(st.integers(1, (groups or K) - 1)),
            scorer=by_seed(draw(st.integers(0, count - 1))),
        )  # fmt: skip
    return GenerationRequest(
        label=draw(labels), seed=draw(seeds), sampling=draw(samplings), num_steps=draw(counts),
        solver=draw(st.sampled_from(["adams2", "euler"])),
        prefix_codes=draw(st.lists(st.integers(0, V - 1), max_size=K * Q)), num_groups=groups,
        noise_seed=draw(st.one_of(st.none(), seeds)), output=output,
        previews=draw(st.booleans()), priority=draw(st.integers(-1, 1)), best_of=best,
    )  # fmt: skip


@st.composite
def forks(draw, parent):
    most = (parent.num_groups or K) - 1
    if most < 1:
        return ()
    made = []
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        changes = {}
        if draw(st.booleans()):
            changes["label"] = draw(labels)
        if draw(st.booleans()):
            changes["sampling"] = draw(samplings)
        if draw(st.booleans()):
            changes["output"] = draw(outputs)
        made.append(Fork(draw(st.integers(1, most)), draw(seeds), changes, draw(delays)))
    return tuple(made)


@st.composite
def mixes(draw):
    """An engine and up to six requests for it."""
    setting = Setting(
        draw(st.integers(1, 5)), draw(st.integers(0, 3)), draw(st.integers(1, 4)),
        draw(st.booleans()), draw(st.booleans()), draw(st.sampled_from([1, 2])),
    )  # fmt: skip
    asks = []
    for _ in range(draw(st.integers(1, 6))):
        request = draw(requests(setting.max_requests))
        cancel = draw(st.one_of(st.none(), st.none(), st.sampled_from([0.0, 1.0, 5.0, 20.0])))
        asks.append(Ask(request, draw(delays), cancel, draw(forks(request))))
    return setting, asks


def pages_for(asks):
    """The least number that every request of a mix fits in: a page a row."""
    counts = [1 if ask.request.best_of is None else ask.request.best_of.count for ask in asks]
    return 2 * max(counts)


def winner(request):
    """The request of the candidate that a `by_seed` scorer chooses."""
    best = request.best_of
    if best is None:
        return request
    scores = best.scorer(type("Shown", (), {"codes": [None] * best.count}))
    return replace(request, seed=request.seed + scores.index(1.0))


def play(engine, asks):
    """Submit a mix as it says, from one thread a request; handles and forks, in order."""
    handles, threads = [], []

    def later(delay, act):
        def run():
            time.sleep(delay / 1000)
            act()

        threads.append(threading.Thread(target=run, daemon=True))
        threads[-1].start()

    for ask in asks:
        time.sleep(ask.delay / 1000)
        handle = engine.submit(ask.request)
        own = []
        handles.append((handle, own))
        for fork in ask.forks:
            later(fork.delay, partial(_fork, engine, handle, fork, own))
        if ask.cancel is not None:
            later(ask.cancel, handle.cancel)
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return handles


def _fork(engine, handle, fork, branches):
    branches.append((fork, engine.fork(handle, fork.group, seed=fork.seed, **fork.changes)))


def check(parts, asks, handles, most):
    """Every request that was not cancelled, and every fork of one, is as on the plain path."""
    for ask, (handle, branches) in zip(asks, handles, strict=True):
        request = winner(ask.request)
        events = collect(handle)
        wanted = plain(parts, request)
        if isinstance(events[-1], Failed):
            assert ask.cancel is not None
            assert isinstance(events[-1].error, RequestCancelledError)
        else:
            check_events(events, wanted, request, Q, most)
        assert len(branches) == len(ask.forks)
        for fork, branch in branches:
            told = collect(branch)
            if isinstance(told[-1], Failed):
                assert ask.cancel is not None, told[-1].error
                assert isinstance(told[-1].error.__cause__, RequestCancelledError)
                continue
            assert isinstance(told[-1], Finished)
            asked = replace(ask.request, seed=fork.seed, best_of=None, **fork.changes)
            asked = as_prefixed(asked, wanted, fork.group, Q)
            noise = request.seed if request.noise_seed is None else request.noise_seed
            check_events(told, plain(parts, asked, noise), asked, Q, most)
