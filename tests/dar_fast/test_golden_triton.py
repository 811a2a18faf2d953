"""The golden fixtures through the Triton kernels: on a GPU, or interpreted on the CPU (slow)."""

import copy

import pytest
import torch
from golden_fixtures import (
    check_gradients,
    golden,
    golden_prior,
    golden_tokenizer,
    input_noise,
    relative_error,
)

from dar_fast.sampling import Sampling
from dar_kernels import prefer, triton_support

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(triton_support.missing() is not None, reason="Triton is not installed"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-5
PRIOR, TOKENIZER = "prior_tiny", "tokenizer_tiny"


@pytest.fixture(autouse=True)
def _triton():
    with prefer("triton"):
        yield


def on_device(model):
    return copy.deepcopy(model).to(DEVICE)


def recorded(name):
    return {key: tensor.to(DEVICE) for key, tensor in golden(name).tensors.items()}


@torch.no_grad()
def test_prior_logits_and_greedy_codes():
    model, values = on_device(golden_prior(PRIOR)), recorded(PRIOR)
    codes, labels = values["tokens"].long(), values["labels"].long()
    logits = model(codes, labels)[:, values["positions"].long()]
    assert relative_error(logits, values["logits"]) <= TOLERANCE
    greedy = Sampling(guidance_scale=4.0, temperature=0)
    count = model.config.num_tokens if DEVICE == "cuda" else 8  # a code takes seconds interpreted
    drawn = next(model.generation(labels, greedy, chunk=count))
    assert values["greedy_margin.const"][:, :count].min() > 1e-4
    assert torch.equal(drawn, values["greedy.const"][:, :count].long())


def test_prior_training_step():
    model, values = on_device(golden_prior(PRIOR)), recorded(PRIOR)
    codes, labels = values["tokens"].long(), values["labels"].long()
    loss = model.loss(codes, labels)
    assert float(loss.detach()) == pytest.approx(float(values["train.loss"]), rel=1e-6)
    loss.backward()
    check_gradients(model.cpu(), PRIOR)


@torch.no_grad()
def test_tokenizer_encoding_and_a_step():
    model, values = on_device(golden_tokenizer(TOKENIZER)), recorded(TOKENIZER)
    clear = values["code_margin"] > 1e-5
    assert torch.equal(model.encode(values["image"])[clear], values["codes"].long()[clear])
    conditions = model.conditions(values["codes"].long())
    assert relative_error(conditions, values["cond"]) <= TOLERANCE
    run = model.trajectory(input_noise(TOKENIZER))
    group = conditions[:, : model.config.group_size]
    out = model.pixel_dit(run.x, run.x.new_zeros(len(run.x)), group)
    assert relative_error(out.velocity, values["velocity.0"]) <= TOLERANCE
    run.advance(out.tokens)
    assert relative_error(run.preview(), values["jump.0"]) <= TOLERANCE


def test_tokenizer_training_step():
    model, values = on_device(golden_tokenizer(TOKENIZER)), recorded(TOKENIZER)
    out = model.training_forward(values["image"], values["train.time"], values["train.noise"])
    for part in ("fm", "vq", "commit"):
        expected = float(values[f"train.loss.{part}"])
        assert float(getattr(out, part).detach()) == pytest.approx(expected, rel=1e-5), part
    (out.fm + out.vq + out.commit).backward()
    check_gradients(model.cpu(), TOKENIZER)
