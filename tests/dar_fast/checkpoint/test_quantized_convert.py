"""Priors in one byte by `convert`, for `describe`, on the command line and in pipeline folders."""

import json

import pytest
import safetensors.torch
import torch
from checkpoint_models import PRIOR, TOKENIZER, official_state, same, same_operands

from dar_fast import DARPipeline
from dar_fast.checkpoint import (
    convert,
    describe,
    load_model,
    load_official_prior,
    to_official,
)
from dar_fast.cli import main
from dar_fast.quantization import DTYPES, products, quantize_prior, stored_quantization

KINDS = list(DTYPES)


@pytest.fixture
def files(tmp_path, state):
    paths = tmp_path / "prior.safetensors", tmp_path / "tokenizer.safetensors"
    for path, part in zip(paths, (state, official_state(TOKENIZER)), strict=True):
        safetensors.torch.save_file({k: v.contiguous() for k, v in part.items()}, path)
    return paths


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_convert_quantises_from_the_values_as_stored(tmp_path, files, prior, dtype):
    convert(files[0], tmp_path / "x", config=PRIOR, quantize="int8", dtype=dtype)
    loaded = load_model(tmp_path / "x")
    quantize_prior(prior, "int8")
    assert same_operands(loaded, prior)
    assert loaded.norm.weight.dtype == loaded.head.weight.dtype == (dtype or torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipeline_in_one_byte(tmp_path, tiny_pipeline, kind):
    tiny_pipeline.save_pretrained(tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "small", quantize=kind)
    small = DARPipeline.from_pretrained(tmp_path / "small", device="cpu")
    assert stored_quantization(small.prior) == kind
    assert list(small.labels) == list(tiny_pipeline.labels)
    assert same(small.tokenizer.state_dict(), tiny_pipeline.tokenizer.state_dict())
    small.save_pretrained(tmp_path / "again")
    again = DARPipeline.from_pretrained(tmp_path / "again", device="cpu")
    assert same_operands(again.prior, small.prior)
    a, b = (pipe(["cat face"], seeds=1, output_type="pt") for pipe in (small, again))
    assert torch.equal(a.codes, b.codes)
    with pytest.raises(ValueError, match=f"quantization: expected '{kind}'"):
        convert(tmp_path / "small", tmp_path / "x", quantize=next(k for k in KINDS if k != kind))
    assert not (tmp_path / "x").exists()
    convert(tmp_path / "small", tmp_path / "same", quantize=kind)
    assert same_operands(load_model(tmp_path / "same" / "prior"), small.prior)


def test_official_files_hold_what_the_bytes_stand_for(saved, tmp_path):
    convert(saved, tmp_path / "back.pt", to="official")
    back = load_official_prior(tmp_path / "back.pt")
    assert same(to_official(back), to_official(load_model(saved)))
    assert stored_quantization(back) is None


def test_convert_refuses(tmp_path, files, saved):
    with pytest.raises(ValueError, match="quantize: expected to='ours', got 'official'"):
        convert(saved, tmp_path / "x.pt", to="official", quantize="int8")
    with pytest.raises(ValueError, match=r"quantization: expected one of \['int8', 'fp8'\]"):
        convert(saved, tmp_path / "x", quantize="int4")
    with pytest.raises(ValueError, match="quantize: expected a prior in the source"):
        convert(files[1], tmp_path / "x", config=TOKENIZER, quantize="int8")
    assert not (tmp_path / "x").exists()


def test_describe(saved, prior):
    found = describe(saved)
    assert found["quantization"] == "int8"
    assert found["config"] == PRIOR.to_dict()
    matrices = sum(product.weight.numel() for product in products(prior).values())
    total = sum(p.numel() for p in prior.parameters())
    assert found["parameters"] == total
    assert found["dtypes"] == {"int8": matrices, "float32": total - matrices}
    assert found["tensors"] == len(prior.state_dict()) + len(products(prior))
    assert found["bytes"] == sum(p.stat().st_size for p in saved.iterdir())
    assert found["refused"] is None


def test_the_command_line(tmp_path, tiny_pipeline, capsys):
    tiny_pipeline.save_pretrained(tmp_path / "plain")
    assert main(["convert", f"{tmp_path}/plain", f"{tmp_path}/small", "--quantize", "int8"]) == 0
    assert main(["info", f"{tmp_path}/small", "--json"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out[out.index("{") :])
    assert found["components"]["prior"]["quantization"] == "int8"
    assert found["components"]["prior"]["bytes"] < describe(tmp_path / "plain/prior")["bytes"] / 2
    assert main(["convert", f"{tmp_path}/small", f"{tmp_path}/x", "--quantize", "fp8"]) == 2
    assert "expected 'int8', which the prior's weights are in, got 'fp8'" in capsys.readouterr().err
    assert main(["convert", f"{tmp_path}/small", f"{tmp_path}/x", "--quantize", "int4"]) == 2
    assert "int8" in capsys.readouterr().err
