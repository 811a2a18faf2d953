"""The golden fixtures on a GPU, in fp32 without TF32."""

import copy

import pytest
import torch
from golden_fixtures import golden, golden_prior, golden_tokenizer, input_noise, relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
TOLERANCE = 1e-5


@pytest.mark.parametrize("name", ["tokenizer_tiny", "tokenizer_k4"])
def test_tokenizer(name):
    model, recorded = copy.deepcopy(golden_tokenizer(name)).cuda(), golden(name).tensors
    clear = recorded["code_margin"] > 1e-5
    codes = model.encode(recorded["image"].cuda()).cpu()
    assert torch.equal(codes[clear], recorded["codes"].long()[clear])
    for solver in ("adams2", "euler"):
        image = model.decode(recorded["codes"].long(), input_noise(name), solver=solver).cpu()
        assert relative_error(image, recorded[f"sample.{solver}"]) <= TOLERANCE, solver


@torch.no_grad()
def test_prior():
    name = "prior_tiny"
    model, recorded = copy.deepcopy(golden_prior(name)).cuda(), golden(name).tensors
    codes, labels = recorded["tokens"].long().cuda(), recorded["labels"].long().cuda()
    assert relative_error(model(codes, labels).cpu(), recorded["logits"]) <= TOLERANCE
    settings = {"guidance_scale": 4.0, "seeds": 0}
    drawn = model.generate(labels, **settings).cpu()
    assert torch.equal(drawn, golden_prior(name).generate(labels.cpu(), **settings))
