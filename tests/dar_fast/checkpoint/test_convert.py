"""Official to ours and back: the same bits under the same names; descriptions of every form."""

import argparse
import json
import os

import pytest
import torch
from checkpoint_models import OFFICIAL_TOKENIZER, PRIOR, TOKENIZER, official_state, same

from dar_fast import DARPipeline
from dar_fast.checkpoint import (
    CheckpointError,
    convert,
    describe,
    load_model,
    load_official_prior,
    load_official_tokenizer,
    save_model,
    to_official,
)


@pytest.fixture(scope="module")
def states():
    return official_state(PRIOR), official_state(TOKENIZER)


@pytest.fixture
def files(tmp_path, states):
    prior, tokenizer = tmp_path / "prior.pt", tmp_path / "tokenizer.pt"
    torch.save({"model": states[0], "config": {"block_size": 16, "n_head": 1}, "steps": 3}, prior)
    torch.save(
        {"model": {}, "ema": states[1], "config": OFFICIAL_TOKENIZER, "args": argparse.Namespace()},
        tokenizer,
    )
    return prior, tokenizer


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", [0, 1], ids=["prior", "tokenizer"])
def test_there_and_back(tmp_path, files, states, kind, suffix):
    ours = tmp_path / "ours"
    assert ours / "config.json" in convert(files[kind], ours)
    assert load_model(ours).config == (PRIOR, TOKENIZER)[kind]
    back = tmp_path / f"back{suffix}"
    assert convert(ours, back, to="official") == [back]
    load = (load_official_prior, load_official_tokenizer)[kind]
    module = load(back)
    assert module.config == (PRIOR, TOKENIZER)[kind]
    assert same(to_official(module), states[kind])
    assert describe(back)["config"] == module.config.to_dict()


def test_back_is_what_torch_reads(tmp_path, files, states):
    convert(files[1], tmp_path / "back.pt", to="official", config=OFFICIAL_TOKENIZER)
    value = torch.load(tmp_path / "back.pt", weights_only=True)
    assert same(value["model"], states[1])
    assert (tmp_path / "back.pt").stat().st_size < files[1].stat().st_size + 10_000


def test_both_make_a_pipeline(tmp_path, files, states):
    convert(files, tmp_path / "pipe", dtype=torch.bfloat16)
    pipe = DARPipeline.from_pretrained(tmp_path / "pipe")
    expected = {k: v.bfloat16().float() for k, v in states[0].items()}
    assert same(to_official(pipe.prior), expected)
    assert describe(tmp_path / "pipe")["components"]["prior"]["dtypes"].keys() == {"bfloat16"}
    written = convert(tmp_path / "pipe", tmp_path / "back", to="official")
    assert [p.name for p in written] == ["prior.pt", "tokenizer.pt"]
    assert same(to_official(load_official_prior(written[0])), expected)


def test_labels_stay(tmp_path, files):
    convert(files, tmp_path / "pipe")
    index = tmp_path / "pipe" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "labels": ["a", "b", "c"]}))
    convert(tmp_path / "pipe", tmp_path / "copy", dtype=torch.float16)
    assert list(DARPipeline.from_pretrained(tmp_path / "copy").labels) == ["a", "b", "c"]


def test_shards(tmp_path, files):
    written = convert(files[0], tmp_path / "ours", max_shard_bytes=100_000)
    assert len([p for p in written if p.suffix == ".safetensors"]) > 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p, t, d: convert(p, d / "x", to="onnx"), ValueError, "to: expected one of"),
        (lambda p, t, d: convert([], d / "x"), ValueError, "one or two models, got 0"),
        (lambda p, t, d: convert([p, t], d / "x", config=PRIOR), ValueError, "one model, got 2"),
        (lambda p, t, d: convert([p, p], d / "x"), ValueError, "two of one kind"),
        (lambda p, t, d: convert(p, d / "x", to="official"), ValueError, r"\.pt or \.safetensors"),
        (
            lambda p, t, d: convert([p, t], d / "x.pt", to="official"),
            ValueError,
            "a folder for two",
        ),
        (lambda p, t, d: convert(d / "none.pt", d / "x"), CheckpointError, "cannot be read"),
        (lambda p, t, d: convert(d / "no", d / "x.pt", "official"), CheckpointError, "cannot be"),
    ],
)
def test_bad_arguments(tmp_path, files, call, error, message):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=message):
        call(*files, tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_describe_official(files, states):
    found = describe(files[1])
    assert found["format"] == "torch"
    assert found["kind"] == "tokenizer"
    assert found["wrapper"] == "ema"
    assert found["keys"] == ["model", "ema", "config", "args"]
    assert found["config"] == TOKENIZER.to_dict()
    assert found["parameters"] == sum(v.numel() for v in states[1].values())
    assert found["tensors"] == len(states[1])
    assert found["dtypes"] == {"float32": found["parameters"]}
    assert found["bytes"] == files[1].stat().st_size
    assert found["refused"] is None
    json.dumps(found)


def test_describe_folder(tmp_path, files, states):
    module = load_official_prior(files[0], dtype=torch.float16)
    written = save_model(module, tmp_path / "ours", max_shard_bytes=50_000)
    found = describe(tmp_path / "ours")
    assert found["format"] == "folder"
    assert found["kind"] == "prior"
    assert found["config"] == PRIOR.to_dict()
    assert found["dtypes"] == {"float16": sum(v.numel() for v in states[0].values())}
    assert found["bytes"] == sum(path.stat().st_size for path in written)
    assert found["refused"] is None


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: torch.save({"model": Evil()}, p), r"refused (posix|nt)\.system"),
        (lambda p: p.write_bytes(b"\x80\x02N."), "bare pickle"),
        (lambda p: torch.save({"w": torch.ones(1)}, p), "expected the weights of an official"),
        (lambda p: p.mkdir(), r"config\.json: cannot be read"),
        (lambda p: None, "no such file or folder"),
    ],
    ids=["evil", "pickle", "other", "empty folder", "nothing"],
)
def test_describe_refused(tmp_path, write, message):
    import re

    path = tmp_path / "x"
    write(path)
    found = describe(path)
    assert re.search(message, found["refused"])
    json.dumps(found)


def test_describe_says_what_does_not_fit(tmp_path, files):
    convert(files[0], tmp_path / "ours")
    path = tmp_path / "ours" / "config.json"
    path.write_text(path.read_text().replace('"depth": 2', '"depth": 3'))
    assert "missing 7" in describe(tmp_path / "ours")["refused"]
    torch.save({"norm.weight": torch.ones(2), "tok_embeddings.weight": torch.ones(2, 2)}, files[0])
    assert "missing" in describe(files[0])["refused"]
