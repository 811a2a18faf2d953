"""The published sizes under golden weights: outputs stored in fp16, so to 1e-3."""

import pytest
import torch
from golden_fixtures import golden, golden_prior, golden_tokenizer, input_noise, relative_error

from dar_fast.sampling import Sampling

pytestmark = pytest.mark.slow
TOLERANCE = 1e-3


@pytest.fixture(scope="module", autouse=True)
def _release():
    yield
    golden_prior.cache_clear()
    golden_tokenizer.cache_clear()


@torch.no_grad()
def test_tokenizer_v1():
    name = "tokenizer_v1_full"
    model, recorded = golden_tokenizer(name), golden(name).tensors
    assert sum(p.numel() for p in model.parameters()) == golden(name).meta["params"]
    assert relative_error(model.pre_quantize(recorded["image"]), recorded["pre_quant"]) <= TOLERANCE
    clear = recorded["code_margin"] > 1e-5
    codes = recorded["codes"].long()
    assert torch.equal(model.encode(recorded["image"])[clear], codes[clear])
    cond = model.conditions(codes)
    assert relative_error(cond, recorded["cond"]) <= TOLERANCE
    assert relative_error(cond, recorded["cond_from_codes"]) <= TOLERANCE
    run = model.trajectory(input_noise(name))
    assert torch.equal(torch.tensor(run.times), recorded["schedule"])
    while not run.done:
        i, x = run.step, run.x.clone()
        model.advance(run, cond)
        if f"velocity.{i}" in recorded:
            velocity = ((run.preview() * model.config.dit.data_std) - x) / (1 - run.times[i])
            assert relative_error(velocity, recorded[f"velocity.{i}"]) <= TOLERANCE, i
        if f"jump.{i}" in recorded:
            assert relative_error(run.preview(), recorded[f"jump.{i}"]) <= TOLERANCE, i
    assert relative_error(run.image(), recorded["sample.adams2"]) <= TOLERANCE
    euler = model.decode(codes, input_noise(name), solver="euler")
    assert relative_error(euler, recorded["sample.euler"]) <= TOLERANCE


@torch.no_grad()
def test_prior_l():
    name = "prior_l_full"
    model, recorded = golden_prior(name), golden(name).tensors
    assert sum(p.numel() for p in model.parameters()) == golden(name).meta["params"]
    codes, labels = recorded["tokens"].long(), recorded["labels"].long()
    positions = recorded["positions"].long()
    assert relative_error(model(codes, labels)[:, positions], recorded["logits"]) <= TOLERANCE
    null = torch.full_like(labels, model.config.null_class)
    actual = model(codes, null)[:, positions]
    assert relative_error(actual, recorded["logits_uncond"]) <= TOLERANCE
    expected = recorded["greedy.linear"].long()
    # recorded from a run of 64 codes: its schedule reaches 8.0 at the last of these
    drawn, N = expected.shape[1], model.config.num_tokens
    last = 1.1 + (8.0 - 1.1) * (N - 1) / (drawn - 1)
    sampling = Sampling(guidance_scale=(1.1, last), temperature=0)
    greedy = next(model.generation(labels, sampling, chunk=drawn))
    unclear = (recorded["greedy_margin.linear"][0] < 1e-4).nonzero().flatten().tolist()
    until = unclear[0] if unclear else expected.shape[1]
    assert until > 32
    assert torch.equal(greedy[:, :until], expected[:, :until])
