"""Seeds, the noise that pictures start from, and the guidance schedule."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dar_fast.sampling import MAX_SEED, Sampling, image_noise, resolve_seeds


@given(st.lists(st.integers(0, MAX_SEED), min_size=1, max_size=4))
def test_image_noise_is_a_function_of_the_seed(seeds):
    batch = image_noise(torch.tensor(seeds), (3, 5, 5))
    for row, seed in enumerate(seeds):
        assert torch.equal(batch[row], image_noise(torch.tensor([seed]), (3, 5, 5))[0])
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
