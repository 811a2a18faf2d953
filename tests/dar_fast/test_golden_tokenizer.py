"""The tokenizer against every value recorded from the official implementation."""

import pytest
import torch
from golden_fixtures import (
    check_gradients,
    golden,
    golden_tokenizer,
    input_noise,
    relative_error,
)

from dar_kernels import UnavailableError, prefer

NAMES = ("tokenizer_tiny", "tokenizer_k4")
TOLERANCE = 1e-5


@pytest.fixture(autouse=True, params=["torch", "native"])
def _implementation(request):
    """Every test under both (Triton: test_golden_triton.py); ops that lack one choose as ever."""
    try:
        with prefer(request.param):
            yield
    except UnavailableError as error:
        pytest.skip(str(error))


def conditions(name):
    return golden_tokenizer(name).conditions(golden(name).tensors["codes"].long())


@pytest.mark.parametrize("name", NAMES)
def test_number_of_parameters(name):
    model = golden_tokenizer(name)
    assert sum(p.numel() for p in model.parameters()) == golden(name).meta["params"]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_encoding(name):
    model, recorded = golden_tokenizer(name), golden(name).tensors
    assert relative_error(model.pre_quantize(recorded["image"]), recorded["pre_quant"]) <= TOLERANCE
    clear = recorded["code_margin"] > 1e-5
    assert clear.float().mean() > 0.99
    assert torch.equal(model.encode(recorded["image"])[clear], recorded["codes"].long()[clear])


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_conditions(name):
    recorded = golden(name).tensors
    actual = conditions(name)
    assert relative_error(actual, recorded["cond_from_codes"]) <= TOLERANCE
    assert relative_error(actual, recorded["cond"]) <= TOLERANCE


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_every_step_of_decoding(name):
    model, recorded = golden_tokenizer(name), golden(name).tensors
    cond = conditions(name)
    run = model.trajectory(input_noise(name))
    assert torch.equal(torch.tensor(run.times), recorded["schedule"])
    while not run.done:
        i, x, t = run.step, run.x.clone(), run.time
        start = model.group_start(i, len(run.times) - 1)
        group = cond[:, start : start + model.config.group_size]
        out = model.pixel_dit(x, torch.full((len(x),), t), group, align=i == 3)
        assert relative_error(out.velocity, recorded[f"velocity.{i}"]) <= TOLERANCE
        if out.alignment is not None:
            assert relative_error(out.alignment[:, ::16], recorded["repa.3"]) <= TOLERANCE
        run.advance(out.tokens)
        assert relative_error(run.preview(), recorded[f"jump.{i}"]) <= TOLERANCE
    assert relative_error(run.image(), recorded["sample.adams2"]) <= TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_both_solvers(name):
    model, recorded = golden_tokenizer(name), golden(name).tensors
    codes, noise = recorded["codes"].long(), input_noise(name)
    for solver in ("adams2", "euler"):
        image = model.decode(codes, noise, solver=solver)
        assert relative_error(image, recorded[f"sample.{solver}"]) <= TOLERANCE, solver


@pytest.mark.parametrize("name", NAMES)
def test_official_previews(name):
    model, recorded = golden_tokenizer(name), golden(name).tensors
    codes, noise = recorded["codes"].long(), input_noise(name)
    previews = [key for key in recorded if key.startswith("clip.adams2.")]
    assert len(previews) == model.config.num_steps - 1
    for key in previews:
        steps = int(key.rsplit(".", 1)[1])
        image = model.decode(codes, noise, stop_after=steps, preview="solver")
        assert relative_error(image, recorded[key]) <= TOLERANCE, key


@pytest.mark.parametrize("name", NAMES)
def test_training_step(name):
    model, recorded = golden_tokenizer(name), golden(name).tensors
    model.zero_grad()
    out = model.training_forward(recorded["image"], recorded["train.time"], recorded["train.noise"])
    for part in ("fm", "vq", "commit"):
        expected = float(recorded[f"train.loss.{part}"])
        assert float(getattr(out, part).detach()) == pytest.approx(expected, rel=1e-5), part
    assert relative_error(out.predicted_images, recorded["train.predict_x1"]) <= TOLERANCE
    assert relative_error(out.repa[:, ::16], recorded["train.repa"]) <= TOLERANCE
    (out.fm + out.vq + out.commit).backward()
    check_gradients(model, name)
    model.zero_grad()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk", [1, 8, 16])
@torch.no_grad()
def test_token_decoder_group_by_group(name, chunk):
    model, recorded = golden_tokenizer(name), golden(name).tensors
    codes = recorded["codes"].long()
    cache, parts = model.token_decoder.cache(len(codes)), []
    for i, group in enumerate(codes.split(chunk, dim=1)):
        embedded = model.quantizer.embed(group)
        parts.append(model.token_decoder.extend(embedded, cache, i * chunk))
    assert relative_error(torch.cat(parts, 1), recorded["cond_from_codes"]) <= TOLERANCE


def test_draws_share_the_encoder():
    name = "tokenizer_tiny"
    model, recorded = golden_tokenizer(name), golden(name).tensors
    image, noise = recorded["image"], recorded["train.noise"]
    u = torch.tensor([0.1, 0.6, 0.35, 0.99])
    with torch.no_grad():
        shared = model.training_forward(image, u, torch.cat((noise, -noise)))
        twice = model.training_forward(torch.cat((image, image)), u, torch.cat((noise, -noise)))
    for part in ("fm", "vq", "commit", "predicted_velocity"):
        assert relative_error(getattr(shared, part), getattr(twice, part)) <= TOLERANCE, part
