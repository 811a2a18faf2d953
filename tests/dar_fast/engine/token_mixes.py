"""Requests that join and leave a token runner at group boundaries, and what each draws alone."""

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import Tensor

from dar_fast.config import PriorConfig
from dar_fast.engine.rows import TokenRow, TokenRunner
from dar_fast.models import Prior
from dar_fast.sampling import PerGroup, Sampling
from dar_kernels.pages import PAGE_SIZE
from tiny_models import perturb

V, CLASSES = 64, 6
N, Q = 48, 12  # boundaries of groups lie within pages


def make_prior(num_tokens: int = N, depth: int = 2, kv_heads: int | None = None) -> Prior:
    """Random weights, the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = PriorConfig(
            dim=32, depth=depth, heads=2, kv_heads=kv_heads, vocab_size=V, num_tokens=num_tokens,
            num_classes=CLASSES,
        )  # fmt: skip
        prior = Prior(config)
    perturb(prior, 4)
    return prior.eval()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request and the turn in which it joins."""

    label: int
    seed: int
    sampling: Sampling = field(default_factory=Sampling)
    prefix: tuple[int, ...] = ()
    groups: int = N // Q
    joins: int = 0

    @property
    def guided(self) -> bool:
        return self.sampling.guided(N, len(self.prefix))


scales = st.floats(0.5, 8)
guidances = st.one_of(
    st.just(1.0), scales, st.tuples(scales, scales),
    st.builds(lambda v: PerGroup(tuple(v)), st.lists(scales, min_size=N // Q, max_size=N // Q)),
)  # fmt: skip
samplings = st.builds(
    Sampling,
    guidance_scale=guidances,
    temperature=st.one_of(
        st.sampled_from([0, 1e-6, 1.0]), st.floats(0.3, 2), st.just(PerGroup((0, 0.5, 1, 2)))
    ),
    top_k=st.sampled_from([0, 1, 5, 63, 64, 10**12]),
    top_p=st.one_of(st.sampled_from([1.0, 1e-300]), st.floats(0.05, 1)),
)
asks = st.builds(
    Ask,
    label=st.integers(0, CLASSES - 1),
    seed=st.one_of(st.integers(0, 2**63 - 1), st.just(2**63 - 1)),
    sampling=samplings,
    prefix=st.lists(st.integers(0, V - 1), max_size=N).map(tuple),
    groups=st.integers(1, N // Q),
    joins=st.integers(0, 3),
)
mixes = st.lists(asks, min_size=1, max_size=5)


@functools.cache
def alone(prior: Prior, ask: Ask) -> Tensor:
    """The codes of the plain path, `[G Q]`."""
    prefix = torch.tensor([ask.prefix], dtype=torch.int64)
    steps = prior.generation(
        torch.tensor([ask.label]), ask.sampling, [ask.seed], prefix, Q, "torch"
    )  # fmt: skip
    return torch.cat([next(steps) for _ in range(ask.groups)], dim=1)[0]


def play(
    runner: TokenRunner, codes: Tensor, num_pages: int, mix: Sequence[Ask], shuffle: int = 0
) -> list[Tensor]:
    """The codes of each, drawn in turns of a group by all that are in; slots and pages are given
    out in a shuffled order and taken back dirty. Checks that the slots' codes are what came."""
    chance = random.Random(shuffle)
    free = chance.sample(range(num_pages), num_pages)
    slots = chance.sample(range(len(codes) - 1), len(codes) - 1)
    places: dict[int, int] = {}
    held: dict[int, tuple[list[int], list[int]]] = {}
    drawn: list[list[Tensor]] = [[] for _ in mix]
    turn = 0
    while any(len(d) < a.groups for d, a in zip(drawn, mix, strict=True)):
        now = [i for i, a in enumerate(mix) if a.joins <= turn and len(drawn[i]) < a.groups]
        turn += 1
        if not now:
            continue
        chance.shuffle(now)
        for i in now:
            if i not in places:
                places[i], held[i] = slots.pop(0), ([], [])
            end = (len(drawn[i]) + 1) * Q
            for pages in held[i][: 1 + mix[i].guided]:
                while len(pages) * PAGE_SIZE < end:
                    pages.append(free.pop(0))
        out = runner.run([row(mix[i], len(drawn[i]), places[i], held[i]) for i in now])
        for i, group in zip(now, out, strict=True):
            drawn[i].append(group)
            if len(drawn[i]) == mix[i].groups:
                whole = torch.cat(drawn[i])
                assert torch.equal(codes[places[i], : len(whole)], whole)
                slots.append(places[i])
                free += [page for pages in held[i] for page in pages]
    return [torch.cat(d) for d in drawn]


def row(ask: Ask, group: int, slot: int, pages: tuple[list[int], list[int]]) -> TokenRow:
    """One group of a request, as the scheduler would ask for it."""
    first = group * Q
    return TokenRow(
        slot=slot, label=ask.label, seed=ask.seed, position=first,
        guidance=tuple(ask.sampling.scales(N)[first : first + Q].tolist()),
        temperature=float(ask.sampling.temperatures(N)[first]),
        top_k=ask.sampling.top_k, top_p=ask.sampling.top_p, pages=tuple(pages[0]),
        null_pages=tuple(pages[1]) if ask.guided else None,
        forced=ask.prefix[first : first + Q],
    )  # fmt: skip
