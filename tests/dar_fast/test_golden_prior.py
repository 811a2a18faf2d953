"""The prior against every value recorded from the official implementation."""

import pytest
import torch
import torch.nn.functional as F
from golden_fixtures import check_gradients, golden, golden_prior, relative_error

from dar_fast.models.kv_cache import KVCache
from dar_fast.sampling import Sampling
from dar_kernels import UnavailableError, prefer

NAME = "prior_tiny"
TOLERANCE = 1e-5


@pytest.fixture(autouse=True, params=["torch", "native"])
def _implementation(request):
    """Every test under both (Triton: test_golden_triton.py); ops that lack one choose as ever."""
    try:
        with prefer(request.param):
            yield
    except UnavailableError as error:
        pytest.skip(str(error))


GUIDANCE = {"none": 1.0, "const": 4.0, "linear": (1.1, 8.0)}


def recorded(key):
    return golden(NAME).tensors[key]


def codes_and_labels():
    return recorded("tokens").long(), recorded("labels").long()


@torch.no_grad()
def test_logits():
    model = golden_prior(NAME)
    assert sum(p.numel() for p in model.parameters()) == golden(NAME).meta["params"]
    codes, labels = codes_and_labels()
    positions = recorded("positions").long()
    assert relative_error(model(codes, labels)[:, positions], recorded("logits")) <= TOLERANCE
    null = torch.full_like(labels, model.config.null_class)
    actual = model(codes, null)[:, positions]
    assert relative_error(actual, recorded("logits_uncond")) <= TOLERANCE


@pytest.mark.parametrize("schedule", GUIDANCE)
def test_greedy_codes(schedule):
    model = golden_prior(NAME)
    _, labels = codes_and_labels()
    codes = model.generate(labels, guidance_scale=GUIDANCE[schedule], temperature=0)
    margin, expected = recorded(f"greedy_margin.{schedule}"), recorded(f"greedy.{schedule}")
    for row in range(len(labels)):
        unclear = (margin[row] < 1e-4).nonzero().flatten().tolist()
        until = unclear[0] if unclear else len(margin[row])
        assert until > 32  # the comparison must mean something
        assert torch.equal(codes[row, :until], expected[row, :until].long())


@pytest.mark.parametrize("whole", [True, False], ids=["logits", "loss"])
def test_training_step(whole):
    model = golden_prior(NAME)
    model.zero_grad()
    codes, labels = codes_and_labels()
    if whole:
        loss = F.cross_entropy(model(codes, labels).flatten(0, 1), codes.flatten())
    else:
        loss = model.loss(codes, labels)
    assert float(loss.detach()) == pytest.approx(float(recorded("train.loss")), rel=1e-6)
    loss.backward()
    check_gradients(model, NAME)
    model.zero_grad()


@pytest.mark.parametrize("chunk", [1, 5, 64])
@torch.no_grad()
def test_decoding_with_a_cache_is_the_whole_pass(chunk):
    model = golden_prior(NAME)
    codes, labels = codes_and_labels()
    cache = KVCache(model.config, len(codes), codes.device, torch.float32)
    inputs = model.embed(codes[:, :-1], labels)
    rows = [model.hidden(part, cache) for part in inputs.split(chunk, dim=1)]
    logits = model.head(torch.cat(rows, 1)).float()
    assert relative_error(logits, model(codes, labels)) <= TOLERANCE


def test_a_prefix_continues_as_the_greedy_run_that_made_it():
    model = golden_prior(NAME)
    _, labels = codes_and_labels()
    settings = {"guidance_scale": 4.0, "temperature": 0}
    codes = model.generate(labels, **settings)
    for length in (1, 8, 63, 64):
        again = model.generate(labels, prefix_codes=codes[:, :length], **settings)
        assert torch.equal(again, codes), length


def test_guidance_of_one_row_is_the_formula():
    model = golden_prior(NAME)
    codes, labels = codes_and_labels()
    null = torch.full_like(labels, model.config.null_class)
    with torch.no_grad():
        cond, uncond = model(codes, labels)[:, 0], model(codes, null)[:, 0]
    first = next(model.generation(labels, Sampling(guidance_scale=2.5, temperature=0)))
    assert torch.equal(first[:, 0], (uncond + 2.5 * (cond - uncond)).argmax(-1))
