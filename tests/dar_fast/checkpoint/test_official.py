"""Official files and dicts, in every wrapping, become our modules and go back unchanged."""

import argparse
import dataclasses

import pytest
import torch
from checkpoint_models import (
    OFFICIAL_PRIOR,
    OFFICIAL_TOKENIZER,
    PRIOR,
    TOKENIZER,
    official_state,
    same,
)

from dar_fast.checkpoint import (
    CheckpointError,
    load_official_prior,
    load_official_tokenizer,
    to_official,
)
from dar_fast.checkpoint.official_config import official_config, prior_config, tokenizer_config
from dar_fast.config import PRIORS, TOKENIZERS
from dar_fast.models import Prior, Tokenizer


@pytest.fixture(scope="module")
def prior_state():
    return official_state(PRIOR)


@pytest.fixture(scope="module")
def tokenizer_state():
    return official_state(TOKENIZER)


WRAP = {
    "bare": lambda s: s,
    "model": lambda s: {"model": s, "optimizer": {"state": {0: torch.ones(2)}}, "steps": 3},
    "module": lambda s: {"module": s},
    "state_dict": lambda s: {"state_dict": s, "epoch": 1},
    "nested": lambda s: {"model": {"module": s}},
    "ema over model": lambda s: {"model": {k: v + 1 for k, v in s.items()}, "ema": s},
    "empty ema": lambda s: {"model": s, "ema": None},
    "compiled": lambda s: {"model": {f"_orig_mod.{k}": v for k, v in s.items()}},
    "parallel": lambda s: {f"module.{k}": v for k, v in s.items()},
    "both": lambda s: {"ema": {f"module._orig_mod.{k}": v for k, v in s.items()}},
    "step tensor": lambda s: {"model": s, "steps": torch.tensor(5)},
}


@pytest.mark.parametrize("from_file", [False, True], ids=["dict", "file"])
@pytest.mark.parametrize("wrap", WRAP.values(), ids=list(WRAP))
def test_wrappers(tmp_path, tokenizer_state, wrap, from_file):
    source = wrap(tokenizer_state)
    if from_file:
        torch.save(source, tmp_path / "tokenizer.pt")
        source = tmp_path / "tokenizer.pt"
    tokenizer = load_official_tokenizer(source, OFFICIAL_TOKENIZER)
    assert tokenizer.config == TOKENIZER
    assert not tokenizer.training
    assert same(to_official(tokenizer), tokenizer_state)


@pytest.mark.parametrize(
    "config", [PRIOR, OFFICIAL_PRIOR, PRIOR.to_dict()], ids=["ours", "official", "dict"]
)
def test_prior_configs(prior_state, config):
    prior = load_official_prior(prior_state, config)
    assert prior.config == PRIOR
    assert same(to_official(prior), prior_state)
    assert all(p.requires_grad for p in prior.parameters())


@pytest.mark.parametrize("config", [TOKENIZER, TOKENIZER.to_dict()], ids=["ours", "dict"])
def test_tokenizer_configs(tokenizer_state, config):
    assert load_official_tokenizer(tokenizer_state, config).config == TOKENIZER


def test_outputs_follow_the_file(tmp_path, prior_state):
    """A module over a mapped file computes what one over the dict does."""
    torch.save({"model": prior_state}, tmp_path / "prior.pt")
    codes, labels = torch.arange(32).view(2, 16) % 32, torch.tensor([0, 3])
    a = load_official_prior(prior_state, PRIOR)(codes, labels)
    b = load_official_prior(tmp_path / "prior.pt", PRIOR)(codes, labels)
    assert torch.equal(a, b)


def test_a_dict_is_copied(prior_state):
    before = prior_state["norm.weight"].clone()
    prior = load_official_prior(prior_state, PRIOR)
    with torch.no_grad():
        prior.norm.weight.fill_(9.0)
    assert torch.equal(prior_state["norm.weight"], before)


def test_config_inside_the_file(tmp_path, tokenizer_state):
    config = argparse.Namespace(model={"target": "x", "params": OFFICIAL_TOKENIZER})
    torch.save({"model": tokenizer_state, "config": config, "steps": 7}, tmp_path / "t.pt")
    assert load_official_tokenizer(tmp_path / "t.pt").config == TOKENIZER


def test_image_size_from_the_arguments_of_the_run(tmp_path, tokenizer_state):
    config = {k: v for k, v in OFFICIAL_TOKENIZER.items() if k != "image_size"}
    args = argparse.Namespace(image_size=32, lr=1e-4)
    torch.save({"model": tokenizer_state, "config": config, "args": args}, tmp_path / "t.pt")
    assert load_official_tokenizer(tmp_path / "t.pt").config == TOKENIZER
    torch.save({"model": tokenizer_state, "config": config}, tmp_path / "t.pt")
    assert load_official_tokenizer(tmp_path / "t.pt").config.image_size == 64
    assert load_official_tokenizer(tmp_path / "t.pt", image_size=32).config == TOKENIZER


@pytest.mark.parametrize("name", ["B", "L", "XL", "XXL", "XXXL", "1B", "3B", "7B"])
def test_prior_presets_from_shapes_alone(name):
    with torch.device("meta"):
        state = to_official(Prior(PRIORS[name]))
    assert prior_config({}, state) == PRIORS[name]


@pytest.mark.parametrize("name", ["v1", "lite"])
def test_tokenizer_presets_from_shapes_alone(name):
    with torch.device("meta"):
        state = to_official(Tokenizer(TOKENIZERS[name]))
    assert tokenizer_config({}, state) == TOKENIZERS[name]
    assert state["quant_in_conv.weight"].shape[2:] == (1, 1)
    assert state["diff_decoder.net.conv_in.weight"].shape == (TOKENIZERS[name].dit.dim, 192, 1, 1)


def test_grouped_keys_from_shapes_and_config():
    config = dataclasses.replace(PRIOR, dim=128, heads=4, kv_heads=2)
    with torch.device("meta"):
        state = to_official(Prior(config))
    assert prior_config({**OFFICIAL_PRIOR, "dim": 128, "n_head": 4}, state) == config


@pytest.mark.parametrize("config", [PRIOR, TOKENIZER], ids=["prior", "tokenizer"])
def test_configs_go_back(config):
    with torch.device("meta"):
        state = to_official(Prior(config) if config is PRIOR else Tokenizer(config))
    back = prior_config if config is PRIOR else tokenizer_config
    assert back(official_config(config), state) == config


def test_no_alignment_head(tokenizer_state):
    headless = {k: v for k, v in tokenizer_state.items() if "repa_out" not in k}
    for config in (TOKENIZER, OFFICIAL_TOKENIZER):
        assert load_official_tokenizer(headless, config).config.dit.repa_layer is None
    without = dataclasses.replace(
        TOKENIZER, dit=dataclasses.replace(TOKENIZER.dit, repa_layer=None)
    )
    assert load_official_tokenizer(tokenizer_state, without).config == without


def test_training_state_is_ignored_and_squeezed_shapes_are_read(tokenizer_state):
    state = {**tokenizer_state, "quantize.codebook_used": torch.zeros(65536)}
    for name in ("quant_in_conv.weight", "diff_decoder.net.conv_out.weight"):
        state[name] = state[name][:, :, 0, 0]
    state["patchify.weight"] = state["patchify.weight"].flatten(1)
    tokenizer = load_official_tokenizer(state, OFFICIAL_TOKENIZER)
    assert same(to_official(tokenizer), tokenizer_state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_weights_become_fp32_unless_asked(prior_state, dtype):
    state = {k: v.to(dtype) for k, v in prior_state.items()}
    assert load_official_prior(state, PRIOR).norm.weight.dtype == torch.float32
    assert load_official_prior(state, PRIOR, dtype=None).norm.weight.dtype == dtype


def _without(state, *names):
    return {k: v for k, v in state.items() if k not in names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: _without(s, "norm.weight"), r"missing 1: norm\.weight"),
        (lambda s: {**s, "layers.9.extra": s["norm.weight"]}, r"unexpected 1: layers\.9\.extra"),
        (lambda s: {k: v for k, v in s.items() if "ffn" not in k}, "missing 2"),
        (
            lambda s: s | {"norm.weight": torch.ones(3)},
            r"norm\.weight: expected shape \[64\], got \[3\]",
        ),
        (lambda s: s | {"norm.weight": torch.ones(64).int()}, "expected floating point"),
        (lambda s: s | {"norm.weight": "text"}, r"norm\.weight: expected a tensor, got str"),
        (lambda s: s | {"module.norm.weight": s["norm.weight"]}, "there twice"),
        (lambda s: {"weights": s}, "expected the weights of an official prior or tokenizer"),
        (lambda s: {}, "expected the weights"),
        (lambda s: {"quantize.embedding.weight": torch.ones(2)}, "expected a prior, got a token"),
    ],
    ids=[
        "missing", "unexpected", "several", "shape", "dtype", "text", "twice", "wrapper", "empty",
        "kind",
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(prior_state, change, message):
    with pytest.raises(CheckpointError, match=message):
        load_official_prior(change(prior_state), PRIOR)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({**OFFICIAL_PRIOR, "n_layer": 3}, CheckpointError, r"missing 7: layers\.2\."),
        ({**OFFICIAL_PRIOR, "n_layer": 1}, CheckpointError, r"unexpected 7: layers\.1\."),
        ({**OFFICIAL_PRIOR, "n_layer": 10**9}, CheckpointError, "weights of 1000000000 layers"),
        ({**OFFICIAL_PRIOR, "n_layer": "x"}, CheckpointError, "expected integer depth"),
        ({**OFFICIAL_PRIOR, "vocab_size": 31}, CheckpointError, "tok_embeddings"),
        ({**OFFICIAL_PRIOR, "dim": 10**15}, CheckpointError, "prior|state dict"),
        ({**OFFICIAL_PRIOR, "n_head": 0}, CheckpointError, "expected integer heads"),
        ({**OFFICIAL_PRIOR, "multiple_of": 64}, CheckpointError, "expected multiple_of 256"),
        ({**PRIOR.to_dict(), "extra": 1}, ValueError, "expected keys among"),
        ("L", TypeError, "expected a PriorConfig or a dict, got str"),
        (TOKENIZER, TypeError, "got TokenizerConfig"),
    ],
    ids=lambda x: str(x)[:30],
)  # fmt: skip
def test_configs_that_do_not_fit(prior_state, config, error, message):
    with pytest.raises(error, match=message):
        load_official_prior(prior_state, config)


@pytest.mark.parametrize("change", [
    {"diff_decoder": {"mlp_head": True}}, {"diff_decoder": 3}, {"num_query_groups": 0},
    {"num_query_groups": 3}, {"vq_enable": False}, {"num_all_queries": "many"},
], ids=str)  # fmt: skip
def test_tokenizer_configs_that_do_not_fit(tokenizer_state, change):
    with pytest.raises(CheckpointError, match="state dict: "):
        load_official_tokenizer(tokenizer_state, {**OFFICIAL_TOKENIZER, **change})


def test_sources_that_are_none(tmp_path):
    with pytest.raises(TypeError, match="expected a path or a state dict, got int"):
        load_official_prior(3)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_official_prior(tmp_path / "none.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="expected a dict in the file, got list"):
        load_official_prior(tmp_path / "list.pt")
    with pytest.raises(TypeError, match="expected a Prior or a Tokenizer, got Linear"):
        to_official(torch.nn.Linear(1, 1))
