"""The floors: REFERENCE §8 by number, real parameters by count, and what overlapping can bring."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dar_fast.bench import floors
from dar_fast.bench.floors import codes_bytes, picture_floor
from dar_fast.config import PRIORS, TOKENIZERS
from dar_fast.models import Prior
from dar_fast.models.decoding import decoder_weights, room
from dar_fast.pipeline import DARPipeline

V1 = TOKENIZERS["v1"]
H100, H200, PRODUCTS = 3.35e12, 4.8e12, 800e12  # bytes/s, bytes/s, FLOP/s


@pytest.mark.parametrize(("prior", "millions"), [("L", 325), ("XL", 752)])
def test_weights_read_a_code(prior, millions):
    assert round(floors.product_weights(PRIORS[prior]) / 1e6) == millions


@pytest.mark.parametrize(("prior", "kib"), [("L", 96), ("XL", 180)])
def test_keys_and_values_of_a_token(prior, kib):
    assert floors.kv_bytes(PRIORS[prior]) == kib * 1024


@pytest.mark.parametrize(
    ("prior", "bandwidth", "ms"),
    [("L", H100, 51.6), ("XL", H100, 118.6), ("L", H200, 36.0), ("XL", H200, 82.8)],
)
def test_guided_codes_in_bf16(prior, bandwidth, ms):
    floor = picture_floor(PRIORS[prior], V1, "bf16", bandwidth=bandwidth, rate=PRODUCTS)
    assert 1e3 * floor.codes == pytest.approx(ms, abs=0.05)


@pytest.mark.parametrize("weights", ["int8", "fp8"])
@pytest.mark.parametrize(("prior", "ms"), [("L", 27), ("XL", 61)])
def test_guided_codes_in_one_byte(prior, weights, ms):
    floor = picture_floor(PRIORS[prior], V1, weights, bandwidth=H100, rate=PRODUCTS)
    assert round(1e3 * floor.codes) == ms


def test_pixel_dit():
    assert round(floors.step_flops(V1) / 1e9) == 332
    assert 8 * floors.step_flops(V1) / 1e12 == pytest.approx(2.66, abs=0.005)
    floor = picture_floor(PRIORS["L"], V1, "bf16", bandwidth=H100, rate=PRODUCTS)
    assert 1e3 * floor.steps == pytest.approx(3.3, abs=0.05)


def test_products_are_those_of_the_model(tiny_pipeline: DARPipeline):
    prior = tiny_pipeline.prior
    tables = {prior.class_embedding.weight, prior.token_embedding.weight}
    products = [p for p in prior.parameters() if p.ndim == 2 and p not in tables]
    assert floors.product_weights(prior.config) == sum(p.numel() for p in products)
    channels = sum(len(p) for p in products)
    assert (
        floors.code_bytes(prior.config, "int8") == sum(p.numel() for p in products) + 4 * channels
    )
    norms = sum(p.numel() for p in prior.parameters() if p.ndim == 1)
    assert floors.prior_bytes(prior) == floors.code_bytes(prior.config, "fp32") + 4 * norms


def test_keys_and_values_are_those_of_the_pages():
    config = PRIORS["demo"]
    with torch.device("meta"):
        weights = decoder_weights(Prior(config))
        pages, _ = room(weights, 2, torch.bfloat16)
    whole = sum(p.numel() * p.element_size() for p in (pages.keys, pages.values))
    assert whole == 2 * config.num_tokens * floors.kv_bytes(config)


def test_every_step_reads_the_keys_before_it():
    config = PRIORS["L"]
    by_steps = sum(
        floors.code_bytes(config, "bf16") + 2 * (p + 1) * floors.kv_bytes(config)
        for p in range(config.num_tokens)
    )
    assert codes_bytes(config, "bf16") == by_steps


RATES = st.floats(1e9, 1e13)


@given(RATES, RATES, st.sampled_from(["fp32", "bf16", "int8"]), st.integers(1, 64))
def test_overlapping_hides_the_shorter_and_never_more(bandwidth, rate, weights, batch):
    floor = picture_floor(
        PRIORS["XL"], V1, weights, bandwidth=bandwidth, rate=rate, pictures=batch, batch=batch
    )
    assert max(floor.codes, floor.steps) < floor.overlapped < floor.sequential
    assert floor.first_preview < floor.overlapped
    assert floor.sequential == pytest.approx(floor.codes + floor.steps)


@given(RATES, RATES, st.integers(0, 6))
def test_a_larger_batch_reads_the_weights_less_often(bandwidth, rate, power):
    small, large = (
        picture_floor(
            PRIORS["L"], V1, "bf16", bandwidth=bandwidth, rate=rate, pictures=128, batch=b
        )
        for b in (2**power, 2 ** (power + 1))
    )
    assert large.codes <= small.codes * (1 + 1e-9) and large.steps == small.steps


def test_large_batches_are_bound_by_the_prior_s_products():
    floor = picture_floor(PRIORS["L"], V1, "bf16", bandwidth=1e15, rate=1e12, pictures=64, batch=64)
    products = 2 * floors.product_weights(PRIORS["L"]) * 2 * 64 * 256 / 1e12
    assert floor.codes == pytest.approx(products)
