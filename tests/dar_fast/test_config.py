"""Presets have the published sizes; configurations refuse what cannot be built."""

import pytest
import torch

from dar_fast.config import PRIORS, TOKENIZERS, PixelDiTConfig, PriorConfig, TokenizerConfig
from dar_fast.models import Prior, Tokenizer


def parameters(cls, config):
    with torch.device("meta"):
        return sum(p.numel() for p in cls(config).parameters())


@pytest.mark.parametrize(
    ("name", "hidden", "millions"),
    [
        ("B", 2048, 111), ("L", 2816, 343), ("XL", 3584, 775), ("XXL", 4096, 1400),
        ("XXXL", 6912, 3900), ("1B", 5632, 1200), ("3B", 8704, 3100), ("7B", 11008, 6600),
    ],
)  # fmt: skip
def test_priors_have_the_published_sizes(name, hidden, millions):
    config = PRIORS[name]
    assert config.hidden_dim == hidden
    assert (config.vocab_size, config.num_tokens, config.null_class) == (16_384, 256, 1000)
    assert parameters(Prior, config) / 1e6 == pytest.approx(millions, rel=0.03)


@pytest.mark.parametrize(("name", "millions"), [("v1", 307), ("lite", 113)])
def test_tokenizers_have_the_published_sizes(name, millions):
    assert TOKENIZERS[name].group_size == 32
    assert parameters(Tokenizer, TOKENIZERS[name]) / 1e6 == pytest.approx(millions, rel=0.03)


def test_the_embedded_model_fits_the_package():
    count = parameters(Prior, PRIORS["demo"]) + parameters(Tokenizer, TOKENIZERS["demo"])
    assert 2 * count < 32e6  # bytes in bf16


@pytest.mark.parametrize("config", [*PRIORS.values(), *TOKENIZERS.values()], ids=str)
def test_dictionaries_round_trip(config):
    assert type(config).from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (PriorConfig, {"dim": 0, "depth": 1, "heads": 1}, "expected integer dim >= 2, got 0"),
        (PriorConfig, {"dim": 64, "depth": True, "heads": 1}, "expected integer depth"),
        (PriorConfig, {"dim": 65, "depth": 1, "heads": 2}, "divisible into 2 heads"),
        (PriorConfig, {"dim": 6, "depth": 1, "heads": 2}, "heads of even width"),
        (
            PriorConfig,
            {"dim": 64, "depth": 1, "heads": 4, "kv_heads": 3},
            "kv_heads dividing 4, got 3",
        ),
        (PriorConfig, {"dim": 64, "depth": 1, "heads": 4, "norm_eps": 0.0}, "norm_eps in"),
        (TokenizerConfig, {"image_size": 100}, "patch_size dividing image_size 100, got 16"),
        (
            TokenizerConfig,
            {"dit": PixelDiTConfig(patch_size=24)},
            "dit.patch_size dividing image_size 256, got 24",
        ),
        (TokenizerConfig, {"num_groups": 7}, "num_groups dividing num_tokens 256, got 7"),
        (TokenizerConfig, {"num_tokens": 2048}, "num_tokens <= 1024, got 2048"),
        (TokenizerConfig, {"encoder_dim": 100}, "encoder_dim divisible by a head_dim"),
        (PixelDiTConfig, {"dim": 100}, "dim divisible by a head_dim"),
        (PixelDiTConfig, {"repa_layer": 12}, r"repa_layer in \[0, 12\), got 12"),
        (PixelDiTConfig, {"data_std": 0.0}, "data_std and time_shift > 0"),
    ],
)
def test_impossible_configurations(cls, values, message):
    with pytest.raises(ValueError, match=message):
        cls(**values)


def test_unknown_keys_are_named():
    with pytest.raises(ValueError, match=r"got \['width'\]"):
        PriorConfig.from_dict({"dim": 64, "depth": 1, "heads": 1, "width": 3})
    with pytest.raises(ValueError, match=r"PixelDiTConfig.*got \['layers'\]"):
        TokenizerConfig.from_dict({"dit": {"layers": 3}})
