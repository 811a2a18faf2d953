"""Seeds, the noise that pictures start from, settings by groups of codes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dar_fast.models.prior import Prior
from dar_fast.sampling import MAX_SEED, PerGroup, Sampling, image_noise, resolve_seeds
from dar_kernels import UnavailableError

K, N, Q = 4, 16, 4  # of the tiny pipeline


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


def test_a_value_a_group_covers_its_codes():
    sampling = Sampling(guidance_scale=PerGroup((1.0, 4.0)), temperature=PerGroup((0.5, 0, 1)))
    assert sampling.scales(6).tolist() == [1, 1, 1, 4, 4, 4]
    assert sampling.temperatures(6).tolist() == [0.5, 0.5, 0, 0, 1, 1]
    assert Sampling(temperature=0.25).temperatures(3).tolist() == [0.25] * 3
    with pytest.raises(ValueError, match=r"guidance_scale: .* divides 5 codes, got 2"):
        sampling.scales(5)
    with pytest.raises(ValueError, match=r"temperature: .* divides 8 codes, got 3"):
        sampling.temperatures(8)
    with pytest.raises(ValueError, match="temperature: expected 2 values, one a group, got 3"):
        sampling.check_groups(2)
    with pytest.raises(ValueError, match="guidance_scale: expected 3 values, one a group, got 2"):
        sampling.check_groups(3)


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ({"guidance_scale": PerGroup((1.0, math.nan))}, ValueError, "guidance_scale: expected a"),
        ({"guidance_scale": PerGroup((1e7,))}, ValueError, "guidance_scale: expected a finite"),
        ({"temperature": PerGroup((1.0, -1.0))}, ValueError, "temperature: .* got -1.0"),
        ({"temperature": PerGroup((1e-9,))}, ValueError, "temperature: .* got 1e-09"),
    ],
    ids=str,
)  # fmt: skip
def test_each_value_of_a_group_has_the_range_of_the_setting(setting, error, message):
    with pytest.raises(error, match=message):
        Sampling(**setting)


@pytest.mark.parametrize("values", [[1.0], 1.0, ("a",), (True,), (None,)], ids=str)
def test_groups_take_a_tuple_of_numbers(values):
    with pytest.raises(TypeError, match="PerGroup: expected a tuple of numbers"):
        PerGroup(values)


def test_no_values_for_groups():
    with pytest.raises(ValueError, match="PerGroup: expected at least one number"):
        PerGroup(())


@given(
    st.one_of(
        st.floats(-9, 9),
        st.tuples(st.floats(-9, 9), st.floats(-9, 9)),
        st.lists(st.sampled_from([0.0, 1.0, 1.5]), min_size=4, max_size=4).map(
            lambda values: PerGroup(tuple(values))
        ),
    ),
    st.integers(0, N),
)
def test_guided_is_whether_a_later_scale_exceeds_one(scale, start):
    sampling = Sampling(guidance_scale=scale)
    assert sampling.guided(N, start) == any(s > 1 for s in sampling.scales(N).tolist()[start:])


def decode(prior: Prior, sampling: Sampling, way: str, chunk: int = Q, prefix=None):
    labels = torch.tensor([1, 5])
    try:
        parts = list(prior.generation(labels, sampling, [3, 8], prefix, chunk, way))
    except UnavailableError as error:
        pytest.skip(str(error))
    return torch.cat(parts, 1)


@pytest.mark.parametrize("way", ["torch", "native"])
@pytest.mark.parametrize("chunk", [1, 4, 8, 16])
def test_every_group_is_drawn_as_with_its_own_settings(tiny_pipeline, way, chunk):
    prior = tiny_pipeline.prior
    warmth, scales = (1.5, 0.0, 0.7, 0.7), (1.0, 6.0, 0.5, 3.0)
    both = Sampling(guidance_scale=PerGroup(scales), temperature=PerGroup(warmth), top_k=50)
    codes = decode(prior, both, way, chunk)
    assert torch.equal(codes, decode(prior, both, "torch"))
    for g in range(K):
        alone = Sampling(guidance_scale=scales[g], temperature=warmth[g], top_k=50)
        given = decode(prior, alone, way, prefix=codes[:, : g * Q])
        assert torch.equal(given[:, : (g + 1) * Q], codes[:, : (g + 1) * Q]), g
    cold = decode(prior, Sampling(guidance_scale=PerGroup(scales), temperature=0, top_k=50), way)
    assert not torch.equal(cold[:, :Q], codes[:, :Q])  # the temperature is not one for all


@pytest.mark.parametrize("method", ["__call__", "stream"])
def test_a_pipeline_wants_one_value_a_group(tiny_pipeline, method):
    for name in ("guidance_scale", "temperature"):
        with pytest.raises(ValueError, match=f"{name}: expected 4 values, one a group, got 2"):
            getattr(tiny_pipeline, method)([1], **{name: PerGroup((1.0, 2.0))})
    settings = {"guidance_scale": PerGroup((5, 4, 3, 2)), "temperature": PerGroup((1, 1, 0.5, 0))}
    out = tiny_pipeline([1, 5], seeds=[3, 8], output_type="codes", **settings)
    labels = torch.tensor([1, 5])
    assert torch.equal(out.codes, tiny_pipeline.prior.generate(labels, seeds=[3, 8], **settings))


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
