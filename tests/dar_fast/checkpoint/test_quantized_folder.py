"""Priors stored in one byte: the same bits back, and what is refused."""

import copy
import json

import pytest
import safetensors.torch
import torch
from checkpoint_models import PRIOR, same, same_operands
from hypothesis import given
from hypothesis import strategies as st

from dar_fast.checkpoint import (
    CheckpointError,
    describe,
    load_model,
    save_model,
)
from dar_fast.quantization import (
    DTYPES,
    engine_weights,
    products,
    quantize_prior,
    stored_quantization,
)
from dar_kernels.quantize import QuantizedWeight, dequantize, quantize_weight

KINDS = list(DTYPES)
QKV = "layers.0.attention.qkv.weight"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shard", [1 << 30, 50_000], ids=["one file", "shards"])
def test_round_trip(tmp_path, prior, kind, dtype, shard):
    plain = copy.deepcopy(prior)
    quantize_prior(prior, kind)
    save_model(prior, tmp_path / "x", max_shard_bytes=shard)
    loaded = load_model(tmp_path / "x", dtype=dtype)
    assert stored_quantization(loaded) == kind
    assert same_operands(loaded, prior)
    wanted = dtype or torch.float32
    for name, product in products(loaded).items():
        expected = quantize_weight(products(plain)[name].weight, DTYPES[kind])
        assert torch.equal(product.weight, dequantize(expected, wanted))
    assert {p.dtype for p in loaded.parameters()} == {wanted}
    assert not loaded.training
    embedding = plain.token_embedding.weight.to(wanted)
    assert torch.equal(loaded.token_embedding.weight, embedding)
    save_model(loaded, tmp_path / "y")
    again = load_model(tmp_path / "y", dtype=dtype)
    assert same_operands(again, prior)
    assert same(again.state_dict(), loaded.state_dict())


def test_the_file_holds_bytes_and_scales(saved, prior):
    tensors = safetensors.torch.load_file(saved / "model.safetensors")
    scales = {name for name in tensors if name.endswith("_scale")}
    assert scales == {f"{name}.weight_scale" for name in products(prior)}
    for name in scales:
        assert tensors[name].dtype == torch.float32
        assert tensors[name].shape == tensors[name.removesuffix("_scale")].shape[:1]
        assert tensors[name.removesuffix("_scale")].dtype == torch.int8
    assert json.loads((saved / "config.json").read_text())["quantization"] == "int8"


def test_what_was_changed_is_saved_plain(saved):
    prior = load_model(saved)
    with torch.no_grad():
        prior.layers[1].mlp.up.weight.mul_(2)
    save_model(prior, saved)
    assert "quantization" not in json.loads((saved / "config.json").read_text())
    assert same(load_model(saved).state_dict(), prior.state_dict())
    assert stored_quantization(load_model(saved)) is None


def test_decoding_takes_what_was_stored(saved):
    prior = load_model(saved, dtype=torch.bfloat16)
    weights = engine_weights(prior, "int8")
    stored = safetensors.torch.load_file(saved / "model.safetensors")
    assert torch.equal(weights.layers[0].qkv.values, stored[QKV])
    assert torch.equal(weights.layers[0].qkv.scale, stored[QKV + "_scale"])
    with pytest.raises(ValueError, match=r"expected 'int8', which .*, got 'fp8'"):
        quantize_prior(prior, "fp8")


def test_stored_scales_need_not_be_ours(saved):
    """Another quantiser's choice is read as it is, not made again."""
    tensors = safetensors.torch.load_file(saved / "model.safetensors")
    tensors[QKV] = tensors[QKV] // 2
    tensors[QKV + "_scale"] = tensors[QKV + "_scale"] * 2.5
    safetensors.torch.save_file(tensors, saved / "model.safetensors")
    prior = load_model(saved)
    expected = QuantizedWeight(tensors[QKV], tensors[QKV + "_scale"])
    assert torch.equal(prior.layers[0].attention.qkv.weight, dequantize(expected))
    assert torch.equal(engine_weights(prior, "int8").layers[0].qkv.values, expected.values)


def edit(name, change, dropped=()):
    def apply(tensors):
        if name is not None:
            tensors[name] = change(tensors[name])
        for each in dropped:
            del tensors[each]

    return apply


def put(index, value):
    def change(tensor):
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return change


DAMAGE = {
    "no scale": (edit(None, None, [QKV + "_scale"]), rf"missing 1: {QKV}_scale"),
    "no values": (edit(None, None, [QKV]), rf"missing 1: {QKV}$"),
    "scale of another length": (
        edit(QKV + "_scale", lambda t: t[:-1].clone()),
        rf"{QKV}_scale: expected shape \[192\], got \[191\]",
    ),
    "one scale": (
        edit(QKV + "_scale", lambda t: t[0].clone()),
        rf"{QKV}_scale: expected shape \[192\], got \[\]",
    ),
    "fp16 scales": (
        edit(QKV + "_scale", torch.Tensor.half),
        rf"{QKV}_scale: expected torch.float32, got torch.float16",
    ),
    "float values": (edit(QKV, torch.Tensor.float), rf"{QKV}: expected torch.int8, got torch.flo"),
    "bytes without sign": (
        edit(QKV, lambda t: t.view(torch.uint8)),
        rf"{QKV}: expected torch.int8, got torch.uint8",
    ),
    "fp8 values": (
        edit(QKV, lambda t: t.float().to(torch.float8_e4m3fn)),
        rf"{QKV}: expected torch.int8, got torch.float8_e4m3fn",
    ),
    "turned values": (edit(QKV, lambda t: t.T.contiguous()), rf"{QKV}: expected shape \[192, 64\]"),
    "quantised norm": (
        edit("norm.weight", lambda t: t.to(torch.int8)),
        r"norm\.weight: expected floating point, got torch.int8",
    ),
}
DAMAGED_VALUES = {
    "NaN scale": edit(QKV + "_scale", put(3, torch.nan)),
    "infinite scale": edit(QKV + "_scale", put(3, torch.inf)),
    "zero scale": edit(QKV + "_scale", put(3, 0.0)),
    "negative scale": edit(QKV + "_scale", put(3, -1e-3)),
}


def damage(folder, apply):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    apply(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("case", DAMAGE)
def test_headers_that_do_not_fit(saved, case):
    apply, message = DAMAGE[case]
    damage(saved, apply)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(saved)
    assert describe(saved)["refused"] == str(caught.value)


@pytest.mark.parametrize("case", DAMAGED_VALUES)
def test_scales_that_do_not_fit(saved, case):
    damage(saved, DAMAGED_VALUES[case])
    with pytest.raises(CheckpointError, match=rf"{QKV}_scale: expected finite scales > 0"):
        load_model(saved)


def test_fp8_values_that_are_not_finite(tmp_path, prior):
    quantize_prior(prior, "fp8")
    save_model(prior, tmp_path / "x")
    code = torch.tensor(0xFF, dtype=torch.uint8).view(torch.int8)
    damage(
        tmp_path / "x",
        edit(QKV, lambda t: put((0, 5), code)(t.view(torch.int8)).view(torch.float8_e4m3fn)),
    )
    with pytest.raises(CheckpointError, match=rf"{QKV}: expected finite values, got NaN"):
        load_model(tmp_path / "x")


def configure(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@given(value=st.one_of(st.text(), st.integers(), st.lists(st.text()), st.booleans()))
def test_unknown_quantisations(tmp_path_factory, value):
    folder = tmp_path_factory.mktemp("folder")
    (folder / "config.json").write_text(
        json.dumps({"_class": "Prior", "quantization": value, **PRIOR.to_dict()})
    )
    if value in KINDS:
        return
    with pytest.raises(CheckpointError, match=r"quantization: expected one of \['int8', 'fp8'\]"):
        load_model(folder)


def test_a_configuration_of_something_else(saved, tmp_path, prior):
    configure(saved, quantization="fp8")
    with pytest.raises(CheckpointError, match=r"expected torch\.float8_e4m3fn, got torch\.int8"):
        load_model(saved)
    configure(saved, quantization=None)
    with pytest.raises(CheckpointError, match=r"unexpected \d+: .*_scale"):
        load_model(saved)
    configure(saved, quantization="int8", _class="Tokenizer")
    with pytest.raises(CheckpointError, match="TokenizerConfig: expected keys among"):
        load_model(saved)
