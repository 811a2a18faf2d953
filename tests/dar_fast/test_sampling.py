"""Random streams, filters and guidance."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dar_fast.sampling import (
    MAX_SEED,
    Sampling,
    choose,
    filter_logits,
    gumbel_noise,
    image_noise,
    philox,
    resolve_seeds,
)

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        (0, (0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (-1, (ONES,) * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            0x299F31D0A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(key, counter, expected):
    c0, c1 = (torch.tensor([c]) for c in counter[:2])
    bits = philox(torch.tensor([key]), c0, c1, *counter[2:])
    assert " ".join(f"{int(b):08x}" for b in bits) == expected


@given(st.lists(st.integers(0, MAX_SEED), min_size=1, max_size=4), st.integers(0, 200))
def test_noise_is_a_function_of_seed_and_position(seeds, position):
    keys = torch.tensor(seeds)
    batch = gumbel_noise(keys, torch.tensor([position, position + 1]), 50)
    for row, seed in enumerate(seeds):
        alone = gumbel_noise(torch.tensor([seed]), torch.tensor([position]), 50)
        assert torch.equal(batch[row, 0], alone[0, 0])
        picture = image_noise(torch.tensor([seed]), (3, 5, 5))
        assert torch.equal(image_noise(keys, (3, 5, 5))[row], picture[0])
    assert batch.isfinite().all()


def test_image_noise_is_standard_normal():
    x = image_noise(torch.arange(8), (3, 64, 64)).flatten(1)
    n = x.numel()
    assert abs(float(x.mean())) < 4 / math.sqrt(n)
    assert abs(float(x.var()) - 1) < 4 * math.sqrt(2 / n)
    assert abs(float((x**4).mean()) - 3) < 4 * math.sqrt(96 / n)
    neighbours = (x[:, :-1] * x[:, 1:]).mean()
    assert abs(float(neighbours)) < 4 / math.sqrt(n)
    assert abs(float(torch.corrcoef(x)[0, 1])) < 4 / math.sqrt(x.shape[1])


def test_draws_follow_the_filtered_distribution():
    torch.manual_seed(0)
    logits = 2 * torch.randn(1, 24)
    sampling = Sampling(temperature=0.8, top_k=12, top_p=0.95)
    draws = 40_000
    gumbel = gumbel_noise(torch.arange(draws), torch.tensor([3]), 24)[:, 0]
    codes = choose(logits.expand(draws, -1), gumbel, sampling)
    p = filter_logits(logits, 0.8, 12, 0.95).softmax(-1)[0].double()
    observed = torch.bincount(codes, minlength=24).double()
    assert (observed[p == 0] == 0).all()
    kept = p > 0
    chi = float(((observed - draws * p)[kept] ** 2 / (draws * p)[kept]).sum())
    freedom = int(kept.sum()) - 1
    assert chi < freedom + 5 * math.sqrt(2 * freedom)  # five standard deviations


@given(st.floats(0.05, 20), st.integers(0, 40), st.floats(0.01, 1))
def test_filters_keep_the_likeliest_and_no_more_than_asked(temperature, top_k, top_p):
    logits = torch.linspace(-3, 3, 33)[None].roll(7, -1)
    kept = filter_logits(logits, temperature, top_k, top_p)[0] > -math.inf
    assert kept[logits.argmax()]
    p = (logits[0] / temperature).softmax(-1)
    if top_k:
        assert int(kept.sum()) <= min(top_k, 33)
    if top_k == 0 and top_p < 1:
        least = p[kept].min()
        assert float(p[p > least].sum()) <= top_p + 1e-5
        assert float(p[kept].sum()) >= top_p - 1e-5


def test_guidance_schedule():
    torch.testing.assert_close(
        Sampling(guidance_scale=(1.1, 8.0)).scales(256), torch.linspace(1.1, 8.0, 256)
    )
    assert Sampling(guidance_scale=3).scales(4).tolist() == [3, 3, 3, 3]


def test_seeds():
    assert resolve_seeds([5, 7], 2) == [5, 7]
    assert resolve_seeds(5, 3) == [5, 6, 7]
    assert resolve_seeds(torch.tensor([1, 2]), 2) == [1, 2]
    assert len(set(resolve_seeds(None, 8))) == 8
    for seeds, error in (
        ([1], ValueError), ([-1, 0], ValueError), ([0, MAX_SEED + 1], ValueError),
        ([0.5, 1], ValueError), (1.5, TypeError), (torch.tensor([0.5, 1]), ValueError),
    ):  # fmt: skip
        with pytest.raises(error, match="seeds: expected"):
            resolve_seeds(seeds, 2)
