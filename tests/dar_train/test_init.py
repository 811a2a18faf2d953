"""Starting weights: all that fits is taken, a recipe's own changes stay, the rest is an error."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dar_fast.checkpoint import CheckpointError, save_model, to_official
from dar_fast.config import PriorConfig, TokenizerConfig
from dar_fast.models import Prior, Tokenizer
from dar_fast.problems import ProblemsError
from dar_train.init import start_weights


@pytest.fixture
def make(model_files):
    def tokenizer(**changes) -> Tokenizer:
        values = json.loads(Path(model_files["tokenizer"]).read_text())
        dit = values["dit"] | changes.pop("dit", {})
        return Tokenizer(TokenizerConfig.from_dict(values | {"dit": dit} | changes), 0.1)

    def prior(**changes) -> Prior:
        values = json.loads(Path(model_files["prior"]).read_text())
        return Prior(PriorConfig.from_dict(values | changes))

    return {"tokenizer": tokenizer, "prior": prior}


def _same(model, source, but=()) -> bool:
    given = source.state_dict()
    return all(
        torch.equal(value, given[name])
        for name, value in model.state_dict().items()
        if name not in but
    )


@pytest.mark.parametrize("kind", ["tokenizer", "prior"])
def test_the_same_model_is_taken_whole(make, kind, tmp_path) -> None:
    torch.manual_seed(0)
    source, model = make[kind](), make[kind]()
    for parameter in source.parameters():  # what starts at zero or one is told apart, too
        torch.nn.init.normal_(parameter)
    save_model(source, tmp_path / "source")
    assert start_weights(model, tmp_path / "source") == []
    assert _same(model, source)


def test_an_official_file(tmp_path) -> None:
    torch.manual_seed(0)
    config = PriorConfig(dim=128, depth=1, heads=2, vocab_size=32, num_tokens=8, num_classes=4)
    source, model = Prior(config), Prior(replace(config, num_classes=2))
    torch.save({"model": to_official(source)}, tmp_path / "prior.pt")
    assert start_weights(model, tmp_path / "prior.pt") == ["class_embedding.weight"]
    assert torch.equal(model.token_embedding.weight, source.token_embedding.weight)


def test_a_smaller_codebook_stays_at_its_start(make, tmp_path, caplog) -> None:
    torch.manual_seed(0)
    source, model = make["tokenizer"](), make["tokenizer"](codebook_size=8)
    save_model(source, tmp_path / "source")
    start = model.quantizer.codebook.detach().clone()
    with caplog.at_level(logging.INFO, "dar_train"):
        assert start_weights(model, tmp_path / "source") == ["quantizer.codebook"]
    assert "quantizer.codebook is left at its start" in caplog.text
    assert torch.equal(model.quantizer.codebook, start)
    assert _same(model, source, but=("quantizer.codebook",))


def test_other_labels_and_codes(make, tmp_path) -> None:
    torch.manual_seed(0)
    source = make["prior"]()
    save_model(source, tmp_path / "source")
    other = make["prior"](num_classes=7)
    assert start_weights(other, tmp_path / "source") == ["class_embedding.weight"]
    other = make["prior"](vocab_size=48)
    left = start_weights(other, tmp_path / "source")
    assert left == ["head.weight", "token_embedding.weight"]
    assert torch.equal(other.class_embedding.weight, source.class_embedding.weight)


def test_what_does_not_fit_is_named_and_nothing_changes(make, tmp_path) -> None:
    torch.manual_seed(0)
    save_model(make["tokenizer"](), tmp_path / "source")
    model = make["tokenizer"](encoder_depth=2, code_dim=8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ProblemsError) as raised:
        start_weights(model, tmp_path / "source")
    text = str(raised.value)
    assert r"init: expected encoder.layers.1." in text
    assert "init: expected quantizer.proj_in.weight [8, 16], got [4, 16] in" in text
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_alignment_head_may_be_missing_on_either_side(make, tmp_path) -> None:
    torch.manual_seed(0)
    bare, headed = make["tokenizer"](), make["tokenizer"](dit={"repa_layer": 0})
    save_model(bare, tmp_path / "bare")
    left = start_weights(headed, tmp_path / "bare")
    assert left
    assert all(name.startswith("pixel_dit.repa_out.") for name in left)
    save_model(headed, tmp_path / "headed")
    assert start_weights(bare, tmp_path / "headed") == []


def test_other_kinds_and_other_files(make, tmp_path) -> None:
    save_model(make["prior"](), tmp_path / "prior")
    with pytest.raises(ValueError, match=r"init: expected a Tokenizer in .*prior, got Prior"):
        start_weights(make["tokenizer"](), tmp_path / "prior")
    with pytest.raises(TypeError, match="init: expected a Prior or a Tokenizer, got Linear"):
        start_weights(torch.nn.Linear(2, 2), tmp_path / "prior")
    (tmp_path / "noise.pt").write_bytes(b"noise")
    for path in (tmp_path / "noise.pt", tmp_path / "missing.pt", tmp_path):
        with pytest.raises(CheckpointError):
            start_weights(make["prior"](), path)
