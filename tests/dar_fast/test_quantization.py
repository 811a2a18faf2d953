"""A prior in one byte: what it computes, when it keeps its bytes, how it decodes."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dar_fast.engine import Engine, EngineConfig, GenerationRequest
from dar_fast.models.quantized import Product
from dar_fast.quantization import (
    DTYPES,
    engine_weights,
    products,
    quantize_prior,
    stored_quantization,
)
from dar_kernels import UnavailableError
from dar_kernels.decode_step import NativeDecoder, decode_step_ref
from dar_kernels.decoder_weights import new_decoder_pages
from dar_kernels.native import missing
from dar_kernels.quantize import dequantize, quantize_weight

KINDS = list(DTYPES)


@pytest.fixture
def prior(fresh_pipeline):
    return fresh_pipeline.prior


def same(a, b):
    """Whether two operands hold the same bits; there is no == of float8."""
    return torch.equal(a.values.view(torch.uint8), b.values.view(torch.uint8)) and torch.equal(
        a.scale, b.scale
    )


def test_products_are_all_matrices_but_the_embeddings(prior):
    matrices = {n.removesuffix(".weight") for n, p in prior.named_parameters() if p.ndim == 2}
    assert matrices - products(prior).keys() == {"class_embedding", "token_embedding"}
    assert len(products(prior)) == 5 * prior.config.depth + 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_module_computes_with_what_the_bytes_stand_for(prior, kind, dtype):
    prior.to(dtype)
    before = copy.deepcopy(prior.state_dict())
    assert stored_quantization(prior) is None
    quantize_prior(prior, kind)
    assert stored_quantization(prior) == kind
    for name, product in products(prior).items():
        weight = before.pop(f"{name}.weight")
        assert same(product.quantized, quantize_weight(weight, DTYPES[kind]))
        assert torch.equal(product.weight, dequantize(product.quantized, dtype))
        assert product.weight.dtype == dtype
        assert not torch.equal(product.weight, weight)
    after = prior.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    kept = prior.head.quantized
    quantize_prior(prior, kind)
    assert prior.head.quantized is kept


@pytest.mark.parametrize("kind", KINDS)
def test_a_cast_goes_back_to_the_bytes_precision(prior, kind):
    quantize_prior(prior, kind)
    kept = prior.head.quantized
    prior.to(torch.bfloat16)
    assert stored_quantization(prior) == kind
    assert prior.head.quantized.scale.dtype == torch.float32
    assert same(prior.head.quantized, kept)
    assert torch.equal(prior.head.weight, dequantize(kept, torch.bfloat16))


CHANGES = {
    "training": lambda m: m.train(),
    "loading": lambda m: m.load_state_dict(copy.deepcopy(m.state_dict())),
    "assigning": lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True),
    "in place": lambda m: m.head.weight.zero_(),
    "another parameter": lambda m: setattr(m.head, "weight", torch.nn.Parameter(m.head.weight + 0)),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_what_changes_weights_drops_their_bytes(prior, change):
    quantize_prior(prior, "int8")
    CHANGES[change](prior)
    assert prior.head.quantized is None
    assert stored_quantization(prior) is None


def test_an_optimizer_step_drops_them(prior):
    quantize_prior(prior, "int8")
    optimizer = torch.optim.SGD(prior.parameters(), lr=0.1)
    codes = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))
    prior.loss(codes, torch.tensor([0, 1])).backward()
    optimizer.step()
    assert stored_quantization(prior) is None


def test_copies_keep_their_own(prior):
    quantize_prior(prior, "int8")
    other = copy.deepcopy(prior)
    assert stored_quantization(other) == "int8"
    assert other.head.quantized.values.data_ptr() != prior.head.quantized.values.data_ptr()
    with torch.no_grad():
        other.head.weight.zero_()
    assert other.head.quantized is None
    assert prior.head.quantized is not None


def test_weights_made_for_inference_keep_them_too():
    with torch.inference_mode():
        product = Product(3, 2).eval()
        product.set_quantized(quantize_weight(product.weight))
        assert product.quantized is not None


@given(
    rows=st.lists(
        st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=4, max_size=4),
        min_size=1,
        max_size=6,
    ),
    kind=st.sampled_from(KINDS),
)
def test_any_finite_weight(rows, kind):
    weight = torch.tensor(rows)
    product = Product(4, len(rows)).eval()
    product.set_quantized(quantize_weight(weight, DTYPES[kind]))
    largest = weight.double().abs().amax(1, keepdim=True)
    error = (product.weight.double() - weight.double()).abs()
    step = (
        largest / 254 if kind == "int8" else (weight.double().abs() / 16).max(largest / 448 / 1e3)
    )
    tiny = torch.finfo(torch.float32).tiny  # scales are no smaller
    assert bool((error <= step * (1 + 1e-5) + 448 * tiny).all())


def test_engine_weights_as_given_are_the_modules_own(prior):
    quantize_prior(prior, "int8")
    weights = engine_weights(prior)
    assert weights.head is prior.head.weight
    assert weights.layers[1].down is prior.layers[1].mlp.down.weight


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "on the fly"])
def test_engine_weights_in_int8(prior, stored):
    before = copy.deepcopy(prior)
    if stored:
        quantize_prior(prior, "int8")
    weights = engine_weights(prior, "int8")
    assert weights.quantized == torch.int8
    expected = engine_weights(before, "int8")
    pairs = [(weights.head, expected.head)]
    for ours, theirs in zip(weights.layers, expected.layers, strict=True):
        pairs += zip(ours.products(), theirs.products(), strict=True)
    assert len(pairs) == 5 * prior.config.depth + 1
    assert all(same(a, b) for a, b in pairs)
    if stored:
        assert weights.head is prior.head.quantized
        assert weights.layers[0].gate is prior.layers[0].mlp.gate.quantized
    assert weights.token_embedding is prior.token_embedding.weight


@pytest.mark.skipif(missing() is not None, reason="the C++ ops were not built")
@torch.no_grad()
def test_decoding_in_int8_is_the_plain_module_of_these_bytes(prior):
    quantize_prior(prior, "int8")
    weights = engine_weights(prior, "int8")
    decoder = NativeDecoder(weights)
    codes = torch.randint(64, (3, 16), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 3, 6])
    expected = prior(codes, labels)
    pages = new_decoder_pages(weights, 3, torch.float32)
    table = torch.arange(3, dtype=torch.int32)[:, None]
    x = prior.class_embedding(labels)
    for p in range(16):
        logits = decoder.logits(x, pages, table, torch.full((3,), p))
        # activations have 16 bits in int8 products
        torch.testing.assert_close(logits, expected[:, p], atol=2e-3, rtol=1e-3)
        x = prior.token_embedding(codes[:, p])


@torch.no_grad()
def test_on_cuda_fp8_is_read_as_stored(prior, monkeypatch):
    """The device is a stand-in: the bytes are what the reference decodes to the module's logits."""
    quantize_prior(prior, "fp8")
    monkeypatch.setattr("dar_fast.quantization.ONE_BYTE", {})
    weights = engine_weights(prior, "fp8")
    assert weights.head is prior.head.quantized
    labels = torch.tensor([1, 2])
    pages = new_decoder_pages(weights, 2, torch.float32)
    table = torch.arange(2, dtype=torch.int32)[:, None]
    logits = decode_step_ref(
        weights, prior.class_embedding(labels), pages, table, torch.zeros(2, dtype=torch.int64)
    )
    expected = prior(torch.zeros(2, 1, dtype=torch.int64), labels)[:, 0]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_refusals(prior):
    for call in (engine_weights, quantize_prior):
        for name in ("int4", None, 8, ["int8"]):
            with pytest.raises(ValueError, match=r"expected one of \[.*'int8', 'fp8'\], got"):
                call(prior, name)
    with pytest.raises(
        UnavailableError, match=r"expected one of \['as given', 'int8'\] on cpu, got 'fp8'"
    ):
        engine_weights(prior, "fp8")
    with pytest.raises(ValueError, match="expected evaluation mode"):
        quantize_prior(copy.deepcopy(prior).train(), "int8")
    broken = copy.deepcopy(prior)
    with torch.no_grad():
        broken.head.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="expected finite weights"):
        quantize_prior(broken, "int8")
    quantize_prior(prior, "fp8")
    with pytest.raises(ValueError, match=r"prior_weights: expected 'fp8', which .* got 'int8'"):
        engine_weights(prior, "int8")
    with pytest.raises(ValueError, match=r"quantization: expected 'fp8', which .* got 'int8'"):
        quantize_prior(prior, "int8")


def test_a_refused_weight_leaves_the_prior_as_it_was(prior):
    with torch.no_grad():
        prior.head.weight[0, 0] = torch.inf
    before = copy.deepcopy(prior.state_dict())
    with pytest.raises(ValueError, match="finite"):
        quantize_prior(prior, "int8")
    after = prior.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(product.quantized is None for product in products(prior).values())


@pytest.mark.parametrize(
    ("stored", "asked", "form"),
    [
        (None, "as stored", "as given"),
        ("int8", "as stored", "int8"),
        ("int8", "as given", "as given"),
        ("fp8", "as stored", "as given"),  # of which a CPU has no kernels
        (None, "int8", "int8"),
    ],
)
def test_an_engine_draws_with_what_is_stored(fresh_pipeline, stored, asked, form):
    if stored is not None:
        quantize_prior(fresh_pipeline.prior, stored)
    config = EngineConfig(max_requests=1, prior_weights=asked)
    with Engine(fresh_pipeline.prior, fresh_pipeline.tokenizer, config) as engine:
        assert engine.stats().prior_weights == form
        assert len(engine.generate([GenerationRequest(label=0, seed=1)])[0].codes) == 16
