"""Groups drawn by native calls over a mix of requests: the codes of the plain path, each alone."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from token_mixes import Ask, N, Q, V, alone, make_prior, mixes, play, row
from torch import Tensor

from dar_fast.engine.tokens import NativeTokens
from dar_fast.models import Prior
from dar_fast.models.decoding import decoder_weights
from dar_fast.sampling import Sampling
from dar_kernels import native

pytestmark = pytest.mark.skipif(native.missing() is not None, reason="needs the C++ ops")
SLOTS, PAGES = 6, 24


@pytest.fixture(scope="module")
def prior() -> Prior:
    return make_prior()


def new(prior: Prior, **more: object) -> tuple[NativeTokens, Tensor]:
    codes = torch.full((SLOTS, N), V - 1)
    return NativeTokens(prior, codes, PAGES, **more), codes  # type: ignore[arg-type]


def drawn(prior: Prior, mix: Sequence[Ask], shuffle: int = 0, **more: object) -> list[Tensor]:
    runner, codes = new(prior, **more)
    return play(runner, codes, PAGES, mix, shuffle)


@settings(max_examples=15)  # the plain path is slow
@given(mix=mixes)
def test_a_mix_draws_what_each_request_draws_on_the_plain_path(
    prior: Prior, mix: list[Ask]
) -> None:
    for ask, codes in zip(mix, drawn(prior, mix, shuffle=len(mix)), strict=True):
        assert torch.equal(codes, alone(prior, ask))


MIX = [
    Ask(label=1, seed=5, sampling=Sampling(guidance_scale=(1.1, 8.0), top_p=0.9)),
    Ask(label=0, seed=2**63 - 1, sampling=Sampling(guidance_scale=1.0, top_k=20), joins=1),
    Ask(label=5, seed=6, sampling=Sampling(guidance_scale=3.0, temperature=0.8), groups=3),
    Ask(label=1, seed=5, prefix=tuple(range(30)), joins=2),
]


@pytest.mark.parametrize("stored", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_codes_are_the_same_alone_and_in_the_mix(stored: str, kv_heads: int) -> None:
    prior = make_prior(kv_heads=kv_heads).to(torch.bfloat16 if stored == "bf16" else torch.float32)
    weights = decoder_weights(prior)
    weights = weights.quantize(torch.int8) if stored == "int8" else weights
    together = drawn(prior, MIX, weights=weights)
    for ask, codes in zip(MIX, together, strict=True):
        own = drawn(prior, [replace(ask, joins=0)], shuffle=7, weights=weights, threads=2)[0]
        assert torch.equal(own, codes)


def test_grouped_heads_and_many_labels_match_the_plain_path() -> None:
    prior = make_prior(kv_heads=1)
    for ask, codes in zip(MIX, drawn(prior, MIX), strict=True):
        assert torch.equal(codes, alone(prior, ask))


def test_a_group_drawn_twice_gives_the_same_codes(prior: Prior) -> None:
    runner, codes = new(prior)
    rows = [row(ask, 0, slot, ([slot], [slot + 8])) for slot, ask in enumerate(MIX)]
    first = runner.run(rows)
    after = codes.clone()
    assert torch.equal(runner.run(rows), first)
    assert torch.equal(runner.run(rows[::-1]).flip(0), first)
    assert torch.equal(codes, after)
    assert (codes[len(MIX) :] == V - 1).all()  # of nobody


def test_a_copied_page_continues_as_its_original(prior: Prior) -> None:
    runner, codes = new(prior)
    ask = replace(MIX[0], groups=2)
    runner.run([row(ask, 0, 0, ([3], [9]))])
    codes[4, :Q] = codes[0, :Q]
    runner.copy_pages([(3, 1), (9, 2)])
    rows = [row(ask, 1, 0, ([3], [9])), row(ask, 1, 4, ([1], [2]))]
    both = runner.run(rows)
    assert torch.equal(both[0], both[1])
    assert torch.equal(both[0], alone(prior, ask)[Q:])


GOOD = row(MIX[0], 1, 2, ([0], [1]))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "expected at least 1, got none"),
        ([GOOD, GOOD], r"expected different slots, got \[2, 2\]"),
        ([GOOD, replace(GOOD, slot=1, guidance=(1.0,))], "expected 12 >= 1 scales"),
        ([replace(GOOD, forced=(0,) * 13)], "forced codes, got 12 and 13"),
        ([replace(GOOD, slot=6)], r"expected a slot in \[0, 6\).* got slot 6"),
        ([replace(GOOD, position=40)], r"within \[0, 48\), got slot 2 and position 40"),
        ([replace(GOOD, position=24)], r"expected 2 to 2 pages in \[0, 24\), got \(0,\)"),
        ([replace(GOOD, null_pages=(24,))], r"pages in \[0, 24\), got \(24,\)"),
        ([replace(GOOD, pages=(0, 1, 2))], r"expected 1 to 2 pages"),
    ],
)
def test_rows_that_do_not_fit_are_refused(prior: Prior, rows: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        new(prior)[0].run(rows)
